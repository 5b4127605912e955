package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

func (c *call) opMkdir() errno {
	var in fusewire.MkdirIn
	rest, _ := fusewire.Decode(c.args, &in)
	return c.make(rest, unix.S_IFDIR|in.Mode&0o7777, func(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
		if err := mkdirat(dir.fd, name.Ptr(), c.s.hostMode(v.mode)&0o1777); err != 0 {
			return nil, err
		}
		return c.claim(dir, name, v, a)
	}, ledger.Delta{Bytes: ledger.Block, Inodes: 1})
}

func (c *call) opMknod() errno {
	var in fusewire.MknodIn
	rest, _ := fusewire.Decode(c.args, &in)
	one := ledger.Delta{Inodes: 1}
	mode := in.Mode & (unix.S_IFMT | 0o7777)
	if mode&unix.S_IFMT == 0 {
		mode |= unix.S_IFREG
	}
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return c.make(rest, mode, c.makeFile, one)
	case unix.S_IFIFO, unix.S_IFSOCK:
		if c.s.virt == virtOff {
			return c.make(rest, mode, c.makeSpecial, one)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if c.s.virt == virtOff {
			return unix.EPERM // never a device on the host
		}
	default:
		return unix.EINVAL
	}
	return c.make(rest, mode, func(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
		v.rdev = in.Rdev
		return c.makeStandIn(dir, name, v, nil, a)
	}, one)
}

func (c *call) opSymlink() errno {
	name, rest, err := fusewire.TakeName(c.args)
	if err != 0 {
		return err
	}
	target, _, err := fusewire.TakeString(rest, fusewire.SymlinkMax)
	if err != 0 {
		return err
	}
	return c.makeNamed(name, unix.S_IFLNK|0o777, func(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
		if c.s.virt == virtStrict {
			return c.makeStandIn(dir, name, v, target[:len(target)-1], a)
		}
		if err := symlinkat(target, dir.fd, name.Ptr()); err != 0 {
			return nil, err
		}
		return c.claim(dir, name, v, a)
	}, ledger.Delta{Bytes: ledger.Rules{}.Link(int64(len(target) - 1)), Inodes: 1})
}

// maker makes one thing in a directory and returns its node, counted and
// held, with what the guest sees of it in a.
type maker func(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno)

// make takes the name at the start of args, runs the maker and answers.
func (c *call) make(args []byte, mode uint32, m maker, cost ledger.Delta) errno {
	name, _, err := fusewire.TakeName(args)
	if err != 0 {
		return err
	}
	return c.makeNamed(name, mode, m, cost)
}

// makeNamed charges cost for the new thing, and what its directory grows by.
func (c *call) makeNamed(name judged, mode uint32, m maker, cost ledger.Delta) errno {
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	if c.s.fds.Load() >= c.s.nodeBudget { // before anything is made
		return unix.ENFILE
	}
	v, err := c.newOwner(dir, mode)
	if err != 0 {
		return err
	}
	var out fusewire.EntryOut
	var n *inode
	x := c.changeNames(dir, nil, 0)
	acl := c.s.quota.inherits(c, dir, mode&unix.S_IFMT == unix.S_IFDIR)
	if err = x.room(dir, name, cost.Plus(ledger.Delta{Bytes: acl})); err == 0 {
		n, err = m(dir, name, v, &out.Attr)
	}
	cost.Bytes += c.s.quota.inherited(c, n, acl)
	x.made(dir, name, cost, err)
	x.done()
	if err != 0 {
		return err
	}
	c.replyEntry(n, &out)
	n.drop()
	return 0
}

// makeFile is a maker of regular files.
func (c *call) makeFile(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
	fd, err := c.newFile(dir, name, unix.O_WRONLY, v)
	if err != 0 {
		return nil, err
	}
	defer closeFd(fd)
	n, err := c.pinFile(dir, fd, a)
	return c.settle(n, v, a, err)
}

// makeSpecial is a maker of real FIFOs and sockets.
func (c *call) makeSpecial(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
	if err := mknodat(dir.fd, name.Ptr(), v.format()|c.s.hostMode(v.mode)&0o1777); err != 0 {
		return nil, err
	}
	return c.claim(dir, name, v, a)
}

// claim turns a name just made without a descriptor into a node and gives it
// its owner. Somebody else may have put another thing in its place meanwhile:
// what does not look freshly made by the server is left alone.
func (c *call) claim(dir *inode, name judged, v overlay, a *fusewire.Attr) (*inode, errno) {
	n, err := c.pin(dir, name, a)
	if err != 0 {
		return nil, err
	}
	if n.format != v.format() || a.UID != c.s.uid || !n.isDir() && a.Nlink != 1 {
		c.forsake(n)
		return nil, unix.ESTALE
	}
	if err := c.imprintNode(n, v); err != 0 {
		c.forsake(n)
		if v.format() == unix.S_IFDIR {
			_ = unlinkat(dir.fd, name.Ptr(), unix.AT_REMOVEDIR)
		}
		return nil, err
	}
	return c.finish(n, a, c.hostAttr(n, a))
}

// imprintNode is imprint through an O_PATH descriptor.
func (c *call) imprintNode(n *inode, v overlay) errno {
	switch {
	case c.s.virt != virtOff:
		if !n.openable() { // a real link under "relaxed"
			return 0
		}
		err := c.writeOverlay(n, v)
		if err == unix.EOPNOTSUPP && c.s.virt == virtRelaxed {
			return 0
		}
		return err
	case !c.s.cfg.AsRoot:
		return 0
	}
	if v.uid != 0 || v.gid != 0 {
		if err := fchownFd(n.fd, v.uid, v.gid); err != 0 {
			return err
		}
	}
	if v.format() == unix.S_IFDIR && v.mode&unix.S_ISGID != 0 { // chown may clear it
		return fchmodat(c.s.proc, c.procName(n.fd), v.mode&0o7777)
	}
	return 0
}

// makeStandIn makes a regular file whose overlay says that it is something
// else. It gets its name last, so that nobody ever sees it half made.
func (c *call) makeStandIn(dir *inode, name judged, v overlay, content []byte, a *fusewire.Attr) (*inode, errno) {
	fd, err := openNameless(dir, unix.O_WRONLY, 0o600)
	named := err == unix.EOPNOTSUPP || err == unix.EISDIR || err == unix.ENOENT
	if named { // a file system without nameless files
		fd, err = openat(dir.fd, name.Ptr(), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|openSafely, 0o600)
	}
	if err != 0 {
		return nil, err
	}
	defer closeFd(fd)
	var n *inode
	if err = c.fillStandIn(fd, v, content); err == 0 && !named {
		err = linkat(c.s.proc, c.procName(fd), dir.fd, name.Ptr(), unix.AT_SYMLINK_FOLLOW)
	}
	if err == 0 {
		n, err = c.pinFile(dir, fd, a)
	} else if named {
		_ = unlinkat(dir.fd, name.Ptr(), 0)
	}
	if err == 0 {
		n.ov.store(a, overlayPresent, v)
	}
	return c.settle(n, v, a, err)
}

func (c *call) fillStandIn(fd int, v overlay, content []byte) errno {
	if len(content) > 0 {
		n, err := unix.Pwrite(fd, content, 0)
		if err != nil {
			return err.(errno)
		}
		if n < len(content) {
			return unix.ENOSPC
		}
	}
	return fsetxattr(fd, &overlayName[0], v.encode(c.xattr[:]), 0)
}

// opReadlink reads a real link, or the content of a stand-in.
func (c *call) opReadlink() errno {
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	b := c.room(min(c.outRoom(), fusewire.SymlinkMax))
	switch {
	case n.format == unix.S_IFLNK:
		c.body, err = readlinkFd(n.fd, b)
		return err
	case n.format != unix.S_IFREG || c.s.virt == virtOff || n.virtualFormat() != unix.S_IFLNK:
		return unix.EINVAL
	}
	fd, err := c.openNode(n, unix.O_RDONLY)
	if err != 0 {
		return err
	}
	defer closeFd(fd)
	got, perr := unix.Pread(fd, b, 0)
	if perr != nil {
		return perr.(errno)
	}
	c.body = got
	return 0
}
