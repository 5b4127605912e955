package supervisor

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// lockName is the file in a sandbox's directory whose lock says that the
// sandbox lives. It is an open-file-description lock: it goes when the last of
// creator, supervisor and VMM that hold the description is gone, and F_OFD_GETLK
// asks for it without taking it.
const lockName = "lock"

// ErrLocked is returned by Lock when somebody holds the sandbox.
var ErrLocked = errors.New("sandbox is locked")

// Lock takes the lock of a sandbox whose directory exists. The file stays open
// for as long as the lock is wanted; it is handed to the supervisor.
func Lock(h home.Dir, name string) (*os.File, error) {
	path := filepath.Join(h.Sandbox(name), lockName)
	for {
		f, err := home.OpenFile(path, unix.O_RDWR|unix.O_CREAT)
		if err != nil {
			return nil, err
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
			f.Close()
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				return nil, ErrLocked
			}
			return nil, err
		}
		same, err := stillThere(f, path)
		if err != nil || same {
			return f, err
		}
		f.Close() // the directory was removed and made anew meanwhile
	}
}

// Unlock releases a sandbox's lock that no other process was given. Closing
// alone would leave it with a child that another goroutine is starting just now,
// until its exec.
func Unlock(f *os.File) {
	_ = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
	_ = f.Close()
}

// stillThere reports whether f is the file at path.
func stillThere(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(a, b), err
}

// Locked reports whether a sandbox lives, without taking its lock.
func Locked(h home.Dir, name string) (bool, error) {
	f, err := home.OpenFile(filepath.Join(h.Sandbox(name), lockName), unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	// A read lock would be refused while a write lock is held; asking needs no
	// write permission, so that a read-only home works too.
	l := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, err
	}
	return l.Type != unix.F_UNLCK, nil
}
