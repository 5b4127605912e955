package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// request lays out one request: header, arguments and payload as Linux sends
// them, room for the reply's header and body.
func (s *server) request(op fusewire.Opcode, node uint64, args []byte, payload int, body int, data int) (*frontend.Chain, error) {
	h := s.fs.Header(op, node, len(args)+payload)
	in := []int{len(h)}
	if len(args) > 0 {
		in = append(in, len(args))
	}
	if payload > 0 {
		in = append(in, payload)
	}
	out := []int{fusewire.OutHeaderSize}
	for _, n := range []int{body, data} {
		if n > 0 {
			out = append(out, n)
		}
	}
	queue := 1
	if op == fusewire.OpForget {
		queue, out = 0, nil
	}
	c, err := s.c.Queue(queue).NewChain(in, out)
	if err != nil {
		return nil, err
	}
	c.Put(h, args)
	return c, nil
}

// simple is a program of one kind of request.
type simple struct {
	chains []*frontend.Chain
	vary   func(c *frontend.Chain) // before each submission; may be nil
	after  func() error
}

func (p *simple) start(slot int) *frontend.Chain { return p.next(slot) }

func (p *simple) next(slot int) *frontend.Chain {
	c := p.chains[slot]
	if p.vary != nil {
		p.vary(c)
	}
	return c
}

func (p *simple) done(slot int, c *frontend.Chain) (*frontend.Chain, bool, error) {
	if err := replyError(c); err != nil {
		return nil, false, err
	}
	return p.next(slot), true, nil
}

func (p *simple) close() error {
	for _, c := range p.chains {
		c.Free()
	}
	if p.after != nil {
		return p.after()
	}
	return nil
}

// many makes a simple program of depth equal requests.
func (s *server) many(depth int, make func(i int) (*frontend.Chain, error)) (*simple, error) {
	p := &simple{}
	for i := range depth {
		c, err := make(i)
		if err != nil {
			return nil, err
		}
		p.chains = append(p.chains, c)
	}
	return p, nil
}

func getattr(s *server, depth int) (program, error) {
	e, err := s.walk("known", "file-000")
	if err != nil {
		return nil, err
	}
	return s.many(depth, func(int) (*frontend.Chain, error) {
		return s.request(fusewire.OpGetattr, e, fusewire.Append(nil, &fusewire.GetattrIn{}), 0, fusewire.AttrOutSize, 0)
	})
}

func lookupKnown(s *server, depth int) (program, error) {
	dir, err := s.walk("known")
	if err != nil {
		return nil, err
	}
	return s.many(depth, func(i int) (*frontend.Chain, error) {
		return s.request(fusewire.OpLookup, dir, fmt.Appendf(nil, "file-%03d\x00", i%knownName), 0, fusewire.EntryOutSize, 0)
	})
}

// walk looks names up from the root and returns the last node.
func (s *server) walk(names ...string) (uint64, error) {
	node := uint64(fusewire.RootID)
	for _, n := range names {
		e, err := s.fs.Lookup(node, n)
		if err != nil {
			return 0, fmt.Errorf("lookup %s: %w", n, err)
		}
		node = e.NodeID
	}
	return node, nil
}

// transfer reads or writes size bytes per request: at random places, or one
// stream over all slots.
func transfer(op fusewire.Opcode, size int, random bool) func(*server, int) (program, error) {
	return func(s *server, depth int) (program, error) {
		node, err := s.walk("big")
		if err != nil {
			return nil, err
		}
		f, err := s.fs.Open(node, os.O_RDWR)
		if err != nil {
			return nil, err
		}
		p, err := s.many(depth, func(int) (*frontend.Chain, error) {
			if op == fusewire.OpRead {
				in := fusewire.ReadIn{Fh: f.Fh, Size: uint32(size)}
				return s.request(op, node, fusewire.Append(nil, &in), 0, 0, size)
			}
			in := fusewire.WriteIn{Fh: f.Fh, Size: uint32(size)}
			return s.request(op, node, fusewire.Append(nil, &in), size, fusewire.Size[fusewire.WriteOut](), 0)
		})
		if err != nil {
			return nil, err
		}
		off := uint64(0)
		p.vary = func(c *frontend.Chain) {
			if random {
				off = uint64(rand.Uint32N(bigSize/4096)) * 4096
			}
			binary.LittleEndian.PutUint64(c.In[1][8:], off)
			off = (off + uint64(size)) % bigSize
		}
		p.after = func() error { return s.fs.Release(node, f.Fh) }
		return p, nil
	}
}

// steps is a program of operations with several requests, of which the last
// is a FORGET on the high-priority queue.
type steps struct {
	s       *server
	chains  [][]*frontend.Chain // of each slot, by step
	at      []int
	step    func(slot, step int, c *frontend.Chain) // fills in what the last reply said
	forgets []*frontend.Chain                       // free ones
	all     []*frontend.Chain
}

func (p *steps) start(slot int) *frontend.Chain {
	p.at[slot] = 0
	p.step(slot, 0, p.chains[slot][0])
	return p.chains[slot][0]
}

func (p *steps) done(slot int, c *frontend.Chain) (*frontend.Chain, bool, error) {
	if err := replyError(c); err != nil {
		return nil, false, fmt.Errorf("step %d: %w", p.at[slot], err)
	}
	p.at[slot]++
	finished := p.at[slot] == len(p.chains[slot])
	if finished {
		return p.start(slot), true, nil
	}
	next := p.chains[slot][p.at[slot]]
	p.step(slot, p.at[slot], next)
	return next, false, nil
}

func (p *steps) close() error {
	for _, slot := range p.chains {
		for _, c := range slot {
			c.Free()
		}
	}
	for len(p.forgets) < len(p.all) {
		p.reclaim()
	}
	for _, c := range p.all {
		c.Free()
	}
	return nil
}

// forget sends FORGET of one lookup.
func (p *steps) forget(node uint64) {
	for len(p.forgets) == 0 {
		p.reclaim()
	}
	c := p.forgets[len(p.forgets)-1]
	p.forgets = p.forgets[:len(p.forgets)-1]
	binary.LittleEndian.PutUint64(c.In[0][16:], node)
	p.s.c.Queue(0).Submit(c)
}

func (p *steps) reclaim() {
	q := p.s.c.Queue(0)
	q.Wait()
	for c := q.Poll(); c != nil; c = q.Poll() {
		p.forgets = append(p.forgets, c)
	}
}

func newSteps(s *server, depth, n int, layOut func(slot, step int) (*frontend.Chain, error)) (*steps, error) {
	p := &steps{s: s, chains: make([][]*frontend.Chain, depth), at: make([]int, depth)}
	for i := range depth {
		for j := range n {
			c, err := layOut(i, j)
			if err != nil {
				return nil, err
			}
			p.chains[i] = append(p.chains[i], c)
		}
	}
	for range 256 {
		c, err := s.request(fusewire.OpForget, 0, fusewire.Append(nil, &fusewire.ForgetIn{Nlookup: 1}), 0, 0, 0)
		if err != nil {
			return nil, err
		}
		p.forgets = append(p.forgets, c)
		p.all = append(p.all, c)
	}
	return p, nil
}

func nodeOf(c *frontend.Chain) uint64 { return binary.LittleEndian.Uint64(c.Out[1]) }

// lookupNew looks up names that the server does not know and forgets them.
func lookupNew(s *server, depth int) (program, error) {
	dir, err := s.walk("many")
	if err != nil {
		return nil, err
	}
	p, err := newSteps(s, depth, 1, func(int, int) (*frontend.Chain, error) {
		return s.request(fusewire.OpLookup, dir, append([]byte(manyName(0)), 0), 0, fusewire.EntryOutSize, 0)
	})
	if err != nil {
		return nil, err
	}
	i := 0
	first := make([]bool, depth)
	p.step = func(slot, _ int, c *frontend.Chain) {
		if first[slot] {
			p.forget(nodeOf(c))
		}
		first[slot] = true
		i = (i + 1) % dirFiles
		copyDigits(c.In[1][len("entry-"):], i, 5)
	}
	return p, nil
}

// copyDigits writes i with leading zeros.
func copyDigits(b []byte, i, width int) {
	for k := width - 1; k >= 0; k-- {
		b[k] = byte('0' + i%10)
		i /= 10
	}
}

// createUnlink creates, releases, unlinks and forgets a file.
func createUnlink(s *server, depth int) (program, error) {
	dir, err := s.walk("new")
	if err != nil {
		return nil, err
	}
	p, err := newSteps(s, depth, 3, func(slot, step int) (*frontend.Chain, error) {
		name := fmt.Appendf(nil, "new-%03d\x00", slot)
		switch step {
		case 0:
			in := fusewire.CreateIn{Flags: uint32(os.O_RDWR | os.O_CREATE | os.O_EXCL), Mode: 0o100644, Umask: 0o022}
			return s.request(fusewire.OpCreate, dir, append(fusewire.Append(nil, &in), name...), 0,
				fusewire.EntryOutSize+fusewire.OpenOutSize, 0)
		case 1:
			return s.request(fusewire.OpRelease, 0, fusewire.Append(nil, &fusewire.ReleaseIn{}), 0, 0, 0)
		}
		return s.request(fusewire.OpUnlink, dir, name, 0, 0, 0)
	})
	if err != nil {
		return nil, err
	}
	node := make([]uint64, depth)
	p.step = func(slot, step int, c *frontend.Chain) {
		switch step {
		case 0:
			if node[slot] != 0 {
				p.forget(node[slot])
			}
		case 1:
			created := p.chains[slot][0].Out[1]
			node[slot] = binary.LittleEndian.Uint64(created)
			binary.LittleEndian.PutUint64(c.In[0][16:], node[slot])
			copy(c.In[1][:8], created[fusewire.EntryOutSize:])
		}
	}
	return p, nil
}

// openRelease opens and releases a file.
func openRelease(s *server, depth int) (program, error) {
	node, err := s.walk("known", "file-001")
	if err != nil {
		return nil, err
	}
	p, err := newSteps(s, depth, 2, func(_, step int) (*frontend.Chain, error) {
		if step == 0 {
			return s.request(fusewire.OpOpen, node, fusewire.Append(nil, &fusewire.OpenIn{}), 0, fusewire.OpenOutSize, 0)
		}
		return s.request(fusewire.OpRelease, node, fusewire.Append(nil, &fusewire.ReleaseIn{}), 0, 0, 0)
	})
	if err != nil {
		return nil, err
	}
	p.step = func(slot, step int, c *frontend.Chain) {
		if step == 1 {
			copy(c.In[1][:8], p.chains[slot][0].Out[1][:8])
		}
	}
	return p, nil
}
