package ledger

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// Bytes that are locked. They lie far beyond the end of the file.
const (
	slotLock   = int64(1) << 40 // + slot
	baseLock   = slotLock + 4096
	walkLock   = baseLock + 1
	orphanLock = int64(1) << 61 // + inode
	inodeLock  = int64(1) << 62 // + inode
	inodeMask  = int64(1)<<60 - 1
)

// Patience with holders of a lock that do not let go.
const (
	// inodePatience is how long an operation waits for another's on the same
	// inode, before it goes on as a late one; again within stuckFor of that, it
	// waits for stuckPatience only.
	inodePatience = time.Second
	stuckFor      = 10 * time.Second
	stuckPatience = 5 * time.Millisecond
	// basePatience is how long a walk waits for another one, and a writer for a
	// free slot.
	basePatience = time.Second
)

// tryLock locks bytes of a file exclusively; false when somebody else has one.
func tryLock(fd int, off, n int64) (bool, error) {
	return setLock(fd, unix.F_WRLCK, off, n)
}

func unlock(fd int, off, n int64) { _, _ = setLock(fd, unix.F_UNLCK, off, n) }

func setLock(fd int, how int16, off, n int64) (bool, error) {
	for {
		err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: how, Start: off, Len: n})
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, err
		}
	}
}

// lockedElsewhere reports whether another open file holds a lock there.
func lockedElsewhere(fd int, off, n int64) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: n}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return true // better to believe in one too many
	}
	return l.Type != unix.F_UNLCK
}

// lockWithin tries until it has the lock or the time is over.
func lockWithin(fd int, off, n int64, patience time.Duration) (bool, error) {
	ok, err := tryLock(fd, off, n)
	if ok || err != nil {
		return ok, err
	}
	deadline := time.Now().Add(patience)
	for pause := 5 * time.Microsecond; time.Now().Before(deadline); pause = min(2*pause, 2*time.Millisecond) {
		time.Sleep(pause)
		if ok, err := tryLock(fd, off, n); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

// now is the time since boot in ns. It is the same for all processes, and goes
// on while the machine sleeps.
func now() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return ts.Nano()
}
