package confine

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/mountinfo"
)

// mounter makes binds: with open_tree, mount_setattr and move_mount (Linux
// 5.12) or, when false, with mount(2) alone. The result is the same.
type mounter bool

// Restrictions of a mount. MS_ and MOUNT_ATTR_ flags have the same values.
const (
	mountRO     = unix.MS_RDONLY
	mountNoSuid = unix.MS_NOSUID
	mountNoDev  = unix.MS_NODEV
	mountNoExec = unix.MS_NOEXEC
)

// source is something to be bound, taken before the new root hides it: a
// detached copy of its mounts, or a descriptor of it.
type source struct {
	fd    int // -1: an optional one that does not exist
	flags uintptr
}

// take takes b's source and makes sure of its identity.
func (m mounter) take(b Bind) (source, error) {
	s := source{fd: -1, flags: mountNoSuid | mountNoDev}
	if !b.Writable {
		s.flags |= mountRO
	}
	if !b.Exec {
		s.flags |= mountNoExec
	}
	fd, err := m.open(b.Source)
	if b.Optional && err == unix.ENOENT {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("open %s: %w", b.Source, err)
	}
	s.fd = fd
	return s, b.check(fd)
}

// takeDevice takes a device node of the host; nodev is what it must not be.
func (m mounter) takeDevice(path string) (source, error) {
	fd, err := m.open(path)
	return source{fd, mountNoSuid | mountNoExec}, err
}

func (m mounter) open(path string) (int, error) {
	if m {
		return unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	}
	return unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
}

// attach puts the source at the mount point full, restricted.
func (m mounter) attach(s source, full string) error {
	if m {
		attr := &unix.MountAttr{Attr_set: uint64(s.flags)}
		if err := unix.MountSetattr(s.fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attr); err != nil {
			return fmt.Errorf("restrict: %w", err)
		}
		return unix.MoveMount(s.fd, "", unix.AT_FDCWD, full, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", s.fd), full, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return restrictBelow(full, s.flags)
}

// restrictBelow adds flags to every mount at and below a mount point. What a
// mount has already is kept: in a user namespace it may not be taken away.
func restrictBelow(point string, flags uintptr) error {
	mounts, err := mountinfo.Self()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if !m.In(point) {
			continue
		}
		all := flags | mountFlags(m.Options) | unix.MS_REMOUNT | unix.MS_BIND
		if err := unix.Mount("", m.Point, "", all, ""); err != nil {
			return fmt.Errorf("restrict %s: %w", m.Point, err)
		}
	}
	return nil
}

// mountFlags are the flags of a mount's options that a remount would clear.
// Times are kept by the kernel when none of their flags is given.
func mountFlags(options string) (flags uintptr) {
	for o := range strings.SplitSeq(options, ",") {
		flags |= map[string]uintptr{"ro": mountRO, "nosuid": mountNoSuid, "nodev": mountNoDev, "noexec": mountNoExec}[o]
	}
	return flags
}

// procSelfFd returns a descriptor of /proc/self/fd on a mount of its own that
// is attached nowhere, so that ".." leads nowhere: from the real one a program
// of uid 0 would reach /proc/sys.
func (m mounter) procSelfFd() (int, error) {
	const dir = "/proc/self/fd"
	flags := uintptr(mountRO | mountNoSuid | mountNoDev | mountNoExec)
	if m {
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return -1, fmt.Errorf("%s: %w", dir, err)
		}
		return fd, unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: uint64(flags)})
	}
	if err := unix.Mount(dir, mountPoint, "", unix.MS_BIND, ""); err != nil {
		return -1, fmt.Errorf("%s: %w", dir, err)
	}
	if err := unix.Mount("", mountPoint, "", flags|unix.MS_REMOUNT|unix.MS_BIND, ""); err != nil {
		return -1, fmt.Errorf("%s: %w", dir, err)
	}
	fd, err := unix.Open(mountPoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("%s: %w", dir, err)
	}
	return fd, unix.Unmount(mountPoint, unix.MNT_DETACH)
}

// place makes the way to target under root and attaches s there.
func (m mounter) place(s source, root, target string) error {
	if s.fd < 0 {
		return nil
	}
	defer unix.Close(s.fd)
	var st unix.Stat_t
	if err := unix.Fstat(s.fd, &st); err != nil {
		return err
	}
	full := filepath.Join(root, target)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.MkdirAll(full, 0o755); err != nil {
			return err
		}
	} else if err := emptyFile(full); err != nil {
		return err
	}
	return m.attach(s, full)
}
