package fuseserver

import (
	"hash/maphash"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func (c *call) opLookup() errno {
	name, _, err := fusewire.TakeLookupName(c.args)
	if err != 0 {
		return err
	}
	dir, err := c.dir()
	if err != 0 {
		return err
	}
	var out fusewire.EntryOut
	n, err := c.lookup(dir, name, &out.Attr)
	dir.drop()
	if err != 0 {
		return err
	}
	c.replyEntry(n, &out)
	n.drop()
	return 0
}

// lookup finds a name in a directory. The inode returned has been counted
// once for the guest and is held for the caller; a is what the guest sees.
//
// "." is the directory itself; ".." is answered for the root alone, so that
// the host is never asked for a parent: a directory that was moved out of the
// share has one that the guest must not see.
func (c *call) lookup(dir *inode, name judged, a *fusewire.Attr) (*inode, errno) {
	if name.IsDot() || name.IsDotDot() {
		if name.IsDotDot() && dir.id != rootID {
			return nil, unix.EINVAL
		}
		if n := c.se.nodes.known(dir.key); n != nil {
			return c.finish(n, a, c.hostAttr(n, a))
		}
		return nil, unix.ESTALE
	}
	return c.find(dir, name, a)
}

// find is lookup for ordinary names. For an inode that the table has, a stat
// of the name is enough; for a new one, opening it at once saves that stat.
// The queue's hints, and how the last names without a hint turned out, say
// which is more likely; either way works for both.
func (c *call) find(dir *inode, name judged, a *fusewire.Attr) (*inode, errno) {
	mark := hintOf(dir, name)
	hint := &c.hints[mark%hintSlots]
	hinted := *hint == mark
	if !hinted && c.unhinted.new() && c.s.fds.Load() < c.s.nodeBudget {
		n, err := c.meet(dir, name, a)
		if err == 0 {
			c.unhinted.was(c.fresh)
			if !c.fresh {
				*hint = mark
			}
		}
		return n, err
	}
	// What was looked up before is in memory: this does not sleep.
	if err := statxAt(dir.quick && hinted, dir.fd, name.Ptr(), &c.stx); err != 0 {
		return nil, err
	}
	n := c.se.nodes.known(identityOf(&c.stx))
	if !hinted {
		c.unhinted.was(n == nil)
	}
	if n == nil {
		if hinted {
			*hint = 0
		}
		return c.meet(dir, name, a)
	}
	*hint = mark
	attrFromStatx(a, &c.stx)
	return c.finish(n, a, 0)
}

const hintSlots = 1024

// guess is whether names without a hint are expected to be new: it follows the
// majority of the last few.
type guess int8

func (g guess) new() bool { return g >= 0 }

// was takes in what a name turned out to be.
func (g *guess) was(new bool) {
	if new {
		*g = min(*g+1, 3)
	} else {
		*g = max(*g-1, -4)
	}
}

var hintSeed = maphash.MakeSeed()

func hintOf(dir *inode, name judged) uint64 {
	return maphash.Bytes(hintSeed, name.Bytes()) ^ dir.id*0x9e3779b97f4a7c15
}

// meet is find for an inode that is probably not known yet.
func (c *call) meet(dir *inode, name judged, a *fusewire.Attr) (*inode, errno) {
	n, err := c.pin(dir, name, a)
	if err != 0 {
		return nil, err
	}
	return c.finish(n, a, 0)
}

// finish turns the host attributes in a into the guest's and takes the lookup
// back if that, or what came before it, failed.
func (c *call) finish(n *inode, a *fusewire.Attr, err errno) (*inode, errno) {
	if err == 0 {
		err = c.virtual(n, a)
	}
	if err != 0 {
		c.forsake(n)
		return nil, err
	}
	return n, 0
}

// forsake takes back a lookup that the guest will not hear of.
func (c *call) forsake(n *inode) {
	c.se.nodes.forget(n.id, 1)
	n.drop()
}

// pin opens a name as an inode, with its host attributes in a.
func (c *call) pin(dir *inode, name judged, a *fusewire.Attr) (*inode, errno) {
	if !c.s.reserve(c.s.nodeBudget) {
		return nil, unix.ENFILE
	}
	fd, err := openat(dir.fd, name.Ptr(), unix.O_PATH|unix.O_NOFOLLOW, 0)
	if err != 0 {
		c.s.release()
		return nil, err
	}
	return c.adopt(dir, fd, a, false)
}

// pinFile is pin for a file just made, through its descriptor: nobody can
// have put something else in the place of its name.
func (c *call) pinFile(dir *inode, file int, a *fusewire.Attr) (*inode, errno) {
	if !c.s.reserve(c.s.nodeBudget) {
		return nil, unix.ENFILE
	}
	fd, err := openat(c.s.proc, c.procName(file), unix.O_PATH, 0)
	if err != 0 {
		c.s.release()
		return nil, err
	}
	return c.adopt(dir, fd, a, true)
}

// adopt makes an O_PATH descriptor, already charged to the budget, the inode
// of a node, or finds that the node exists. dir is the parent. ours says that the
// file was just made here, perhaps without a name.
func (c *call) adopt(dir *inode, fd int, a *fusewire.Attr, ours bool) (*inode, errno) {
	if err := statxFd(fd, statxMask, &c.stx); err != 0 {
		closeFd(fd)
		c.s.release()
		return nil, err
	}
	if c.spare == nil {
		c.spare = new(inode)
	}
	n := c.spare
	c.s.setInode(n, c.s.lastID.Add(1), fd, &c.stx)
	counted := c.s.quota.pinned(n)
	if counted {
		// From here on who takes the last name knows that we have it open.
		c.s.quota.pin(n.key.ino)
	}
	n.submount = n.isDir() && (n.key.mnt != dir.key.mnt || n.key.dev != dir.key.dev)
	got := c.se.nodes.add(n)
	c.fresh = got == n
	if c.fresh {
		c.spare = nil
	} else {
		if counted {
			c.s.quota.unpin(n.key.ino)
		}
		closeFd(fd)
		c.s.release()
	}
	if counted && c.fresh && !ours {
		// Before it was in the table, another server's question for what is open here
		// was answered without it.
		if fstat(n.quick, fd, &c.st) != 0 || c.st.Nlink == 0 {
			c.forsake(n)
			return nil, unix.ENOENT
		}
	}
	if got == nil {
		return nil, unix.ESTALE
	}
	attrFromStatx(a, &c.stx)
	return got, 0
}

// replyEntry makes an entry the reply. out holds the attributes.
func (c *call) replyEntry(n *inode, out *fusewire.EntryOut) {
	c.fillEntry(n, out)
	c.body = fusewire.Put(c.reply[replySize:], out)
}

func (c *call) fillEntry(n *inode, out *fusewire.EntryOut) {
	out.NodeID = n.id
	out.EntryValid, out.EntryValidNsec = c.s.valid.sec, c.s.valid.nsec
	out.AttrValid, out.AttrValidNsec = c.s.valid.sec, c.s.valid.nsec
}

func (c *call) opForget() errno {
	var in fusewire.ForgetIn
	fusewire.Decode(c.args, &in)
	c.forget(c.h.NodeID, in.Nlookup)
	return 0
}

// opBatchForget believes the bytes that are there, not the count.
func (c *call) opBatchForget() errno {
	var in fusewire.BatchForgetIn
	rest, _ := fusewire.Decode(c.args, &in)
	for range in.Count {
		var one fusewire.ForgetOne
		var ok bool
		if rest, ok = fusewire.Decode(rest, &one); !ok {
			break
		}
		c.forget(one.NodeID, one.Nlookup)
	}
	return 0
}

func (c *call) forget(id, lookups uint64) {
	if !c.se.nodes.forget(id, lookups) {
		c.s.logf("guest forgot node %d more often than it looked it up", id)
	}
}
