package home

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// ErrNotRegular is the cause of errors about what lies in a file's place: a pipe,
// which would keep who opens it waiting, a link, or something else.
var ErrNotRegular = errors.New("not a regular file")

// irregular is ErrNotRegular in words of its own.
type irregular uint32

func (i irregular) Error() string {
	what := map[irregular]string{unix.S_IFIFO: "a pipe", unix.S_IFLNK: "a symbolic link", unix.S_IFDIR: "a directory", unix.S_IFSOCK: "a socket"}[i]
	if what == "" {
		what = "a device"
	}
	return "it is " + what + ", not a regular file"
}

func (i irregular) Unwrap() error { return ErrNotRegular }

// OpenFile opens a file of the home, which must be a regular one: it waits for
// nothing and follows no link in the last place. flags are those of open(2), a
// new file gets mode 0600. It is os.OpenFile without its system calls that find
// out whether the runtime can poll the file.
//
// Errors: *os.PathError, with the cause ErrNotRegular.
func OpenFile(path string, flags int) (*os.File, error) {
	return openRegular(path, flags|unix.O_NOFOLLOW)
}

// ReadFile reads a file that must be a regular one or a link to one, and waits
// for nothing. Errors as OpenFile.
func ReadFile(path string) ([]byte, error) {
	f, err := openRegular(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// CheckRegular tells what lies in the place of a file, if it is something else;
// a link to a file is none. Where there is nothing it returns nil.
func CheckRegular(path string) error {
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case err == unix.ENOENT:
		return nil
	case err != nil:
		return &os.PathError{Op: "stat", Path: path, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return &os.PathError{Op: "open", Path: path, Err: irregular(st.Mode & unix.S_IFMT)}
	}
	return nil
}

func openRegular(path string, flags int) (*os.File, error) {
	nonblock := 0
	if flags&unix.O_ACCMODE != unix.O_RDWR {
		nonblock = unix.O_NONBLOCK // opening for both waits for nobody
	}
	for {
		fd, err := unix.Open(path, flags|nonblock|unix.O_CLOEXEC, 0o600)
		switch {
		case err == nil:
			return regular(fd, path, flags, nonblock)
		case errors.Is(err, unix.EINTR):
			continue
		}
		var st unix.Stat_t
		if (err == unix.ELOOP || err == unix.ENXIO || err == unix.EISDIR) && unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = irregular(st.Mode & unix.S_IFMT)
		}
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
}

// regular makes a file of a descriptor, or closes it.
func regular(fd int, path string, flags, nonblock int) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = irregular(st.Mode & unix.S_IFMT)
	}
	if err == nil && nonblock != 0 { // else the runtime would try to poll it
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Check says what is wrong with the home itself, where something is: it is no
// directory, or one that this process must not enter. One that is not there yet
// is right.
//
// Errors: InvalidConfig, with a hint.
func (d Dir) Check() error {
	var st unix.Stat_t
	err := unix.Stat(string(d), &st)
	var e *errdefs.Error
	switch {
	case err == unix.ENOENT && unix.Lstat(string(d), &st) == nil:
		e = errdefs.New(errdefs.InvalidConfig, "the home %s is a link to nothing", d)
	case err == unix.ENOENT:
		return nil
	case err != nil:
		e = errdefs.Wrap(errdefs.InvalidConfig, err, "the home %s cannot be reached", d)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		e = errdefs.New(errdefs.InvalidConfig, "the home %s is no directory", d)
	case unix.Access(string(d), unix.R_OK|unix.X_OK) != nil:
		e = errdefs.New(errdefs.InvalidConfig, "the home %s belongs to uid %d and may not be used by uid %d (mode %04o)", d, st.Uid, os.Geteuid(), st.Mode&0o7777)
	default:
		return nil
	}
	return e.WithHint("set %s to a directory of yours", EnvVar)
}
