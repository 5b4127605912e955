package fuseserver

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// checkRange refuses ranges that reach beyond the largest offset.
func checkRange(off, size uint64) errno {
	if off > math.MaxInt64 || size > math.MaxInt64-off {
		return unix.EINVAL
	}
	return 0
}

// opRead reads straight into guest memory. On the queue it takes only what is
// in the page cache; the rest is read again, whole, by a worker.
func (c *call) opRead() errno {
	var in fusewire.ReadIn
	fusewire.Decode(c.args, &in)
	size := int(in.Size)
	if size > c.outRoom() {
		return unix.EINVAL
	}
	if err := checkRange(in.Offset, uint64(in.Size)); err != 0 {
		return err
	}
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, false)
	if err != 0 {
		return err
	}
	err = c.read(h, in.Offset, size)
	h.drop()
	return err
}

func (c *call) read(h *handle, off uint64, size int) errno {
	var got int
	var err errno
	patient := c.from == nil || h.waits.Load() && h.node.quick
	if !patient && !h.waits.Load() {
		got, err = c.readOnce(h.fd, off, size, rwfNowait)
		if err == 0 && (got == size || c.atEnd(h, off+uint64(got))) {
			c.direct = got
			return 0
		}
		if err == unix.EOPNOTSUPP {
			h.waits.Store(true)
			patient = h.node.quick // a local file system in memory: it does not wait
		} else if err != 0 && err != unix.EAGAIN {
			return err
		}
	}
	if !patient && c.later() {
		return 0
	}
	c.direct, err = c.readOnce(h.fd, off, size, 0)
	return err
}

// readOnce reads up to size bytes; less only at the end of the file, or when
// the rest is not at hand.
func (c *call) readOnce(fd int, off uint64, size int, flags uintptr) (got int, err errno) {
	return c.move(unix.SYS_PREADV2, c.out, replySize, fd, off, size, flags)
}

// move reads into guest memory, or writes from it, behind the first skip bytes
// of seg; an error counts only if nothing was moved.
func (c *call) move(trap uintptr, seg [][]byte, skip, fd int, off uint64, size int, flags uintptr) (done int, err errno) {
	for done < size {
		iov := c.iovecs(seg, skip+done, size-done)
		want := iovLen(iov)
		n, err := transfer(trap, fd, iov, off+uint64(done), flags)
		done += n
		if err != 0 && done == 0 {
			return 0, err
		}
		if err != 0 || n == 0 || n < want {
			break
		}
	}
	return done, 0
}

func (c *call) atEnd(h *handle, off uint64) bool {
	return fstat(h.node.quick, h.fd, &c.st) == 0 && uint64(c.st.Size) <= off
}

func iovLen(iov []unix.Iovec) int {
	n := 0
	for i := range iov {
		n += int(iov[i].Len)
	}
	return n
}

// opWrite writes straight from guest memory. What the bytes are does not
// matter, so they may change while they are written.
func (c *call) opWrite() errno {
	var in fusewire.WriteIn
	fusewire.Decode(c.args, &in)
	if uint64(in.Size) != uint64(c.h.Len)-headerSize-fusewire.WriteInSize {
		return unix.EINVAL
	}
	if err := checkRange(in.Offset, uint64(in.Size)); err != 0 {
		return err
	}
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, false)
	if err != 0 {
		return err
	}
	err = c.write(h, &in)
	h.drop()
	return err
}

func (c *call) write(h *handle, in *fusewire.WriteIn) errno {
	flags := h.sync | syncFlags(in.Flags)
	if flags != 0 && c.later() {
		return 0
	}
	// The open flags of this moment decide, not those of OPEN: fcntl may have
	// changed O_APPEND. Pages from the guest's cache know where they belong.
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fusewire.WriteCache == 0 {
		flags |= rwfAppend
	}
	if in.WriteFlags&fusewire.WriteKillSuidgid != 0 {
		if err := c.killPrivileges(h.node); err != 0 {
			return err
		}
	}
	var done int
	var err errno
	if c.s.quota.counts(h.node) {
		done, err = c.countedWrite(h, in.Offset, int(in.Size), flags)
	} else {
		done, err = c.writeAll(h.fd, in.Offset, int(in.Size), flags)
	}
	if err != 0 {
		return err
	}
	h.node.noteSize(in.Offset + uint64(done))
	out := fusewire.WriteOut{Size: uint32(done)}
	c.body = fusewire.Put(c.reply[replySize:], &out)
	return 0
}

// writeAll writes the payload.
func (c *call) writeAll(fd int, off uint64, size int, flags uintptr) (done int, err errno) {
	return c.move(unix.SYS_PWRITEV2, c.in, headerSize+fusewire.WriteInSize, fd, off, size, flags)
}

func (c *call) opLseek() errno {
	var in fusewire.LseekIn
	fusewire.Decode(c.args, &in)
	if in.Offset > math.MaxInt64 || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, false)
	if err != 0 {
		return err
	}
	defer h.drop()
	off, err := lseek(h.fd, in.Offset, in.Whence)
	if err != 0 {
		return err
	}
	out := fusewire.LseekOut{Offset: off}
	c.body = fusewire.Put(c.reply[replySize:], &out)
	return 0
}

func (c *call) opFallocate() errno {
	var in fusewire.FallocateIn
	fusewire.Decode(c.args, &in)
	if err := checkRange(in.Offset, in.Length); err != 0 {
		return unix.EFBIG
	}
	switch in.Mode {
	case 0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE,
		unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_ZERO_RANGE,
		unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE:
	default:
		return unix.EOPNOTSUPP
	}
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, false)
	if err != 0 {
		return err
	}
	defer h.drop()
	if c.later() {
		return 0
	}
	if c.h.UID != 0 {
		if err := c.killPrivileges(h.node); err != 0 {
			return err
		}
	}
	z, err := c.changeSize(h.node, h.fd)
	if err != 0 {
		return err
	}
	end := in.Offset + in.Length
	switch {
	case in.Mode&unix.FALLOC_FL_KEEP_SIZE == 0:
		err = z.grow(end)
	case in.Mode&unix.FALLOC_FL_PUNCH_HOLE == 0 && z.reserves(end):
		err = unix.EOPNOTSUPP
	}
	if err != 0 {
		z.abandon()
		return err
	}
	h.node.noteSize(end)
	err = fallocate(h.fd, in.Mode, in.Offset, in.Length)
	z.done(c)
	return err
}

// copyMax keeps the count of one COPY_FILE_RANGE within its 32-bit reply and
// a worker's turn short; the guest asks again for the rest.
const copyMax = 64 << 20

func (c *call) opCopyFileRange() errno {
	var in fusewire.CopyFileRangeIn
	fusewire.Decode(c.args, &in)
	if in.Flags != 0 {
		return unix.EINVAL
	}
	in.Len = min(in.Len, copyMax)
	if checkRange(in.OffIn, in.Len) != 0 || checkRange(in.OffOut, in.Len) != 0 {
		return unix.EFBIG
	}
	from, err := c.se.handles.get(in.FhIn, c.h.NodeID, false)
	if err != 0 {
		return err
	}
	defer from.drop()
	to, err := c.se.handles.get(in.FhOut, in.NodeIDOut, false)
	if err != 0 {
		return err
	}
	defer to.drop()
	if c.later() {
		return 0
	}
	if c.h.UID != 0 {
		if err := c.killPrivileges(to.node); err != 0 {
			return err
		}
	}
	z, err := c.changeSize(to.node, to.fd)
	if err != 0 {
		return err
	}
	if err = fstat(from.node.quick, from.fd, &c.st); err == 0 {
		// What is copied is what is charged, should the source grow meanwhile.
		in.Len = min(in.Len, max(uint64(c.st.Size), in.OffIn)-in.OffIn)
	}
	if err == 0 && in.Len > 0 {
		err = z.grow(in.OffOut + in.Len)
	}
	if err != 0 {
		z.abandon()
		return err
	}
	c.offs = [2]int64{int64(in.OffIn), int64(in.OffOut)}
	to.node.noteSize(in.OffOut + in.Len)
	n, err := copyFileRange(from.fd, &c.offs[0], to.fd, &c.offs[1], in.Len)
	z.done(c)
	if err != 0 {
		return err
	}
	out := fusewire.WriteOut{Size: uint32(n)}
	c.body = fusewire.Put(c.reply[replySize:], &out)
	return 0
}
