package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// flock takes a lock on f and honours ctx. Kernel locks cannot be waited for
// with a deadline, so it asks again after 1 to 50 ms.
func flock(ctx context.Context, f *os.File, how int) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return errdefs.Wrap(errdefs.IO, err, "lock %s", filepath.Base(f.Name()))
		}
		select {
		case <-ctx.Done():
			return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "waiting for %s", filepath.Base(f.Name()))
		case <-time.After(wait):
		}
	}
}

// lockPath opens (and makes) a lock file that is never removed, and locks it.
func lockPath(ctx context.Context, path string, how int) (*os.File, error) {
	f, err := home.OpenFile(path, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image store")
	}
	if err := flock(ctx, f, how); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// tryLockPath is lockPath without waiting; it returns nil, nil when the lock is held.
func tryLockPath(path string, how int) (*os.File, error) {
	f, err := home.OpenFile(path, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image store")
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, nil
		}
		return nil, errdefs.Wrap(errdefs.IO, err, "lock %s", filepath.Base(path))
	}
	return f, nil
}

// takeMaking locks the file in which an object is being made, and returns nil,
// nil when ready says that somebody finished it meanwhile. The file that a
// killed maker left is returned with its content.
func takeMaking(ctx context.Context, making string, ready func() bool) (*os.File, error) {
	for {
		if ready() {
			return nil, nil
		}
		f, err := lockPath(ctx, making, unix.LOCK_EX)
		if err != nil {
			return nil, err
		}
		if !replaced(f, making) && !ready() {
			return f, nil
		}
		f.Close() // its former holder renamed or removed it: look again
	}
}

// replaced says whether path no longer names the open file f.
func replaced(f *os.File, path string) bool {
	have, err1 := f.Stat()
	now, err2 := os.Stat(path)
	return err1 != nil || err2 != nil || !os.SameFile(have, now)
}

// finish makes a file complete under its final name: data first, then the
// name, then the directory that holds it.
func finish(f *os.File, making, final string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(making, final); err != nil {
		return err
	}
	return syncDir(filepath.Dir(final))
}

// writeFile replaces a file at once or not at all. The caller holds the lock
// under which path is written.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	f, err := home.OpenFile(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = finish(f, tmp, path)
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
