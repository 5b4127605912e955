package fuseserver

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const (
	fattrOwner = fusewire.FattrUID | fusewire.FattrGID
	fattrTimes = fusewire.FattrAtime | fusewire.FattrMtime | fusewire.FattrAtimeNow | fusewire.FattrMtimeNow

	// slowTruncate is how many bytes freed at once are left to a worker.
	slowTruncate = 256 << 20
)

func (c *call) opSetattr() errno {
	var in fusewire.SetattrIn
	fusewire.Decode(c.args, &in)
	if err := checkSetattr(&in); err != 0 {
		return err
	}
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	if in.Valid&(fusewire.FattrMode|fattrOwner) != 0 {
		if err := c.setOwnerMode(n, &in); err != 0 {
			return err
		}
	}
	if in.Valid&fusewire.FattrSize != 0 {
		err := c.setSize(n, &in)
		if err != 0 || c.parked {
			return err
		}
	}
	if in.Valid&fattrTimes != 0 {
		if err := c.setTimes(n, &in); err != 0 {
			return err
		}
	}
	return c.replyAttr(n)
}

// checkSetattr refuses numbers that no kernel call may see.
func checkSetattr(in *fusewire.SetattrIn) errno {
	if in.Valid&fusewire.FattrSize != 0 && in.Size > math.MaxInt64 {
		return unix.EFBIG
	}
	for _, nsec := range []uint32{in.AtimeNsec, in.MtimeNsec, in.CtimeNsec} {
		if nsec >= 1e9 {
			return unix.EINVAL
		}
	}
	return 0
}

func (c *call) setOwnerMode(n *inode, in *fusewire.SetattrIn) errno {
	if c.s.virt == virtOff {
		return c.setHostOwnerMode(n, in)
	}
	if !n.openable() {
		return c.setBareOwnerMode(n, in)
	}
	mu := c.s.stripe(n)
	mu.Lock()
	defer mu.Unlock()
	var a fusewire.Attr
	if err := c.attr(n, &a); err != 0 {
		return err
	}
	v := overlay{a.UID, a.GID, a.Mode, a.Rdev}
	change(&v, in)
	if c.s.mirror && in.Valid&fusewire.FattrMode != 0 && (v.format() == unix.S_IFREG || v.format() == unix.S_IFDIR) {
		if err := fchmodat(c.s.proc, c.procName(n.fd), c.s.hostMode(v.mode)); err != 0 {
			return err
		}
	}
	err := c.writeOverlay(n, v)
	if err == unix.EOPNOTSUPP && c.s.virt == virtRelaxed && in.Valid&fattrOwner == 0 {
		return fchmodat(c.s.proc, c.procName(n.fd), v.mode&0o777|floorOf(n.format))
	}
	return err
}

// setBareOwnerMode is for what carries no overlay: real links and special
// files of the host. The owner of a link decides nothing, and programs that
// unpack archives set it on every link: that succeeds without effect. The rest
// is refused.
func (c *call) setBareOwnerMode(n *inode, in *fusewire.SetattrIn) errno {
	switch {
	case n.format == unix.S_IFLNK && in.Valid&fusewire.FattrMode == 0:
		return 0
	case n.format == unix.S_IFLNK:
		return unix.EOPNOTSUPP
	}
	return unix.EPERM
}

func change(v *overlay, in *fusewire.SetattrIn) {
	if in.Valid&fusewire.FattrMode != 0 {
		v.mode = v.format() | in.Mode&0o7777
	}
	if in.Valid&fattrOwner != 0 && v.format() != unix.S_IFDIR && in.Valid&fusewire.FattrMode == 0 {
		v.mode &^= privileged(v.mode)
	}
	if in.Valid&fusewire.FattrUID != 0 {
		v.uid = in.UID
	}
	if in.Valid&fusewire.FattrGID != 0 {
		v.gid = in.GID
	}
}

// setHostOwnerMode is setOwnerMode without an overlay. An ordinary user's
// server may not give files away (EPERM), keeps its own access to them and
// sets no set-id bits.
func (c *call) setHostOwnerMode(n *inode, in *fusewire.SetattrIn) errno {
	if in.Valid&fattrOwner != 0 {
		uid, gid := uint32(math.MaxUint32), uint32(math.MaxUint32)
		if in.Valid&fusewire.FattrUID != 0 {
			uid = in.UID
		}
		if in.Valid&fusewire.FattrGID != 0 {
			gid = in.GID
		}
		err := fchownFd(n.fd, uid, gid)
		if err == unix.EINVAL && !c.s.cfg.AsRoot {
			return unix.EPERM // an id that our user namespace does not have
		}
		if err != 0 {
			return err
		}
	}
	if in.Valid&fusewire.FattrMode == 0 {
		return 0
	}
	return fchmodat(c.s.proc, c.procName(n.fd), c.s.hostMode(n.format|in.Mode&0o7777))
}

// setSize truncates or extends; freeing much is left to a worker.
func (c *call) setSize(n *inode, in *fusewire.SetattrIn) errno {
	switch n.virtualFormat() {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return unix.EISDIR
	default:
		return unix.EINVAL
	}
	if err := fstat(n.quick, n.fd, &c.st); err != 0 {
		return err
	}
	if uint64(c.st.Size) > in.Size && uint64(c.st.Size)-in.Size > slowTruncate && c.later() {
		return 0
	}
	if in.Valid&fusewire.FattrKillSuidgid != 0 {
		if err := c.killPrivileges(n); err != 0 {
			return err
		}
	}
	var h *handle
	if in.Valid&fusewire.FattrFh != 0 {
		var err errno
		if h, err = c.se.handles.get(in.Fh, n.id, false); err != 0 {
			return err
		}
		defer h.drop() // after the change: closing it ends a lease, for which the file must be let go of
	}
	z, err := c.changeSize(n, n.fd)
	if err != 0 {
		return err
	}
	if err := z.grow(in.Size); err != 0 {
		z.abandon()
		return err
	}
	defer z.done(c)
	return c.truncate(n, h, in.Size)
}

// truncate is setSize after everything has been judged; h may be nil.
func (c *call) truncate(n *inode, h *handle, size uint64) errno {
	if h != nil {
		err := ftruncate(h.fd, size)
		if err != unix.EINVAL && err != unix.EBADF { // those say: not open for writing
			return err
		}
	}
	fd, err := c.openNode(n, unix.O_WRONLY)
	if err != 0 {
		return err
	}
	defer closeFd(fd)
	return ftruncate(fd, size)
}

// setTimes sets times to the nanosecond, of links too.
func (c *call) setTimes(n *inode, in *fusewire.SetattrIn) errno {
	c.times[0] = timespec(in.Valid, fusewire.FattrAtime, fusewire.FattrAtimeNow, in.Atime, in.AtimeNsec)
	c.times[1] = timespec(in.Valid, fusewire.FattrMtime, fusewire.FattrMtimeNow, in.Mtime, in.MtimeNsec)
	return utimensat(c.s.proc, c.procName(n.fd), &c.times)
}

func timespec(valid, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case valid&set != 0:
		return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
	}
	return unix.Timespec{Nsec: unix.UTIME_OMIT}
}
