package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// attrFromStat fills a with host attributes.
func attrFromStat(a *fusewire.Attr, st *unix.Stat_t) {
	*a = fusewire.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), Mtime: uint64(st.Mtim.Sec), Ctime: uint64(st.Ctim.Sec),
		AtimeNsec: uint32(st.Atim.Nsec), MtimeNsec: uint32(st.Mtim.Nsec), CtimeNsec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid,
		Rdev: uint32(st.Rdev), Blksize: uint32(st.Blksize),
	}
}

// attrFromStatx fills a with host attributes.
func attrFromStatx(a *fusewire.Attr, st *unix.Statx_t) {
	*a = fusewire.Attr{
		Ino: st.Ino, Size: st.Size, Blocks: st.Blocks,
		Atime: uint64(st.Atime.Sec), Mtime: uint64(st.Mtime.Sec), Ctime: uint64(st.Ctime.Sec),
		AtimeNsec: st.Atime.Nsec, MtimeNsec: st.Mtime.Nsec, CtimeNsec: st.Ctime.Nsec,
		Mode: uint32(st.Mode), Nlink: st.Nlink, UID: st.Uid, GID: st.Gid,
		Rdev: uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)), Blksize: st.Blksize,
	}
}

// hostAttr fills a with the host's attributes of n.
func (c *call) hostAttr(n *inode, a *fusewire.Attr) errno {
	if err := fstat(n.quick, n.fd, &c.st); err != 0 {
		return err
	}
	attrFromStat(a, &c.st)
	return 0
}

// attr fills a with what the guest sees of n.
func (c *call) attr(n *inode, a *fusewire.Attr) errno {
	if err := c.hostAttr(n, a); err != 0 {
		return err
	}
	return c.virtual(n, a)
}

// replyAttr makes the attributes of n the reply.
func (c *call) replyAttr(n *inode) errno {
	out := fusewire.AttrOut{AttrValid: c.s.valid.sec, AttrValidNsec: c.s.valid.nsec}
	if err := c.attr(n, &out.Attr); err != 0 {
		return err
	}
	c.body = fusewire.Put(c.reply[replySize:], &out)
	return 0
}

func (c *call) opGetattr() errno {
	n, err := c.node()
	if err != 0 {
		return err
	}
	err = c.replyAttr(n)
	n.drop()
	return err
}

// opStatx is opGetattr with the time of birth.
func (c *call) opStatx() errno {
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	if err := statxFd(n.fd, statxMask|unix.STATX_BTIME, &c.stx); err != 0 {
		return err
	}
	var a fusewire.Attr
	attrFromStatx(&a, &c.stx)
	if err := c.virtual(n, &a); err != 0 {
		return err
	}
	st := &c.stx
	out := fusewire.StatxOut{AttrValid: c.s.valid.sec, AttrValidNsec: c.s.valid.nsec, Stat: fusewire.Statx{
		Mask:    st.Mask & (unix.STATX_BASIC_STATS | unix.STATX_BTIME),
		Blksize: a.Blksize, Nlink: a.Nlink, UID: a.UID, GID: a.GID, Mode: uint16(a.Mode),
		Ino: a.Ino, Size: a.Size, Blocks: a.Blocks,
		Atime: sxTime(st.Atime), Btime: sxTime(st.Btime), Ctime: sxTime(st.Ctime), Mtime: sxTime(st.Mtime),
		RdevMajor: unix.Major(uint64(a.Rdev)), RdevMinor: unix.Minor(uint64(a.Rdev)),
		DevMajor: st.Dev_major, DevMinor: st.Dev_minor,
	}}
	c.body = fusewire.Put(c.room(fusewire.StatxOutSize), &out)
	return 0
}

func sxTime(t unix.StatxTimestamp) fusewire.SxTime {
	return fusewire.SxTime{Sec: t.Sec, Nsec: t.Nsec}
}

// opAccess is for guests without default_permissions. Supplementary groups of
// the caller are not known here.
func (c *call) opAccess() errno {
	var in fusewire.AccessIn
	fusewire.Decode(c.args, &in)
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	if in.Mask&^7 != 0 {
		return unix.EINVAL
	}
	if c.s.readonly && in.Mask&unix.W_OK != 0 {
		return unix.EROFS
	}
	var a fusewire.Attr
	if err := c.attr(n, &a); err != 0 {
		return err
	}
	if !permitted(&a, c.h.UID, c.h.GID, in.Mask) {
		return unix.EACCES
	}
	return 0
}

// permitted reports whether the mode lets a user do what mask (R_OK, W_OK,
// X_OK) asks.
func permitted(a *fusewire.Attr, uid, gid, mask uint32) bool {
	have := a.Mode & 7
	switch {
	case uid == 0:
		have = unix.R_OK | unix.W_OK
		if a.Mode&0o111 != 0 || a.Mode&unix.S_IFMT == unix.S_IFDIR {
			have |= unix.X_OK
		}
	case uid == a.UID:
		have = a.Mode >> 6 & 7
	case gid == a.GID:
		have = a.Mode >> 3 & 7
	}
	return mask&^have == 0
}

func (c *call) opStatfs() errno {
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	var st unix.Statfs_t
	if err := unix.Fstatfs(n.fd, &st); err != nil {
		return err.(errno)
	}
	out := fusewire.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Namelen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}
	if c.s.quota.counts(n) {
		c.s.quota.limitSpace(&out)
	}
	c.body = fusewire.Put(c.room(fusewire.Size[fusewire.StatfsOut]()), &out)
	return 0
}
