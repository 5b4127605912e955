package fuseserver

import (
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// Under "strict" and "relaxed" the guest's owner, mode, type and device number
// of a regular file or directory live in one extended attribute, in the
// format that the peer uses, so that volumes move between both:
//
//	byte 0     version, 1
//	bytes 1-3  zero
//	bytes 4-19 uid, gid, mode with its type bits, rdev, little endian
//
// Symbolic links ("strict" only), FIFOs, sockets and devices are stand-ins:
// regular files of the host whose overlay says what they are. Real links and
// special files of the host carry no attribute and show the identity map.
const (
	overlayPrefix = "user.msb."
	overlaySize   = 20
)

var overlayName = append([]byte(overlayPrefix+"override_stat"), 0)

// overlay is the decoded attribute.
type overlay struct{ uid, gid, mode, rdev uint32 }

func (v overlay) format() uint32 { return v.mode & unix.S_IFMT }

func (v overlay) encode(b []byte) []byte {
	b = b[:overlaySize]
	copy(b, []byte{1, 0, 0, 0})
	binary.LittleEndian.PutUint32(b[4:], v.uid)
	binary.LittleEndian.PutUint32(b[8:], v.gid)
	binary.LittleEndian.PutUint32(b[12:], v.mode)
	binary.LittleEndian.PutUint32(b[16:], v.rdev)
	return b
}

// decodeOverlay judges an attribute found on a host inode of the given type.
// Whoever can write to the share can write it: a type that the host inode
// cannot stand in for is refused like a bad version.
func decodeOverlay(b []byte, host uint32) (v overlay, ok bool) {
	if len(b) != overlaySize || b[0] != 1 {
		return v, false
	}
	v.uid = binary.LittleEndian.Uint32(b[4:])
	v.gid = binary.LittleEndian.Uint32(b[8:])
	v.mode = binary.LittleEndian.Uint32(b[12:]) & (unix.S_IFMT | 0o7777)
	v.rdev = binary.LittleEndian.Uint32(b[16:])
	if v.format() == 0 {
		v.mode |= host
	}
	switch v.format() {
	case unix.S_IFDIR:
		return v, host == unix.S_IFDIR
	case unix.S_IFREG, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
		return v, host == unix.S_IFREG
	}
	return v, false
}

type overlayState uint8

const (
	overlayUnknown overlayState = iota
	overlayAbsent
	overlayPresent
	overlayBad
)

// overlayCache is what was last seen, valid as long as the inode's ctime is
// the same: setting the attribute changes the ctime, so a change by anybody
// is noticed by the fstat that GETATTR needs anyway.
type overlayCache struct {
	mu    sync.Mutex
	state overlayState
	nsec  uint32
	sec   uint64
	v     overlay
}

func (o *overlayCache) store(a *fusewire.Attr, state overlayState, v overlay) {
	o.mu.Lock()
	o.state, o.v, o.sec, o.nsec = state, v, a.Ctime, a.CtimeNsec
	o.mu.Unlock()
}

// last returns what was last seen, however old.
func (o *overlayCache) last() (overlay, overlayState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.v, o.state
}

// virtualFormat returns the file type that the guest sees, without a system
// call. A type does not change during an inode's life.
func (n *inode) virtualFormat() uint32 {
	if v, state := n.ov.last(); state == overlayPresent {
		return v.format()
	}
	return n.format
}

// overlayOf returns the overlay of n, whose fresh host attributes are a.
func (c *call) overlayOf(n *inode, a *fusewire.Attr) (v overlay, state overlayState, err errno) {
	o := &n.ov
	o.mu.Lock()
	if o.state != overlayUnknown && o.sec == a.Ctime && o.nsec == a.CtimeNsec {
		v, state = o.v, o.state
		o.mu.Unlock()
		return v, state, 0
	}
	o.mu.Unlock()
	if v, state, err = c.readOverlay(n); err == 0 {
		o.store(a, state, v)
	}
	return v, state, err
}

func (c *call) readOverlay(n *inode) (v overlay, state overlayState, err errno) {
	size, err := c.nodeGetxattr(n, &overlayName[0], c.xattr[:])
	switch {
	case err == unix.ENODATA, err == unix.EACCES, err == unix.EPERM:
		// A file that the server may not read shows its host attributes.
		return v, overlayAbsent, 0
	case err == unix.EOPNOTSUPP && c.s.virt == virtRelaxed:
		return v, overlayAbsent, 0
	case err == unix.EOPNOTSUPP:
		return v, 0, unix.EIO
	case err == unix.ERANGE:
		return v, overlayBad, 0
	case err != 0:
		return v, 0, err
	}
	v, ok := decodeOverlay(c.xattr[:size], n.format)
	if !ok {
		return v, overlayBad, 0
	}
	return v, overlayPresent, 0
}

// writeOverlay sets the overlay of a node and forgets the cached one.
func (c *call) writeOverlay(n *inode, v overlay) errno {
	err := c.nodeSetxattr(n, &overlayName[0], v.encode(c.xattr[:]), 0)
	if err == unix.EACCES {
		// The server's own file, made unwritable by a host program.
		if fstat(n.quick, n.fd, &c.st) == 0 && c.st.Uid == c.s.uid {
			floor := c.st.Mode&0o7777 | floorOf(n.format)
			if fchmodat(c.s.proc, c.procName(n.fd), floor) == 0 {
				err = c.nodeSetxattr(n, &overlayName[0], v.encode(c.xattr[:]), 0)
			}
		}
	}
	n.ov.mu.Lock()
	n.ov.state = overlayUnknown
	n.ov.mu.Unlock()
	return err
}

// virtual turns host attributes into what the guest sees.
func (c *call) virtual(n *inode, a *fusewire.Attr) errno {
	n.noteSize(a.Size)
	if n.submount {
		a.Flags = fusewire.AttrSubmount
	}
	if c.s.virt == virtOff {
		return 0
	}
	if n.openable() {
		v, state, err := c.overlayOf(n, a)
		if err != 0 {
			return err
		}
		if state == overlayBad {
			return unix.EIO
		}
		if state == overlayPresent {
			v.apply(a)
			return 0
		}
	}
	c.s.mapIdentity(a)
	return 0
}

func (v overlay) apply(a *fusewire.Attr) {
	a.Mode, a.UID, a.GID, a.Rdev = v.mode, v.uid, v.gid, 0
	if f := v.format(); f == unix.S_IFCHR || f == unix.S_IFBLK {
		a.Rdev = v.rdev
	}
}

// nobody owns, in the guest, host files that are not the server's.
const nobody = 65534

func (s *Server) mapIdentity(a *fusewire.Attr) {
	if a.UID == s.uid {
		a.UID, a.GID = s.cfg.GuestUID, s.cfg.GuestGID
	} else {
		a.UID, a.GID = nobody, nobody
	}
}

// stripe returns the lock for reading, changing and writing n's overlay.
func (s *Server) stripe(n *inode) *sync.Mutex { return &s.stripes[n.id%uint64(len(s.stripes))] }

// privileged returns the set-id bits of a mode that a write by an ordinary
// user clears: setgid without group execution means something else.
func privileged(mode uint32) uint32 {
	bits := mode & unix.S_ISUID
	if mode&(unix.S_ISGID|unix.S_IXGRP) == unix.S_ISGID|unix.S_IXGRP {
		bits |= unix.S_ISGID
	}
	return bits
}

// killPrivileges clears the set-id bits of a regular file before a caller
// without CAP_FSETID changes its data: in the overlay, and on the host where
// the host kernel would not. security.capability needs no care: the guest
// cannot set it, and the host kernel removes it at every write.
func (c *call) killPrivileges(n *inode) errno {
	if n.format != unix.S_IFREG {
		return 0
	}
	if c.s.virt != virtOff {
		v, state := n.ov.last()
		if state == overlayPresent && privileged(v.mode) == 0 {
			return 0
		}
	}
	mu := c.s.stripe(n)
	mu.Lock()
	defer mu.Unlock()
	var a fusewire.Attr
	if err := c.hostAttr(n, &a); err != 0 {
		return err
	}
	if c.s.virt != virtOff {
		v, state, err := c.overlayOf(n, &a)
		if err != 0 {
			return err
		}
		if state == overlayPresent && privileged(v.mode) != 0 {
			v.mode &^= privileged(v.mode)
			return c.writeOverlay(n, v)
		}
	}
	if bits := privileged(a.Mode); bits != 0 {
		err := fchmodat(c.s.proc, c.procName(n.fd), a.Mode&0o7777&^bits)
		if err != unix.EPERM { // not ours: then the host kernel does it at the write
			return err
		}
	}
	return 0
}

// floorOf is the host mode that the server keeps for itself on files and
// directories that a guest made, whatever mode the guest gave them.
func floorOf(format uint32) uint32 {
	if format == unix.S_IFDIR {
		return 0o700
	}
	return 0o600
}

// hostMode returns the mode bits that a file or directory gets on the host
// when the guest gives it mode. A file never gets a set-id bit: any user of the
// host who can reach it could become its owner, root included.
func (s *Server) hostMode(mode uint32) uint32 {
	switch {
	case s.virt == virtOff && s.cfg.AsRoot:
		if mode&unix.S_IFMT != unix.S_IFDIR {
			mode &^= unix.S_ISUID | unix.S_ISGID
		}
		return mode & 0o7777
	case s.virt == virtOff || s.mirror:
		return mode&0o777 | floorOf(mode&unix.S_IFMT)
	}
	return floorOf(mode & unix.S_IFMT)
}
