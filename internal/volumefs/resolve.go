package volumefs

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// spot is where a path leads: name in the open directory dir. With name "" it
// is the directory dir itself (the root, or what a link like "." means).
type spot struct {
	dir     int      // O_PATH, owned
	missing []string // directories to be made below dir, in this order, to hold name
	name    string

	fd int // O_PATH of what has the name now, owned; -1: nothing has
	st unix.Stat_t
	ov overlay // of a file, when links were to be followed
}

func (s *spot) exists() bool { return s.fd >= 0 }
func (s *spot) isDir() bool  { return s.exists() && s.st.Mode&unix.S_IFMT == unix.S_IFDIR }

func (s *spot) close() {
	for _, fd := range []*int{&s.dir, &s.fd} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}

// last says what to do with the last component of a path.
type last uint8

const (
	follow  last = iota // follow it if it is a link; it must exist
	create              // follow it if it is a link; it and its parents may be missing
	itself              // the name itself, link or not; it must exist
	replace             // the name itself; it and its parents may be missing
)

func (l last) follows() bool  { return l == follow || l == create }
func (l last) mayMiss() bool  { return l == create || l == replace }
func (l last) String() string { return [...]string{"follow", "create", "itself", "replace"}[l] }

// errSlow is how the fast way hands a path to the walk.
var errSlow = errors.New("volumefs: walk needed")

// beneath makes openat2 fail with EXDEV on every step that would leave the
// root or enter what is mounted below it, and with ELOOP on links of /proc.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// openBeneath opens a clean path below the root, links followed, in one system
// call. The walk is asked when the kernel gives up on ".." in a link because
// of renames meanwhile (EAGAIN), and for paths too long for one call.
func (f *FS) openBeneath(rel string, flags uint64) (int, error) {
	if rel == "" {
		rel = "."
	}
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: beneath}
	for range 8 {
		fd, err := unix.Openat2(f.root, rel, &how)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR, unix.EAGAIN:
			continue
		case unix.EXDEV:
			return -1, errEscape
		case unix.ENOTDIR, unix.ENAMETOOLONG:
			// a component may be a stand-in link; a long path may have short names
			return -1, errSlow
		}
		return -1, err
	}
	return -1, errSlow
}

// find resolves a clean path to a spot.
func (f *FS) find(rel string, l last) (*spot, error) {
	if f.kernel {
		s, err := f.findFast(rel, l)
		if err != errSlow {
			return s, err
		}
	}
	return f.walk(rel, l)
}

// findFast opens the directory with openBeneath and looks at the last name. It
// is errSlow whenever links, stand-ins or missing directories are involved.
func (f *FS) findFast(rel string, l last) (*spot, error) {
	dir, name := split(rel)
	s := &spot{dir: -1, fd: -1, name: name}
	var err error
	if s.dir, err = f.openBeneath(dir, unix.O_PATH|unix.O_DIRECTORY); err != nil {
		if err == unix.ENOENT && l.mayMiss() {
			return nil, errSlow
		}
		return nil, err
	}
	if name == "" {
		err = s.openSelf()
	} else {
		err = f.openName(s)
	}
	switch {
	case err == unix.ENOENT && l.mayMiss():
		return s, nil
	case err != nil:
		s.close()
		return nil, err
	case l.follows() && s.st.Mode&unix.S_IFMT == unix.S_IFLNK:
		s.close()
		return nil, errSlow
	}
	if l.follows() {
		if s.ov, err = f.overlayOf(s.fd, &s.st); err == nil && s.ov.isLink() {
			err = errSlow
		}
		if err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

// openName fills fd and st with what has the name.
func (f *FS) openName(s *spot) (err error) {
	s.fd, err = f.openIn(s.dir, s.name, unix.O_PATH)
	if err != nil {
		return err
	}
	return unix.Fstat(s.fd, &s.st)
}

// openSelf fills fd and st with the directory itself.
func (s *spot) openSelf() (err error) {
	s.fd, err = unix.FcntlInt(uintptr(s.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		s.fd = -1
		return err
	}
	return unix.Fstat(s.fd, &s.st)
}

// node is something that exists, opened with O_PATH.
type node struct {
	fd int
	st unix.Stat_t
	ov overlay
}

func (n *node) close() { _ = unix.Close(n.fd) }

// target opens what a clean path leads to, links followed.
func (f *FS) target(rel string) (node, error) {
	if f.kernel {
		n, err := f.targetFast(rel)
		if err != errSlow {
			return n, err
		}
	}
	s, err := f.walk(rel, follow)
	if err != nil {
		return node{}, err
	}
	n := node{fd: s.fd, st: s.st}
	s.fd = -1
	s.close()
	return n.withOverlay(f)
}

func (f *FS) targetFast(rel string) (node, error) {
	fd, err := f.openBeneath(rel, unix.O_PATH)
	if err != nil {
		return node{}, err
	}
	n := node{fd: fd}
	if err := unix.Fstat(fd, &n.st); err != nil {
		n.close()
		return node{}, err
	}
	n, err = n.withOverlay(f)
	if err == nil && n.ov.isLink() {
		n.close()
		return node{}, errSlow
	}
	return n, err
}

// withOverlay fills ov, or closes n.
func (n node) withOverlay(f *FS) (_ node, err error) {
	if n.ov, err = f.overlayOf(n.fd, &n.st); err != nil {
		n.close()
		return node{}, err
	}
	return n, nil
}

// reopen opens for real what an O_PATH descriptor stands for, whatever names
// it has by now.
func (f *FS) reopen(fd, flags int) (int, error) {
	return openat(f.proc, strconv.Itoa(fd), flags, 0)
}

// openIn opens a single name in a directory, not following it; with O_PATH this
// neither waits nor wakes anybody, whatever the name is. What is mounted there is
// not the volume's: errEscape.
func (f *FS) openIn(dir int, name string, flags int) (int, error) {
	flags |= unix.O_NOFOLLOW
	if !f.kernel {
		fd, err := openat(dir, name, flags, 0)
		if err == nil && f.mountOf(fd) != f.mount {
			_ = unix.Close(fd)
			return -1, errEscape
		}
		return fd, err
	}
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_XDEV}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		switch err {
		case nil:
			return fd, nil
		case unix.EINTR, unix.EAGAIN:
		case unix.EXDEV:
			return -1, errEscape
		default:
			return -1, err
		}
	}
}

// mountID tells a mount from others: by its file system alone where the kernel does
// not say more (Linux 5.8).
type mountID struct {
	major, minor uint32
	id           uint64
}

func (f *FS) mountOf(fd int) mountID {
	var stx unix.Statx_t
	if unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stx) != nil {
		return mountID{}
	}
	m := mountID{major: stx.Dev_major, minor: stx.Dev_minor}
	if stx.Mask&unix.STATX_MNT_ID != 0 {
		m.id = stx.Mnt_id
	}
	return m
}

// openat is unix.Openat, closed on exec and repeated after a signal.
func openat(dir int, name string, flags int, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
