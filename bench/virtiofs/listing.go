package main

import (
	"encoding/binary"
	"fmt"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// listing is a program that lists the large directory: OPENDIR, READDIR or
// READDIRPLUS until the end, RELEASEDIR. A cold listing gives every lookup back
// at its end, as a guest's kernel does when it drops inodes, so that the server
// knows none of them at the next one; that is part of what is measured. The
// others give them back after the last one.
type listing struct {
	s       *server
	plus    bool
	cold    bool
	dir     uint64
	open    *frontend.Chain
	read    *frontend.Chain
	release *frontend.Chain
	size    int

	nodes   []uint64
	entries int
	buf     []byte
}

func list(plus, cold bool, size int) func(*server, int) (program, error) {
	return func(s *server, _ int) (program, error) {
		dir, err := s.walk("many")
		if err != nil {
			return nil, err
		}
		p := &listing{s: s, plus: plus, cold: cold, dir: dir, size: size}
		return p, p.layOut()
	}
}

// batch is the number of nodes given back in one BATCH_FORGET.
const batch = 128

func (p *listing) layOut() error {
	op := fusewire.OpReaddir
	if p.plus {
		op = fusewire.OpReaddirplus
	}
	var err error
	step := func(c **frontend.Chain, op fusewire.Opcode, args []byte, body, data int) {
		if err == nil {
			*c, err = p.s.request(op, p.dir, args, 0, body, data)
		}
	}
	step(&p.open, fusewire.OpOpendir, fusewire.Append(nil, &fusewire.OpenIn{Flags: uint32(os.O_RDONLY)}), fusewire.OpenOutSize, 0)
	step(&p.read, op, fusewire.Append(nil, &fusewire.ReadIn{Size: uint32(p.size)}), 0, p.size)
	step(&p.release, fusewire.OpReleasedir, fusewire.Append(nil, &fusewire.ReleaseIn{}), 0, 0)
	return err
}

func (p *listing) start(int) *frontend.Chain {
	p.entries = 0
	return p.open
}

func (p *listing) done(_ int, c *frontend.Chain) (*frontend.Chain, bool, error) {
	if err := replyError(c); err != nil {
		return nil, false, err
	}
	switch c {
	case p.open:
		copy(p.read.In[1][:8], c.Out[1][:8])
		copy(p.release.In[1][:8], c.Out[1][:8])
		binary.LittleEndian.PutUint64(p.read.In[1][8:], 0)
		return p.read, false, nil
	case p.read:
		if c.Written == fusewire.OutHeaderSize {
			return p.release, false, nil
		}
		return p.read, false, p.scan(c)
	}
	if p.entries != dirFiles+2 {
		return nil, false, fmt.Errorf("listing of %d entries, want %d", p.entries, dirFiles+2)
	}
	var err error
	if p.cold {
		err = p.giveBack()
	}
	return p.start(0), true, err
}

// scan counts entries, finds where to go on and remembers nodes to give back.
func (p *listing) scan(c *frontend.Chain) error {
	p.buf = p.buf[:0]
	left := int(c.Written) - fusewire.OutHeaderSize
	for _, s := range c.Out[1:] {
		n := min(left, len(s))
		p.buf = append(p.buf, s[:n]...)
		left -= n
	}
	b := p.buf
	for len(b) > 0 {
		if p.plus {
			if node := binary.LittleEndian.Uint64(b); node != 0 && p.named(b[fusewire.EntryOutSize:]) {
				p.nodes = append(p.nodes, node)
			}
			b = b[fusewire.EntryOutSize:]
		}
		namelen := int(binary.LittleEndian.Uint32(b[16:]))
		copy(p.read.In[1][8:16], b[8:16])
		p.entries++
		b = b[fusewire.DirentLen(namelen):]
	}
	return nil
}

// named reports whether the entry is neither "." nor "..", which take no
// lookup count.
func (p *listing) named(b []byte) bool {
	return b[fusewire.DirentSize] != '.'
}

// giveBack forgets the nodes of a listing, in batches.
func (p *listing) giveBack() error {
	q := p.s.c.Queue(0)
	for left := p.nodes; len(left) > 0; {
		n := min(batch, len(left))
		args := fusewire.Append(nil, &fusewire.BatchForgetIn{Count: uint32(n)})
		for _, node := range left[:n] {
			args = fusewire.Append(args, &fusewire.ForgetOne{NodeID: node, Nlookup: 1})
		}
		left = left[n:]
		h := p.s.fs.Header(fusewire.OpBatchForget, 0, len(args))
		c, err := q.NewChain([]int{len(h), len(args)}, nil)
		if err != nil {
			return err
		}
		c.Put(h, args)
		q.Submit(c)
		q.Wait()
		if q.Poll() != c {
			return fmt.Errorf("BATCH_FORGET did not come back")
		}
		c.Free()
	}
	p.nodes = p.nodes[:0]
	return nil
}

func (p *listing) close() error {
	if err := p.giveBack(); err != nil {
		return err
	}
	for _, c := range []*frontend.Chain{p.open, p.read, p.release} {
		c.Free()
	}
	return nil
}
