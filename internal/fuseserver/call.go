package fuseserver

import (
	"bytes"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const (
	headerSize = fusewire.InHeaderSize
	replySize  = fusewire.OutHeaderSize

	// requestMax is the longest request without the payload of WRITE:
	// SETXATTR with the largest value and the longest name.
	requestMax = headerSize + 8 + fusewire.NameMax + 1 + fusewire.XattrSizeMax

	// listMax bounds one reply of a listing.
	listMax = 128 << 10

	maxIovecs = 1024 // of one system call
)

// call is one request being served and the scratch memory for it. A queue and
// a worker have one each; nothing in it outlives the request.
type call struct {
	s    *Server
	se   *session
	from origin // nil on a worker: nothing can be put off any more
	op   *operation

	in, out [][]byte // guest memory
	h       fusewire.InHeader
	args    []byte // the arguments after the header, a private copy

	body   int // bytes of the reply's body in reply
	direct int // bytes of the reply's body already in guest memory
	parked bool

	buf   []byte // the request as copied
	reply []byte // header and body
	iov   [maxIovecs]unix.Iovec
	st    unix.Stat_t
	stx   unix.Statx_t
	path  [24]byte // "N", the name of descriptor N in /proc/self/fd
	times [2]unix.Timespec
	xattr [32]byte
	xargs xattrArgs
	offs  [2]int64
	size  sizeChange

	entry hostEntry
	fresh bool              // adopt made a new node
	spare *inode            // for the next new node
	hints [hintSlots]uint64 // names whose nodes were known when last looked up

	unhinted guess
}

func newCall(s *Server) *call {
	return &call{s: s, buf: make([]byte, requestMax), reply: make([]byte, 512)}
}

// serve answers one request. It returns done=false if a worker will.
func (c *call) serve(in, out [][]byte, from origin) (n int, done bool) {
	c.in, c.out, c.from = in, out, from
	c.body, c.direct, c.parked, c.op = 0, 0, false, nil
	if gather(c.buf[:headerSize], in, 0) < headerSize {
		return 0, true // nobody to answer
	}
	fusewire.Decode(c.buf, &c.h)
	room := length(out)
	if room < replySize && !c.silent() {
		return 0, true
	}
	err := c.decode(room)
	if err == 0 {
		err = toErrno(c.op.run(c))
	}
	switch {
	case c.parked:
		c.drop()
		return 0, false
	case c.silent():
		n = 0
	default:
		n = scatter(c.out, c.seal(err))
		n += c.direct
	}
	c.drop()
	return n, true
}

// drop lets go of guest memory and the session.
func (c *call) drop() { c.in, c.out, c.from, c.se = nil, nil, nil, nil }

// silent reports whether the request gets no reply.
func (c *call) silent() bool {
	switch c.h.Opcode {
	case fusewire.OpForget, fusewire.OpBatchForget, fusewire.OpInterrupt:
		return true
	}
	return false
}

// slow reports whether the request took long compared with a wake-up of the
// guest: what changes the tree does, a write goes to the page cache.
func (c *call) slow() bool {
	return c.op != nil && !c.op.onReadonly && c.h.Opcode != fusewire.OpWrite
}

// decode finds the operation and copies its arguments. Everything that can be
// said about the message alone is checked here.
func (c *call) decode(room int) errno {
	if c.h.Opcode >= fusewire.OpCount || ops[c.h.Opcode].run == nil {
		return unix.ENOSYS
	}
	c.op = &ops[c.h.Opcode]
	total := length(c.in)
	if c.h.Len < headerSize || uint64(c.h.Len) > uint64(total) || c.h.TotalExtlen != 0 {
		return unix.EINVAL
	}
	take := int(c.h.Len) - headerSize
	if c.h.Opcode == fusewire.OpWrite {
		take = min(take, fusewire.WriteInSize)
	}
	if take < c.op.args || headerSize+take > len(c.buf) || (!c.silent() && room < replySize+c.op.result) {
		return unix.EINVAL
	}
	if gather(c.buf[headerSize:headerSize+take], c.in, headerSize) < take {
		return unix.EINVAL
	}
	c.args = c.buf[headerSize : headerSize+take]
	if c.se = c.s.session.Load(); c.se == nil && c.h.Opcode != fusewire.OpInit && c.h.Opcode != fusewire.OpDestroy {
		return unix.EIO
	}
	if c.s.readonly && !c.op.onReadonly {
		return unix.EROFS
	}
	return 0
}

// seal writes the reply's header before its body and returns both.
func (c *call) seal(err errno) []byte {
	if err != 0 {
		c.body, c.direct = 0, 0
	}
	h := fusewire.OutHeader{
		Len:    uint32(replySize + c.body + c.direct),
		Error:  -int32(err),
		Unique: c.h.Unique,
	}
	fusewire.Put(c.reply, &h)
	return c.reply[:replySize+c.body]
}

// room returns n bytes for the body of the reply.
func (c *call) room(n int) []byte {
	if len(c.reply) < replySize+n {
		grown := make([]byte, replySize+n)
		c.reply = grown
	}
	return c.reply[replySize : replySize+n]
}

// outRoom returns how many bytes of body the guest's buffers take.
func (c *call) outRoom() int { return length(c.out) - replySize }

// later moves the request to a worker. If it returns true, the handler must
// return at once; the same handler then runs on the worker from its start,
// where later returns false. It also returns false when the workers are
// swamped: then the queue itself waits.
func (c *call) later() bool {
	if c.from == nil || !c.s.work.admit() {
		return false
	}
	j := job{header: c.h, args: bytes.Clone(c.args), op: c.op, session: c.se}
	j.from, j.in, j.out = c.from.detach()
	c.parked = true
	c.s.work.put(j)
	return true
}

// finishJob serves a request on a worker.
func (c *call) finishJob(j job) {
	c.in, c.out, c.from = j.in, j.out, nil
	c.h, c.args, c.op, c.se = j.header, j.args, j.op, j.session
	c.body, c.direct, c.parked = 0, 0, false
	err := toErrno(j.op.run(c))
	n := j.from.CopyOut(c.seal(err))
	if n > 0 {
		n += c.direct
	}
	c.drop()
	j.from.Complete(n)
}

// node returns the inode that the request is about, with a reference.
func (c *call) node() (*inode, errno) { return c.nodeByID(c.h.NodeID) }

func (c *call) nodeByID(id uint64) (*inode, errno) {
	if n := c.se.nodes.get(id); n != nil {
		return n, 0
	}
	return nil, unix.ESTALE
}

// dir returns the directory that the request is about, with a reference.
func (c *call) dir() (*inode, errno) { return c.dirByID(c.h.NodeID) }

func (c *call) dirByID(id uint64) (*inode, errno) {
	n, err := c.nodeByID(id)
	if err == 0 && !n.isDir() {
		n.drop()
		return nil, unix.ENOTDIR
	}
	return n, err
}

// procName returns the name of a descriptor in /proc/self/fd. It is valid
// until the next call.
func (c *call) procName(fd int) *byte {
	b := strconv.AppendInt(c.path[:0], int64(fd), 10)
	c.path[len(b)] = 0
	return &c.path[0]
}

// length returns the number of bytes of all segments.
func length(v [][]byte) int {
	n := 0
	for _, b := range v {
		n += len(b)
	}
	return n
}

// gather copies from the segments, starting at off, and returns how much.
func gather(dst []byte, src [][]byte, off int) int {
	n := 0
	for _, b := range src {
		if off >= len(b) {
			off -= len(b)
			continue
		}
		n += copy(dst[n:], b[off:])
		off = 0
		if n == len(dst) {
			break
		}
	}
	return n
}

// scatter copies to the segments and returns how much.
func scatter(dst [][]byte, src []byte) int {
	n := 0
	for _, b := range dst {
		if n == len(src) {
			break
		}
		n += copy(b, src[n:])
	}
	return n
}

// iovecs names n bytes of the segments, starting at off, without touching
// them. It names fewer if one system call does not take as many pieces.
func (c *call) iovecs(seg [][]byte, off, n int) []unix.Iovec {
	k := 0
	for _, b := range seg {
		if n == 0 || k == maxIovecs {
			break
		}
		if off >= len(b) {
			off -= len(b)
			continue
		}
		b = b[off:min(len(b), off+n)]
		off = 0
		c.iov[k].Base = &b[0]
		c.iov[k].SetLen(len(b))
		n -= len(b)
		k++
	}
	return c.iov[:k]
}
