package confine

import (
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

// isolate keeps mounts of this namespace from showing in others.
func isolate() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	return nil
}

// privateRoot replaces the root of the calling process by an empty tmpfs with
// the profile's binds, links and devices, and drops the old one. The process
// must have an isolated mount namespace.
//
// Sources are taken before anything is mounted, and their identity is checked
// on what was taken: what was checked is what is served, whatever happens to
// the path meanwhile.
func privateRoot(p *Profile, m mounter, makeNodes bool) error {
	binds := p.Binds
	if p.Program == "" {
		binds = append(slices.Clone(binds), Bind{Source: "/proc/self/exe", Target: selfPath, Exec: true})
	}
	sources := make([]source, len(binds))
	for i, b := range binds {
		var err error
		if sources[i], err = m.take(b); err != nil {
			return err
		}
	}
	devices, err := takeDevices(p.Devices, m, makeNodes)
	if err != nil {
		return err
	}
	root, err := emptyRoot()
	if err != nil {
		return err
	}
	for i, b := range binds {
		if err := m.place(sources[i], root, b.target()); err != nil {
			return fmt.Errorf("bind %s: %w", b.Source, err)
		}
	}
	for _, d := range devices {
		if err := d.place(root, m, p.User); err != nil {
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

// deviceNode is a device to be: the host's node or, without a source, a node
// of our own.
type deviceNode struct {
	path   string
	mode   uint32
	rdev   uint64
	source source
}

// takeDevices finds the devices. With makeNodes they become nodes of our own,
// which belong to the program's user whatever the host's modes are; a user
// namespace cannot make any and binds the host's.
func takeDevices(paths []string, m mounter, makeNodes bool) ([]deviceNode, error) {
	var nodes []deviceNode
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("device %s: %w", path, err)
		}
		d := deviceNode{path: path, mode: st.Mode&unix.S_IFMT | 0o600, rdev: uint64(st.Rdev), source: source{fd: -1}}
		if !makeNodes {
			var err error
			if d.source, err = m.takeDevice(path); err != nil {
				return nil, fmt.Errorf("device %s: %w", path, err)
			}
		}
		nodes = append(nodes, d)
	}
	return nodes, nil
}

// place puts the device under root.
func (d deviceNode) place(root string, m mounter, u *User) error {
	if d.source.fd >= 0 {
		return m.place(d.source, root, d.path)
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
	const flags = mountRO | mountNoSuid | mountNoExec | unix.MS_REMOUNT | unix.MS_BIND
	if err := unix.Mount("", "/", "", flags, ""); err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	return nil
}
