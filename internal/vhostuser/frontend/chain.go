package frontend

import (
	"encoding/binary"
	"errors"
)

// Descriptor is one entry of a descriptor table.
type Descriptor struct {
	Addr  uint64
	Len   uint32
	Flags uint16
	Next  uint16
}

// PutDescriptor writes an entry of any table.
func PutDescriptor(table []byte, i int, d Descriptor) {
	b := table[16*i : 16*i+16]
	binary.LittleEndian.PutUint64(b, d.Addr)
	binary.LittleEndian.PutUint32(b[8:], d.Len)
	binary.LittleEndian.PutUint16(b[12:], d.Flags)
	binary.LittleEndian.PutUint16(b[14:], d.Next)
}

// WriteDescriptor writes an entry of the ring's own table.
func (q *Queue) WriteDescriptor(i int, d Descriptor) { PutDescriptor(q.Desc, i, d) }

// Chain is one request laid out in guest memory. It can be submitted again and
// again, with other contents of the same lengths.
type Chain struct {
	In, Out [][]byte // segments in guest memory, none above a page
	Written uint32   // used length of the last completion
	Tag     int      // the caller's

	q      *Queue
	head   uint16
	descs  []uint16 // taken from the ring's table
	pieces []piece
	table  piece
	done   chan struct{}
}

type piece struct {
	gpa   uint64
	n     int
	write bool
}

// NewChain lays out a request with device-readable parts of the lengths in and
// device-writable parts of the lengths out. Each part above 4096 bytes becomes
// pages that are not adjacent.
func (q *Queue) NewChain(in, out []int) (*Chain, error) {
	c := &Chain{q: q}
	for _, n := range in {
		if err := c.part(n, false); err != nil {
			return nil, errors.Join(err, c.releasePieces())
		}
	}
	for _, n := range out {
		if err := c.part(n, true); err != nil {
			return nil, errors.Join(err, c.releasePieces())
		}
	}
	err := c.describe()
	if err != nil {
		return nil, errors.Join(err, c.releasePieces())
	}
	q.chains[c.head] = c
	return c, nil
}

func (c *Chain) part(n int, write bool) error {
	for {
		k := min(n, pageSize)
		gpa, b, err := c.q.c.mem.Alloc(k)
		if err != nil {
			return err
		}
		c.pieces = append(c.pieces, piece{gpa: gpa, n: k, write: write})
		if write {
			c.Out = append(c.Out, b)
		} else {
			c.In = append(c.In, b)
		}
		if n -= k; n == 0 {
			return nil
		}
	}
}

// describe writes the descriptors: an indirect table where there is more than
// one and the device knows them, as Linux does, else a chain in the ring.
func (c *Chain) describe() error {
	q, n := c.q, len(c.pieces)
	want := n
	indirect := n > 1 && q.c.Features&FeatureIndirect != 0
	if indirect {
		want = 1
	}
	if n == 0 || len(q.free) < want {
		return errors.New("no free descriptors")
	}
	if indirect {
		return c.describeIndirect(n)
	}
	c.takeDescs(want)
	for i, p := range c.pieces {
		d := Descriptor{Addr: p.gpa, Len: uint32(p.n), Flags: p.flags()}
		if i < n-1 {
			d.Flags |= FlagNext
			d.Next = c.descs[i+1]
		}
		q.WriteDescriptor(int(c.descs[i]), d)
	}
	return nil
}

func (c *Chain) describeIndirect(n int) error {
	m := c.q.c.mem
	alloc := m.Alloc
	if 16*n > pageSize {
		alloc = m.contiguous
	}
	gpa, b, err := alloc(16 * n)
	if err != nil {
		return err
	}
	c.table = piece{gpa: gpa, n: 16 * n}
	for i, p := range c.pieces {
		d := Descriptor{Addr: p.gpa, Len: uint32(p.n), Flags: p.flags()}
		if i < n-1 {
			d.Flags |= FlagNext
			d.Next = uint16(i + 1)
		}
		PutDescriptor(b, i, d)
	}
	c.takeDescs(1)
	c.q.WriteDescriptor(int(c.head), Descriptor{Addr: gpa, Len: uint32(16 * n), Flags: FlagIndirect})
	return nil
}

func (p piece) flags() uint16 {
	if p.write {
		return FlagWrite
	}
	return 0
}

func (c *Chain) takeDescs(n int) {
	q := c.q
	c.descs = append(c.descs, q.free[len(q.free)-n:]...)
	q.free = q.free[:len(q.free)-n]
	c.head = c.descs[0]
}

// Free returns the chain's descriptors and memory. It must not be in flight.
func (c *Chain) Free() {
	q := c.q
	if len(c.descs) > 0 {
		q.chains[c.head] = nil
		q.free = append(q.free, c.descs...)
	}
	switch m := q.c.mem; {
	case c.table.n > pageSize:
		m.freeContiguous(c.table.gpa, c.table.n)
	case c.table.n > 0:
		m.Free(c.table.gpa, c.table.n)
	}
	_ = c.releasePieces()
}

func (c *Chain) releasePieces() error {
	for _, p := range c.pieces {
		c.q.c.mem.Free(p.gpa, p.n)
	}
	c.pieces = nil
	return nil
}

// Put copies b to the start of the device-readable bytes.
func (c *Chain) Put(b ...[]byte) {
	seg, at := 0, 0
	for _, part := range b {
		for len(part) > 0 && seg < len(c.In) {
			n := copy(c.In[seg][at:], part)
			part = part[n:]
			if at += n; at == len(c.In[seg]) {
				seg, at = seg+1, 0
			}
		}
	}
}

// Reply returns a copy of what the device wrote, as far as it fits.
func (c *Chain) Reply() []byte {
	left := int(c.Written)
	b := make([]byte, 0, min(left, 2<<20))
	for _, s := range c.Out {
		n := min(left, len(s))
		b = append(b, s[:n]...)
		left -= n
	}
	return b
}
