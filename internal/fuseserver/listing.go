package fuseserver

import (
	"bytes"
	"encoding/binary"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const blockSize = 32 << 10 // of one getdents

// blocks holds buffers of listings that have come to an end.
var blocks = sync.Pool{New: func() any { return new([blockSize]byte) }}

// listing is where a directory handle stands: one block of entries at most,
// and where the host continues after it.
type listing struct {
	mu       sync.Mutex
	block    *[blockSize]byte // guarded by mu; nil: nothing read
	pos, end int              // guarded by mu: the entries not yet given out
	next     uint64           // guarded by mu: the offset of the entry at pos
}

// hostEntry is one entry of a block; name points into it and is followed by a NUL.
type hostEntry struct {
	ino, off uint64 // off: where the listing continues after this entry
	typ      uint32
	name     []byte
	size     int // of the entry in the block
}

// seek makes the listing continue at off. Offset 0 always reads afresh.
func (l *listing) seek(fd int, off uint64) errno {
	if off == l.next && off != 0 {
		return 0
	}
	if off > math.MaxInt64 {
		return unix.EINVAL
	}
	if _, err := lseek(fd, off, unix.SEEK_SET); err != 0 {
		return err
	}
	l.pos, l.end, l.next = 0, 0, off
	return 0
}

// peek fills e with the entry at the present position; ok is false at the end.
func (l *listing) peek(fd int, e *hostEntry) (ok bool, err errno) {
	if l.pos == l.end {
		if l.block == nil {
			l.block = blocks.Get().(*[blockSize]byte)
		}
		n, err := getdents(fd, l.block[:])
		if err != 0 || n == 0 {
			l.discard()
			return false, err
		}
		l.pos, l.end = 0, n
	}
	b := l.block[l.pos:l.end]
	e.ino = binary.NativeEndian.Uint64(b)
	e.off = binary.NativeEndian.Uint64(b[8:])
	e.size = int(binary.NativeEndian.Uint16(b[16:]))
	e.typ = uint32(b[18])
	name := b[19:e.size]
	e.name = name[:bytes.IndexByte(name, 0)]
	return true, 0
}

// take moves past an entry that was given out.
func (l *listing) take(e *hostEntry) {
	l.pos += e.size
	l.next = e.off
}

// discard gives the block back.
func (l *listing) discard() {
	if l.block != nil {
		blocks.Put(l.block)
	}
	l.block, l.pos, l.end = nil, 0, 0
}

func (c *call) opReaddir() errno { return c.list(false) }

func (c *call) opReaddirplus() errno { return c.list(true) }

func (c *call) list(plus bool) errno {
	var in fusewire.ReadIn
	fusewire.Decode(c.args, &in)
	h, err := c.se.handles.get(in.Fh, c.h.NodeID, true)
	if err != 0 {
		return err
	}
	defer h.drop()
	b := c.room(min(int(in.Size), c.outRoom(), listMax))
	l := h.dir
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.seek(h.fd, in.Offset); err != 0 {
		return err
	}
	for e := &c.entry; ; {
		ok, err := l.peek(h.fd, e)
		if !ok {
			if c.body > 0 {
				err = 0 // it will come again
			}
			return err
		}
		var n int
		if plus {
			n = c.putPlus(h.node, e, b[c.body:])
		} else {
			n = c.putPlain(h.node, e, b[c.body:])
		}
		if n == 0 {
			if c.body == 0 {
				return unix.EINVAL
			}
			return 0
		}
		c.body += n
		l.take(e)
	}
}

// putPlain puts an entry of READDIR. It returns its length, 0 if it does not
// fit; so does putPlus.
func (c *call) putPlain(dir *inode, e *hostEntry, b []byte) int {
	d := fusewire.Dirent{Ino: c.entryIno(dir, e), Off: e.off, Type: c.plainType(dir, e)}
	return fusewire.PutDirent(b, &d, e.name)
}

// entryIno hides the number of the directory above the share.
func (c *call) entryIno(dir *inode, e *hostEntry) uint64 {
	if dir.id == rootID && string(e.name) == ".." {
		return dir.key.ino
	}
	return e.ino
}

// plainType is the type that READDIR tells. A regular file of the host may be
// a stand-in: without asking for each, the type of unknown ones is unknown,
// and programs that care ask themselves.
func (c *call) plainType(dir *inode, e *hostEntry) uint32 {
	if c.s.virt == virtOff || e.typ != unix.DT_REG {
		return e.typ
	}
	if n := c.se.nodes.peek(identity{dir.key.dev, e.ino, dir.key.mnt}); n != nil {
		if v, state := n.ov.last(); state == overlayPresent {
			return v.format() >> 12
		} else if state == overlayAbsent {
			return e.typ
		}
	}
	return unix.DT_UNKNOWN
}

// putPlus puts an entry of READDIRPLUS. "." and ".." and names whose lookup
// fails are listed with node id 0, which tells the guest to look them up when
// it needs them: no name is hidden for want of a descriptor.
func (c *call) putPlus(dir *inode, e *hostEntry, b []byte) int {
	need := fusewire.EntryOutSize + fusewire.DirentLen(len(e.name))
	if need > len(b) {
		return 0
	}
	var out fusewire.EntryOut
	d := fusewire.Dirent{Ino: c.entryIno(dir, e), Off: e.off}
	name, _, bad := fusewire.TakeName(e.name[:len(e.name)+1])
	if bad == 0 && c.listed(dir, e, name, &out) {
		d.Type = out.Attr.Mode >> 12
	} else {
		out = fusewire.EntryOut{}
		d.Type = c.plainType(dir, e)
	}
	fusewire.Put(b, &out)
	fusewire.PutDirent(b[fusewire.EntryOutSize:], &d, e.name)
	return need
}

// listed looks up one name of a listing. The entry's inode number tells which
// inode it probably is; the name decides, because the block may be older than
// what the guest itself has done to the directory since.
func (c *call) listed(dir *inode, e *hostEntry, name judged, out *fusewire.EntryOut) bool {
	n := c.se.nodes.known(identity{dir.key.dev, e.ino, dir.key.mnt})
	var err errno
	switch {
	case n == nil:
		n, err = c.meet(dir, name, &out.Attr)
	case statxAt(dir.quick, dir.fd, name.Ptr(), &c.stx) == 0 && identityOf(&c.stx) == n.key:
		attrFromStatx(&out.Attr, &c.stx)
		n, err = c.finish(n, &out.Attr, 0)
	default:
		c.forsake(n)
		n, err = c.find(dir, name, &out.Attr)
	}
	if err != 0 {
		return false
	}
	c.fillEntry(n, out)
	n.drop()
	return true
}
