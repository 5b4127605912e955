package fuseserver

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// haveXattrat reports whether attributes of an O_PATH descriptor can be
// reached in one call through its name in /proc/self/fd.
func haveXattrat(proc, fd int) bool {
	c := call{}
	_, err := getxattrat(&c.xargs, proc, c.procName(fd), &overlayName[0], nil)
	switch err {
	case unix.ENOSYS, unix.EPERM, unix.EBADF, unix.EINVAL:
		return false
	}
	return true
}

// The four node calls work on regular files and directories only, because
// nothing else has attributes of the user namespace. Without the *xattrat
// calls they open the inode.

func (c *call) nodeGetxattr(n *inode, name *byte, b []byte) (int, errno) {
	if !n.openable() {
		return 0, unix.EOPNOTSUPP
	}
	if c.s.xattrat {
		return getxattrat(&c.xargs, c.s.proc, c.procName(n.fd), name, b)
	}
	fd, err := c.openForXattr(n)
	if err != 0 {
		return 0, err
	}
	defer closeFd(fd)
	return fgetxattr(fd, name, b)
}

func (c *call) nodeSetxattr(n *inode, name *byte, b []byte, flags uint32) errno {
	if !n.openable() {
		return unix.EPERM
	}
	if c.s.xattrat {
		return setxattrat(&c.xargs, c.s.proc, c.procName(n.fd), name, b, flags)
	}
	fd, err := c.openForXattr(n)
	if err != 0 {
		return err
	}
	defer closeFd(fd)
	return fsetxattr(fd, name, b, flags)
}

func (c *call) nodeListxattr(n *inode, b []byte) (int, errno) {
	if !n.openable() {
		return 0, 0
	}
	if c.s.xattrat {
		return listxattrat(c.s.proc, c.procName(n.fd), b)
	}
	fd, err := c.openForXattr(n)
	if err != 0 {
		return 0, err
	}
	defer closeFd(fd)
	return flistxattr(fd, b)
}

func (c *call) nodeRemovexattr(n *inode, name *byte) errno {
	if !n.openable() {
		return unix.EPERM
	}
	if c.s.xattrat {
		return removexattrat(c.s.proc, c.procName(n.fd), name)
	}
	fd, err := c.openForXattr(n)
	if err != 0 {
		return err
	}
	defer closeFd(fd)
	return fremovexattr(fd, name)
}

// openForXattr opens for reading, or for writing a file that cannot be read:
// the kernel judges attribute calls by the inode, not by the descriptor.
func (c *call) openForXattr(n *inode) (int, errno) {
	fd, err := c.openNode(n, unix.O_RDONLY)
	if err == unix.EACCES && n.format == unix.S_IFREG {
		return c.openNode(n, unix.O_WRONLY)
	}
	return fd, err
}

var userPrefix = []byte("user.")

// takeXattrName judges an attribute's name. Attributes outside the user
// namespace are not the guest's: they mean something to the host kernel.
// Those of the reserved prefix do not exist (ENODATA to readers, EPERM to
// writers).
func takeXattrName(b []byte) (name, rest []byte, reserved bool, err errno) {
	name, rest, err = fusewire.TakeString(b, fusewire.NameMax)
	switch {
	case err == unix.ENAMETOOLONG, err == unix.ENOENT:
		return nil, nil, false, unix.ERANGE
	case err != 0:
		return nil, nil, false, err
	case !bytes.HasPrefix(name, userPrefix):
		return nil, nil, false, unix.EOPNOTSUPP
	}
	return name, rest, bytes.HasPrefix(name, []byte(overlayPrefix)), 0
}

func (c *call) opSetxattr() errno {
	var in fusewire.SetxattrIn
	rest, _ := fusewire.Decode(c.args, &in)
	name, value, reserved, err := takeXattrName(rest)
	switch {
	case err != 0:
		return err
	case in.Size > fusewire.XattrSizeMax:
		return unix.E2BIG
	case uint64(len(value)) < uint64(in.Size) || in.Flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0:
		return unix.EINVAL
	case bytes.Equal(name, endWaitsName) && c.h.NodeID == rootID && c.h.UID == 0:
		return c.se.locks.endWaits(value[:in.Size])
	case reserved:
		return unix.EPERM
	}
	n, err := c.attributed()
	if err != 0 {
		return err
	}
	defer n.drop()
	done, err := c.changeXattrs(n, name, int(in.Size))
	if err != 0 {
		return err
	}
	defer done()
	return c.nodeSetxattr(n, &name[0], value[:in.Size], in.Flags)
}

func (c *call) opRemovexattr() errno {
	name, _, reserved, err := takeXattrName(c.args)
	if err != 0 {
		return err
	}
	if reserved {
		return unix.EPERM
	}
	n, err := c.attributed()
	if err != 0 {
		return err
	}
	defer n.drop()
	done, err := c.changeXattrs(n, nil, 0)
	if err != 0 {
		return err
	}
	defer done()
	return c.nodeRemovexattr(n, &name[0])
}

// attributed returns the node of a request that changes attributes, if what
// the guest sees can have any.
func (c *call) attributed() (*inode, errno) {
	n, err := c.node()
	if err != 0 {
		return nil, err
	}
	if f := n.virtualFormat(); f != unix.S_IFREG && f != unix.S_IFDIR {
		n.drop()
		return nil, unix.EPERM
	}
	return n, 0
}

func (c *call) opGetxattr() errno {
	var in fusewire.GetxattrIn
	rest, _ := fusewire.Decode(c.args, &in)
	name, _, reserved, err := takeXattrName(rest)
	if err != 0 {
		return err
	}
	if reserved {
		return unix.ENODATA
	}
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	b := c.room(fusewire.XattrSizeMax)
	size, err := c.nodeGetxattr(n, &name[0], b)
	if err != 0 {
		return err
	}
	return c.replyXattr(size, in.Size)
}

// opListxattr lists the names that the guest may use.
func (c *call) opListxattr() errno {
	var in fusewire.GetxattrIn
	fusewire.Decode(c.args, &in)
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	b := c.room(fusewire.XattrSizeMax)
	size, err := c.nodeListxattr(n, b)
	if err == unix.EOPNOTSUPP {
		size, err = 0, 0
	}
	if err != 0 {
		return err
	}
	return c.replyXattr(visibleNames(b[:size]), in.Size)
}

// visibleNames moves the names that the guest may see to the front and
// returns their length.
func visibleNames(b []byte) int {
	kept := b[:0]
	for rest := b; len(rest) > 0; {
		i := bytes.IndexByte(rest, 0)
		if i < 0 {
			break
		}
		name := rest[:i+1]
		rest = rest[i+1:]
		if bytes.HasPrefix(name, userPrefix) && !bytes.HasPrefix(name, []byte(overlayPrefix)) {
			kept = append(kept, name...)
		}
	}
	return len(kept)
}

// replyXattr answers with the size if that was asked for, else with the first
// size bytes of the reply's body, which are there already.
func (c *call) replyXattr(size int, room uint32) errno {
	if room == 0 {
		out := fusewire.GetxattrOut{Size: uint32(size)}
		if c.outRoom() < fusewire.Size[fusewire.GetxattrOut]() {
			return unix.EINVAL
		}
		c.body = fusewire.Put(c.reply[replySize:], &out)
		return 0
	}
	if uint64(size) > uint64(room) || size > c.outRoom() {
		return unix.ERANGE
	}
	c.body = size
	return 0
}
