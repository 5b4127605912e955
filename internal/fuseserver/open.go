package fuseserver

import (
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const (
	// openSafely goes with every open: nothing waits for a peer and no
	// terminal becomes ours, even if the type check were wrong.
	openSafely = unix.O_NONBLOCK | unix.O_NOCTTY

	// maxDirs bounds open directory handles, and with them listing buffers.
	maxDirs = 1024
)

// openFlags turns the guest's flags into the host's. Passed on are the access
// mode and O_TRUNC. O_APPEND and O_SYNC travel with every WRITE; O_DIRECT,
// O_NOATIME and the rest are the guest kernel's business.
func openFlags(flags uint32) (int, errno) {
	if flags&(unix.O_PATH|unix.O_TMPFILE&^unix.O_DIRECTORY|unix.O_CREAT) != 0 || flags&unix.O_ACCMODE == unix.O_ACCMODE {
		return 0, unix.EINVAL
	}
	return int(flags & (unix.O_ACCMODE | unix.O_TRUNC)), 0
}

// openNode opens what an O_PATH descriptor holds.
func (c *call) openNode(n *inode, flags int) (int, errno) {
	if !n.openable() {
		return -1, unix.EPERM
	}
	return openat(c.s.proc, c.procName(n.fd), flags|openSafely, 0)
}

// openFile opens a regular file for a handle. kill holds OpenKillSuidgid.
func (c *call) openFile(n *inode, flags int, kill uint32) (int, errno) {
	if flags&unix.O_TRUNC != 0 && kill&fusewire.OpenKillSuidgid != 0 {
		if err := c.killPrivileges(n); err != 0 {
			return -1, err
		}
	}
	if flags&unix.O_TRUNC != 0 {
		z, err := c.changeSize(n, n.fd)
		if err != 0 {
			return -1, err
		}
		defer z.done(c)
	}
	if c.s.readonly {
		fd, err := c.openNode(n, flags|unix.O_NOATIME)
		if err != unix.EPERM {
			return fd, err
		}
	}
	return c.openNode(n, flags)
}

func (c *call) opOpen() errno {
	var in fusewire.OpenIn
	fusewire.Decode(c.args, &in)
	if c.s.readonly && (in.Flags&unix.O_ACCMODE != unix.O_RDONLY || in.Flags&(unix.O_TRUNC|unix.O_CREAT) != 0) {
		return unix.EROFS
	}
	flags, err := openFlags(in.Flags)
	if err != 0 {
		return err
	}
	n, err := c.node()
	if err != 0 {
		return err
	}
	defer n.drop()
	switch n.virtualFormat() {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return unix.EISDIR
	case unix.S_IFLNK:
		return unix.ELOOP
	default:
		return unix.ENXIO
	}
	if flags&unix.O_TRUNC != 0 {
		if err := fstat(n.quick, n.fd, &c.st); err != 0 {
			return err
		}
		if c.st.Size > slowTruncate && c.later() {
			return 0
		}
	}
	if !c.s.reserve(c.s.budget) {
		return unix.ENFILE
	}
	fd, err := c.openFile(n, flags, in.OpenFlags)
	return c.replyOpen(n, fd, in.Flags, false, err)
}

func (c *call) opOpendir() errno {
	n, err := c.dir()
	if err != 0 {
		return err
	}
	defer n.drop()
	if c.se.handles.dirs.Load() >= maxDirs || !c.s.reserve(c.s.budget) {
		return unix.ENFILE
	}
	fd, err := c.openNode(n, unix.O_RDONLY|unix.O_DIRECTORY)
	return c.replyOpen(n, fd, 0, true, err)
}

// replyOpen makes a descriptor charged to the budget a handle, or gives the
// charge back if opening failed.
func (c *call) replyOpen(n *inode, fd int, flags uint32, dir bool, err errno) errno {
	if err != 0 {
		c.s.release()
		return err
	}
	h := c.newHandle(n, fd, flags, dir)
	if h == nil {
		closeFd(fd)
		c.s.release()
		return unix.ESTALE
	}
	out := fusewire.OpenOut{Fh: h.id, OpenFlags: c.s.fileFlags()}
	if dir {
		out.OpenFlags = c.s.dirFlags()
	}
	c.body = fusewire.Put(c.reply[replySize:], &out)
	return 0
}

// newHandle binds a descriptor to a node; nil if the session has ended.
func (c *call) newHandle(n *inode, fd int, flags uint32, dir bool) *handle {
	h := &handle{id: c.s.lastID.Add(1), node: n.hold(), fd: fd, sync: syncFlags(flags)}
	if dir {
		h.dir, h.dirs = &listing{}, &c.se.handles.dirs
		h.dirs.Add(1)
	}
	if !c.se.handles.add(h) {
		if dir {
			h.dirs.Add(-1)
		}
		n.drop()
		return nil
	}
	return h
}

// syncFlags are the pwritev2 flags that O_SYNC and O_DSYNC mean.
func syncFlags(flags uint32) uintptr {
	switch {
	case flags&unix.O_SYNC == unix.O_SYNC:
		return rwfSync | rwfDsync
	case flags&unix.O_DSYNC != 0:
		return rwfDsync
	}
	return 0
}

// fileFlags and dirFlags tell the guest what to do with its page cache.
func (s *Server) fileFlags() uint32 {
	switch s.cache {
	case cacheNone:
		return fusewire.FopenDirectIO
	case cacheAlways:
		return fusewire.FopenKeepCache
	}
	return 0
}

func (s *Server) dirFlags() uint32 {
	if s.cache == cacheAlways {
		return fusewire.FopenKeepCache | fusewire.FopenCacheDir
	}
	return 0
}

func (c *call) opRelease() errno { return c.releaseHandle(false) }

func (c *call) opReleasedir() errno { return c.releaseHandle(true) }

func (c *call) releaseHandle(dir bool) errno {
	var in fusewire.ReleaseIn
	fusewire.Decode(c.args, &in)
	if !dir && !c.s.readonly {
		if h, err := c.se.handles.get(in.Fh, c.h.NodeID, false); err == 0 {
			c.se.locks.release(h)
			h.drop()
		}
	}
	return c.se.handles.remove(in.Fh, c.h.NodeID, dir)
}

// opFlush has nothing to flush: every WRITE has reached the host's page cache.
// It is never refused, because it says that a process has closed one of its
// files, which drops its POSIX locks on that inode.
func (c *call) opFlush() errno {
	var in fusewire.FlushIn
	fusewire.Decode(c.args, &in)
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, false)
	if err == 0 {
		c.se.locks.flush(h.node.id, in.LockOwner)
		h.drop()
	}
	return err
}

func (c *call) opFsync() errno { return c.fsync(false) }

func (c *call) opFsyncdir() errno { return c.fsync(true) }

func (c *call) fsync(dir bool) errno {
	var in fusewire.FsyncIn
	fusewire.Decode(c.args, &in)
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, dir)
	if err != 0 {
		return err
	}
	defer h.drop()
	if c.later() {
		return 0
	}
	trap := uintptr(unix.SYS_FSYNC)
	if in.Flags&fusewire.FsyncDatasync != 0 {
		trap = unix.SYS_FDATASYNC
	}
	_, err = sys(trap, uintptr(h.fd), 0, 0, 0, 0, 0)
	return err
}

// opSyncfs syncs the share's whole file system, as the host has no smaller unit.
func (c *call) opSyncfs() errno {
	if c.s.readonly || c.later() {
		return 0
	}
	fd, err := openat(c.s.root, &dot[0], unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != 0 {
		return err
	}
	defer closeFd(fd)
	_, err = sys(unix.SYS_SYNCFS, uintptr(fd), 0, 0, 0, 0, 0)
	return err
}
