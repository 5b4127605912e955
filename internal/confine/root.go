package confine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// selfPath is where the running program lies in a private root when it is to be
// executed again.
const selfPath = "/msb"

// programPath is where the program is found by execve.
func (p *Profile) programPath(privateRoot bool) string {
	switch {
	case p.Program != "":
		return p.Program
	case privateRoot:
		return selfPath
	}
	return "/proc/self/exe"
}

// privateRoot replaces the root of the calling process by an empty tmpfs with
// the profile's binds, links and devices, and drops the old one. The process
// must have a mount namespace of its own.
//
// Sources are taken as detached copies before anything is mounted, and their
// identity is checked on the copy: what was checked is what is served,
// whatever happens to the path meanwhile.
func privateRoot(p *Profile, makeNodes bool) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	binds := p.Binds
	if p.Program == "" {
		binds = append(slices.Clone(binds), Bind{Source: "/proc/self/exe", Target: selfPath, Exec: true})
	}
	mounts, err := copyBinds(binds)
	if err != nil {
		return err
	}
	devices, err := takeDevices(p.Devices, makeNodes)
	if err != nil {
		return err
	}
	root, err := emptyRoot()
	if err != nil {
		return err
	}
	for i, b := range binds {
		if err := attach(mounts[i], root, b.target()); err != nil {
			return fmt.Errorf("bind %s: %w", b.Source, err)
		}
	}
	for _, d := range devices {
		if err := d.place(root, p.User); err != nil {
			return fmt.Errorf("device %s: %w", d.path, err)
		}
	}
	for _, l := range p.Links {
		if err := placeLink(root, l); err != nil {
			return err
		}
	}
	return enter(root)
}

// copyBinds returns one detached mount per bind, -1 for a missing optional one.
func copyBinds(binds []Bind) ([]int, error) {
	mounts := make([]int, len(binds))
	for i, b := range binds {
		fd, err := copyBind(b)
		if b.Optional && errors.Is(err, unix.ENOENT) {
			fd, err = -1, nil
		}
		if err != nil {
			return nil, err
		}
		mounts[i] = fd
	}
	return mounts, nil
}

func copyBind(b Bind) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, b.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", b.Source, err)
	}
	if err := b.check(fd); err != nil {
		return -1, err
	}
	attr := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV)
	if !b.Writable {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	if !b.Exec {
		attr |= unix.MOUNT_ATTR_NOEXEC
	}
	if err := setAttr(fd, attr, unix.AT_RECURSIVE); err != nil {
		return -1, fmt.Errorf("restrict %s: %w", b.Source, err)
	}
	return fd, nil
}

// check compares what fd is with what the profile says it must be.
func (b Bind) check(fd int) error {
	if b.Dev == 0 && b.Ino == 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", b.Source, err)
	}
	if uint64(st.Dev) != b.Dev || st.Ino != b.Ino {
		return fmt.Errorf("%s is not what it was: device %d inode %d, expected %d and %d", b.Source, st.Dev, st.Ino, b.Dev, b.Ino)
	}
	return nil
}

func setAttr(fd int, attr uint64, flags uint) error {
	return unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|flags, &unix.MountAttr{Attr_set: attr})
}

// deviceNode is a device to be: a detached bind of the host's node, or (mount
// -1) a node of our own.
type deviceNode struct {
	path  string
	mode  uint32
	rdev  uint64
	mount int
}

// takeDevices finds the devices. With makeNodes they become nodes of our own,
// which belong to the program's user whatever the host's modes are; a user
// namespace cannot make any and binds the host's.
func takeDevices(paths []string, makeNodes bool) ([]deviceNode, error) {
	var nodes []deviceNode
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("device %s: %w", path, err)
		}
		d := deviceNode{path: path, mode: st.Mode&unix.S_IFMT | 0o600, rdev: uint64(st.Rdev), mount: -1}
		if !makeNodes {
			fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return nil, fmt.Errorf("device %s: %w", path, err)
			}
			if err := setAttr(fd, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, 0); err != nil {
				return nil, fmt.Errorf("device %s: %w", path, err)
			}
			d.mount = fd
		}
		nodes = append(nodes, d)
	}
	return nodes, nil
}

// place puts the device under root.
func (d deviceNode) place(root string, u *User) error {
	if d.mount >= 0 {
		return attach(d.mount, root, d.path)
	}
	full := filepath.Join(root, d.path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	if err := unix.Mknod(full, d.mode, int(d.rdev)); err != nil {
		return err
	}
	if u == nil {
		return nil
	}
	return os.Chown(full, int(u.UID), int(u.GID))
}

// mountPoint is where the new root is put together. Anything that exists on
// every system will do: the mount is seen in our namespace only, and the
// sources below it have been taken already.
const mountPoint = "/tmp"

// emptyRoot mounts the tmpfs that becomes the root. It is small: it holds
// mount points, and an inode for each.
func emptyRoot() (string, error) {
	if err := unix.Mount("msb", mountPoint, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=1m,nr_inodes=4096"); err != nil {
		return "", fmt.Errorf("mount a root: %w", err)
	}
	return mountPoint, nil
}

// attach puts a detached mount at target under root, making the way to it.
func attach(mount int, root, target string) error {
	if mount < 0 {
		return nil
	}
	defer unix.Close(mount)
	var st unix.Stat_t
	if err := unix.Fstat(mount, &st); err != nil {
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
	return unix.MoveMount(mount, "", unix.AT_FDCWD, full, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func emptyFile(full string) error {
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(full, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	return f.Close()
}

func placeLink(root string, l Link) error {
	full := filepath.Join(root, l.Path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		return err
	}
	return os.Symlink(l.To, full)
}

// enter makes root the root and drops the old one: "." is the new root, put
// on top of the old, which is then detached from under it.
func enter(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("drop the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := setAttr(fd, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, 0); err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	return nil
}

// procSelfFd returns a descriptor of /proc/self/fd on a mount of its own that
// is attached nowhere, so that ".." leads nowhere: from the real one a program
// of uid 0 would reach /proc/sys.
func procSelfFd() (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/proc/self/fd", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("/proc/self/fd: %w", err)
	}
	return fd, setAttr(fd, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, 0)
}
