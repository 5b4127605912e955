package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
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
	return unlinkat(dir.fd, name.Ptr(), flags)
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
	return renameat2(dir.fd, from.Ptr(), target.fd, to.Ptr(), flags)
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
	if err := linkat(c.s.proc, c.procName(old.fd), dir.fd, name.Ptr(), unix.AT_SYMLINK_FOLLOW); err != 0 {
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
