package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// newOwner returns owner and mode, with its type bits, of something that the
// caller makes in dir, by the rules of a directory with the setgid bit: its
// group is inherited, by directories also the bit; a file does not keep a
// setgid bit for a group that its maker may not be in.
func (c *call) newOwner(dir *inode, mode uint32) (overlay, errno) {
	v := overlay{uid: c.h.UID, gid: c.h.GID, mode: mode}
	if c.s.virt == virtOff && (!c.s.cfg.AsRoot || v.uid == 0 && v.gid == 0) {
		return v, 0 // the host kernel does all this
	}
	var a fusewire.Attr
	if err := c.attr(dir, &a); err != 0 {
		return v, err
	}
	if a.Mode&unix.S_ISGID == 0 {
		return v, 0
	}
	v.gid = a.GID
	if v.format() == unix.S_IFDIR {
		v.mode |= unix.S_ISGID
	} else if v.uid != 0 && c.h.GID != v.gid && privileged(v.mode)&unix.S_ISGID != 0 {
		v.mode &^= unix.S_ISGID
	}
	return v, 0
}

// newFile makes a regular file that did not exist and gives it its owner.
func (c *call) newFile(dir *inode, name judged, flags int, v overlay) (int, errno) {
	fd, err := openat(dir.fd, name.Ptr(), flags|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|openSafely,
		c.s.hostMode(v.mode)&0o1777)
	if err != 0 {
		return -1, err
	}
	if err := c.imprint(fd, v); err != 0 {
		_ = unlinkat(dir.fd, name.Ptr(), 0)
		closeFd(fd)
		return -1, err
	}
	return fd, 0
}

// imprint gives a file just made its owner and mode, through the descriptor
// that made it. Its host mode has been set.
func (c *call) imprint(fd int, v overlay) errno {
	switch {
	case c.s.virt != virtOff:
		err := fsetxattr(fd, &overlayName[0], v.encode(c.xattr[:]), 0)
		if err == unix.EOPNOTSUPP && c.s.virt == virtRelaxed && v.format() == unix.S_IFREG {
			return 0 // it shows as the server's own
		}
		return err
	case !c.s.cfg.AsRoot:
		return 0
	}
	if v.uid != 0 || v.gid != 0 {
		return fchownFd(fd, v.uid, v.gid)
	}
	return 0
}

func (c *call) opCreate() errno {
	var in fusewire.CreateIn
	rest, _ := fusewire.Decode(c.args, &in)
	name, _, err := fusewire.TakeName(rest)
	if err != 0 {
		return err
	}
	flags, err := openFlags(in.Flags &^ (unix.O_CREAT | unix.O_EXCL))
	if err != 0 {
		return err
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	if !c.s.reserve(c.s.budget) { // for the handle
		return unix.ENFILE
	}
	err = c.create(dir, name, flags, &in)
	if err != 0 {
		c.s.release()
	}
	return err
}

// create makes a file or opens the one that is there. The handle has been
// charged to the budget.
func (c *call) create(dir *inode, name judged, flags int, in *fusewire.CreateIn) errno {
	var out fusewire.EntryOut
	v, err := c.newOwner(dir, unix.S_IFREG|in.Mode&0o7777)
	if err != 0 {
		return err
	}
	n, fd, err := c.createNew(dir, name, flags&^unix.O_TRUNC, v, &out.Attr)
	if err == unix.EEXIST && in.Flags&unix.O_EXCL == 0 {
		n, fd, err = c.openExisting(dir, name, flags, in, &out.Attr)
	}
	if err != 0 {
		return err
	}
	return c.replyCreate(n, fd, in.Flags, &out)
}

// createNew makes a regular file that did not exist, and its node.
func (c *call) createNew(dir *inode, name judged, flags int, v overlay, a *fusewire.Attr) (n *inode, fd int, err errno) {
	one := ledger.Delta{Inodes: 1}
	x := c.changeNames(dir, nil, 0)
	acl := c.s.quota.inherits(c, dir, false)
	defer func() {
		one.Bytes += c.s.quota.inherited(c, n, acl)
		x.made(dir, name, one, err)
		x.done()
	}()
	if err := x.room(dir, name, one.Plus(ledger.Delta{Bytes: acl})); err != 0 {
		return nil, -1, err
	}
	if fd, err = c.newFile(dir, name, flags, v); err != 0 {
		return nil, -1, err
	}
	n, err = c.pinFile(dir, fd, a)
	n, err = c.settle(n, v, a, err)
	if err != 0 {
		_ = unlinkat(dir.fd, name.Ptr(), 0)
		closeFd(fd)
	}
	return n, fd, err
}

// settle ends the making of a node whose overlay has been written as v.
func (c *call) settle(n *inode, v overlay, a *fusewire.Attr, err errno) (*inode, errno) {
	if err != 0 {
		return nil, err
	}
	if c.s.virt == virtStrict {
		// Nobody else knew the file before: what was written is there.
		n.ov.store(a, overlayPresent, v)
	}
	return c.finish(n, a, 0)
}

// replyCreate answers CREATE and TMPFILE; n is held and counted.
func (c *call) replyCreate(n *inode, fd int, flags uint32, out *fusewire.EntryOut) errno {
	h := c.newHandle(n, fd, flags, false)
	if h == nil {
		c.forsake(n)
		closeFd(fd)
		return unix.ESTALE
	}
	c.replyEntry(n, out)
	open := fusewire.OpenOut{Fh: h.id, OpenFlags: c.s.fileFlags()}
	c.body += fusewire.Put(c.reply[replySize+c.body:], &open)
	n.drop()
	return 0
}

// openExisting opens a file that appeared after the guest had found the name
// free. The guest has not checked whether the caller may: if the mode does
// not plainly say so, or it is not a plain file, ESTALE makes the guest look
// again and decide.
func (c *call) openExisting(dir *inode, name judged, flags int, in *fusewire.CreateIn, a *fusewire.Attr) (*inode, int, errno) {
	n, err := c.find(dir, name, a)
	if err != 0 {
		return nil, -1, err
	}
	if a.Mode&unix.S_IFMT != unix.S_IFREG || n.format != unix.S_IFREG ||
		!permitted(a, c.h.UID, c.h.GID, accessMask(in.Flags)) {
		c.forsake(n)
		return nil, -1, unix.ESTALE
	}
	fd, err := c.openFile(n, flags, in.OpenFlags)
	if err == 0 && flags&unix.O_TRUNC != 0 {
		err = c.attr(n, a)
		if err != 0 {
			closeFd(fd)
		}
	}
	if err != 0 {
		c.forsake(n)
		return nil, -1, err
	}
	return n, fd, 0
}

func accessMask(flags uint32) uint32 {
	mask := uint32(unix.R_OK)
	switch flags & unix.O_ACCMODE {
	case unix.O_WRONLY:
		mask = unix.W_OK
	case unix.O_RDWR:
		mask = unix.R_OK | unix.W_OK
	}
	if flags&unix.O_TRUNC != 0 {
		mask |= unix.W_OK
	}
	return mask
}

// opTmpfile makes a file without a name. The name in the request is what the
// guest's kernel happens to call it ("/"), and is not looked at.
func (c *call) opTmpfile() errno {
	var in fusewire.CreateIn
	fusewire.Decode(c.args, &in)
	flags, err := openFlags(in.Flags &^ (unix.O_CREAT | unix.O_EXCL | unix.O_TMPFILE))
	if err != 0 {
		return err
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return unix.EINVAL
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	if !c.s.reserve(c.s.budget) {
		return unix.ENFILE
	}
	err = c.tmpfile(dir, flags, &in)
	if err != 0 {
		c.s.release()
	}
	return err
}

func (c *call) tmpfile(dir *inode, flags int, in *fusewire.CreateIn) errno {
	v, err := c.newOwner(dir, unix.S_IFREG|in.Mode&0o7777)
	if err != 0 {
		return err
	}
	done, err := c.chargeNameless(dir)
	if err != 0 {
		return err
	}
	var out fusewire.EntryOut
	var n *inode
	defer func() { done(n) }()
	fd, err := openNameless(dir, flags, c.s.hostMode(v.mode)&0o1777)
	if err != 0 {
		return err
	}
	if err = c.imprint(fd, v); err == 0 {
		n, err = c.pinFile(dir, fd, &out.Attr)
		n, err = c.settle(n, v, &out.Attr, err)
	}
	if err != 0 {
		closeFd(fd)
		return err
	}
	return c.replyCreate(n, fd, in.Flags, &out)
}

var dot = [2]byte{'.'}

// openNameless makes a file without a name on dir's file system.
func openNameless(dir *inode, flags int, mode uint32) (int, errno) {
	return openat(dir.fd, &dot[0], flags&^unix.O_TRUNC|unix.O_TMPFILE|openSafely, mode)
}
