package guest

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// loopbackUp raises lo; a kernel without networking has none.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr) != nil {
		return nil
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// addEntropy feeds the host's random bytes to the kernel's pool and counts them
// as entropy (random(4), RNDADDENTROPY).
func addEntropy(b []byte) {
	if len(b) == 0 {
		return
	}
	b = b[:min(len(b), 256)]
	fd, err := unix.Open("/dev/random", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	var pool struct {
		bits, size int32
		buf        [256]byte
	}
	pool.bits, pool.size = int32(len(b)*8), int32(len(b))
	copy(pool.buf[:], b)
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool)))
}
