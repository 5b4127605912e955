package volstore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/mountinfo"
)

// noMounts refuses a directory that is a mount point or has one below it, with an
// InvalidConfig error: what is mounted there is not the volume's, and moving or
// deleting the directory would take hold of it. A path that is nothing is fine.
func noMounts(name, path string) error {
	var stx unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_NLINK|unix.STATX_TYPE, &stx)
	if errors.Is(err, unix.ENOENT) || err == nil && stx.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if stx.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 && stx.Nlink == 2 {
		return nil // no mount point itself, and no directory in it that could be one
	}
	point, err := mountIn(path)
	if err != nil || point == "" {
		return err
	}
	return errdefs.New(errdefs.InvalidConfig, "volume %q: a file system is mounted at %s", name, point).
		WithHint("unmount it first: umount %q", point)
}

// mountIn returns the first mount point at or below a directory, "" for none.
func mountIn(path string) (string, error) {
	dir, err := openDir(path, unix.O_PATH)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return "", err
	}
	mounts, err := mountinfo.Self()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.In(real) {
			return m.Point, nil
		}
	}
	return "", nil
}

// immovable says why the directory of a volume could not be moved, where that is
// not for want of space.
func immovable(name, path string, err error) error {
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EXDEV):
		return errdefs.Wrap(errdefs.InvalidConfig, err, "volume %q: a file system is mounted at %s", name, path).
			WithHint("unmount it first")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return errdefs.Wrap(errdefs.IO, err, "volume %q: its directory %s cannot be moved", name, path).
			WithHint("it is another user's, or immutable (lsattr -d shows that): change that, or do this as its owner or as root")
	}
	return err
}

// makeMovable gives the owner of a directory access to it, without which it cannot
// be moved into another one; a guest may have taken that away.
func makeMovable(path string) bool {
	dir, err := openDir(path, unix.O_PATH)
	if err != nil {
		return false
	}
	defer dir.Close()
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), 0o700) == nil
}
