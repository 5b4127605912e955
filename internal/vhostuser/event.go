package vhostuser

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// eventOne is what is added to an eventfd.
var eventOne = [8]byte{1}

// writeEvent signals a non-blocking eventfd. It cannot sleep, so it goes
// without telling the scheduler. A full counter means that a signal is already
// pending; other errors have nobody to hear them.
func writeEvent(fd int) {
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&eventOne)), uintptr(len(eventOne)))
}

// writeEventTo signals a descriptor of the front end, whose flags are not ours
// to change: one that may block is asked first.
func writeEventTo(fd int, blocks bool) {
	if blocks {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 {
			return
		}
	}
	writeEvent(fd)
}

// mayBlock reports whether writing to fd can put the writer to sleep.
func mayBlock(fd int) bool {
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err != nil || fl&unix.O_NONBLOCK == 0
}

// drainEvent resets our own eventfd.
func drainEvent(fd int) {
	var b [8]byte
	_, _, _ = unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b)), uintptr(len(b)))
}
