package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

func (c *call) opUnlink() errno { return c.remove(0) }

func (c *call) opRmdir() errno { return c.remove(unix.AT_REMOVEDIR) }

func (c *call) remove(flags int) errno {
	name, _, err := fusewire.TakeName(c.args)
	if err != 0 {
		return err
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	x, err := c.takeName(dir, nil, dir, name)
	if err != 0 {
		return err
	}
	defer x.done()
	if err := unlinkat(dir.fd, name.Ptr(), flags); err != 0 {
		return err
	}
	x.lost()
	return 0
}

func (c *call) opRename() errno {
	var in fusewire.RenameIn
	rest, _ := fusewire.Decode(c.args, &in)
	return c.rename(in.NewDir, 0, rest)
}

// opRename2 refuses RENAME_WHITEOUT: it would make a device on the host.
func (c *call) opRename2() errno {
	var in fusewire.Rename2In
	rest, _ := fusewire.Decode(c.args, &in)
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return unix.EINVAL
	}
	return c.rename(in.NewDir, in.Flags, rest)
}

func (c *call) rename(newDir uint64, flags uint32, names []byte) errno {
	from, rest, err := fusewire.TakeName(names)
	if err != 0 {
		return err
	}
	to, _, err := fusewire.TakeName(rest)
	if err != 0 {
		return err
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	target, err := c.dirByID(newDir)
	if err != 0 {
		return err
	}
	defer target.drop()
	var x *nameChange
	if flags == 0 {
		if x, err = c.takeName(dir, target, target, to); err != 0 {
			return err
		}
	} else {
		x = c.changeNames(dir, target, 0)
	}
	defer x.done()
	if err := x.grow(target, to, ledger.Delta{}); err != 0 {
		return err
	}
	if err := renameat2(dir.fd, from.Ptr(), target.fd, to.Ptr(), flags); err != 0 {
		return err
	}
	x.lost()
	return 0
}

// linkNode makes the name of a node. The first one of a file made without costs
// nothing: it has been charged.
func (c *call) linkNode(old, dir *inode, name judged) errno {
	x := c.changeNames(dir, nil, old.key.ino)
	defer x.done()
	one := ledger.Delta{Inodes: 1}
	if err := x.grow(dir, name, one); err != 0 {
		return err
	}
	err := linkat(c.s.proc, c.procName(old.fd), dir.fd, name.Ptr(), unix.AT_SYMLINK_FOLLOW)
	if err == 0 && x != nil && x.q.w.Named(old.key.ino) {
		one.Inodes = 0
	}
	x.made(dir, name, one, err)
	return err
}

// opLink gives a node another name. The descriptor is named through
// /proc/self/fd, because linking it directly needs CAP_DAC_READ_SEARCH.
func (c *call) opLink() errno {
	var in fusewire.LinkIn
	rest, _ := fusewire.Decode(c.args, &in)
	name, _, err := fusewire.TakeName(rest)
	if err != 0 {
		return err
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	defer dir.drop()
	old, err := c.nodeByID(in.OldNodeID)
	if err != 0 {
		return err
	}
	defer old.drop()
	if err := c.linkNode(old, dir, name); err != 0 {
		return err
	}
	n := c.se.nodes.known(old.key)
	if n == nil { // forgotten by the guest meanwhile
		return unix.ESTALE
	}
	var out fusewire.EntryOut
	n, err = c.finish(n, &out.Attr, c.hostAttr(n, &out.Attr))
	if err != 0 {
		return err
	}
	c.replyEntry(n, &out)
	n.drop()
	return 0
}
