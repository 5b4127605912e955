// Package probe plays hostile guests and front ends against a vhost-user
// device. Every probe names what the device owes its honest neighbours: the
// process lives, other queues serve, and a front end that connects again finds
// a working device.
package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// patience bounds the wait for something that happens at once or never.
const patience = 20 * time.Second

// Target is the device under test.
type Target struct {
	// Dial connects to the device, which serves one front end at a time.
	Dial func(frontend.Options) (*frontend.Client, error)
	// Alive sends an honest request through a queue and checks the answer.
	Alive func(c *frontend.Client, queue int) error
	// Request is an honest request for queue 1 and ReplyLen the room for its
	// reply.
	Request  []byte
	ReplyLen int
}

// Probe is one hostile act.
type Probe struct {
	Name string
	run  func(t *Target, c *frontend.Client) error
	// manual probes set the connection up themselves.
	manual bool
}

// Run plays the probe on queue 1 and checks what it leaves behind.
func (p Probe) Run(t *Target) error {
	c, err := t.Dial(frontend.Options{Manual: p.manual})
	if err != nil {
		return err
	}
	if err := errors.Join(p.run(t, c), c.Close()); err != nil {
		return err
	}
	if c, err = t.Dial(frontend.Options{}); err != nil {
		return fmt.Errorf("a new front end: %w", err)
	}
	return errors.Join(t.Alive(c, 1), c.Close())
}

// All returns every probe.
func All() []Probe {
	return []Probe{
		{Name: "chain loop", run: broken(chainLoop)},
		{Name: "indirect loop", run: broken(indirectLoop)},
		{Name: "indirect length 0", run: broken(indirect(0, 0))},
		{Name: "indirect length odd", run: broken(indirect(24, 0))},
		{Name: "indirect too long", run: broken(indirect(16*1025, 0))},
		{Name: "indirect with next", run: broken(indirect(32, frontend.FlagNext))},
		{Name: "indirect nested", run: broken(indirectNested)},
		{Name: "readable after writable", run: broken(misordered)},
		{Name: "too many bytes", run: broken(tooLong)},
		{Name: "head outside the ring", run: broken(headOutside)},
		{Name: "available index jumps", run: broken(availableJump)},
		{Name: "address outside memory", run: returned(addressOutside)},
		{Name: "address wraps around", run: returned(addressWraps)},
		{Name: "buffer runs past memory", run: returned(bufferRunsOut)},
		{Name: "indirect table outside memory", run: returned(tableOutside)},
		{Name: "next outside the table", run: returned(nextOutside)},
		{Name: "short request", run: shortRequest},
		{Name: "no writable part", run: noWritable},
		{Name: "reset and reuse", run: resetAndReuse},
		{Name: "ring number out of range", run: closes(badRingIndex), manual: true},
		{Name: "ring size 0", run: closes(ringSize(0)), manual: true},
		{Name: "ring size not a power of two", run: closes(ringSize(100)), manual: true},
		{Name: "ring size too large", run: closes(ringSize(2048)), manual: true},
		{Name: "ring past the region end", run: ringPastEnd, manual: true},
		{Name: "ring misaligned", run: ringMisaligned, manual: true},
		{Name: "header size 0xfffffff0", run: closes(hugeHeader), manual: true},
		{Name: "wrong version", run: closes(wrongVersion), manual: true},
		{Name: "unknown message", run: closes(unknownMessage), manual: true},
		{Name: "payload too short", run: closes(shortPayload), manual: true},
		{Name: "descriptors nobody asked for", run: strayDescriptors, manual: true},
		{Name: "GET_VRING_BASE is answered", run: vringBase},
		{Name: "connection cut in a message", run: cut, manual: true},
	}
}

// broken expects that act breaks queue 1 and no other.
func broken(act func(*Target, *frontend.Client) error) func(*Target, *frontend.Client) error {
	return func(t *Target, c *frontend.Client) error {
		if err := act(t, c); err != nil {
			return err
		}
		if !c.Queue(1).Broken(int(patience.Milliseconds())) {
			return errors.New("the err descriptor was not signalled")
		}
		return t.Alive(c, 0)
	}
}

// returned expects that the chain comes back with length 0 and that the queue
// goes on.
func returned(act func(*Target, *frontend.Client) error) func(*Target, *frontend.Client) error {
	return func(t *Target, c *frontend.Client) error {
		if err := act(t, c); err != nil {
			return err
		}
		if err := expect(c.Queue(1), 0, 0); err != nil {
			return err
		}
		if c.Queue(1).Broken(0) {
			return errors.New("the queue is broken")
		}
		if err := submit(t, c); err != nil {
			return err
		}
		return t.Alive(c, 0)
	}
}

// closes expects that the device ends the connection.
func closes(act func(*Target, *frontend.Client) error) func(*Target, *frontend.Client) error {
	return func(t *Target, c *frontend.Client) error {
		if err := act(t, c); err != nil {
			return err
		}
		return closed(c)
	}
}

func closed(c *frontend.Client) error {
	select {
	case <-c.Done():
		return nil
	case <-time.After(patience):
		return errors.New("the connection is still open")
	}
}

// completion waits for the next completion.
func completion(q *frontend.Queue) (head, n uint32, err error) {
	for end := time.Now().Add(patience); time.Now().Before(end); q.Called(10) {
		if head, n, ok := q.Next(); ok {
			return head, n, nil
		}
	}
	return 0, 0, errors.New("no completion")
}

// expect waits for a completion and checks it.
func expect(q *frontend.Queue, head, n uint32) error {
	h, k, err := completion(q)
	if err == nil && (h != head || k != n) {
		err = fmt.Errorf("completion of head %d with %d bytes, want %d with %d", h, k, head, n)
	}
	return err
}

// submit sends an honest request by hand from descriptors 10 and 11, after
// probes that used the first ones.
func submit(t *Target, c *frontend.Client) error {
	q, m := c.Queue(1), c.Memory()
	in, b, err := m.Alloc(len(t.Request))
	if err != nil {
		return err
	}
	copy(b, t.Request)
	out, _, err := m.Alloc(t.ReplyLen)
	if err != nil {
		return err
	}
	q.WriteDescriptor(10, frontend.Descriptor{Addr: in, Len: uint32(len(b)), Flags: frontend.FlagNext, Next: 11})
	q.WriteDescriptor(11, frontend.Descriptor{Addr: out, Len: uint32(t.ReplyLen), Flags: frontend.FlagWrite})
	q.PushHead(10)
	h, n, err := completion(q)
	if err == nil && (h != 10 || n == 0) {
		err = fmt.Errorf("head %d with %d bytes", h, n)
	}
	if err != nil {
		return fmt.Errorf("honest request: %w", err)
	}
	return nil
}

// push writes descriptors from 0 on and submits head 0.
func push(c *frontend.Client, d ...frontend.Descriptor) error {
	q := c.Queue(1)
	for i := range d {
		q.WriteDescriptor(i, d[i])
	}
	q.PushHead(0)
	return nil
}

func page(c *frontend.Client) uint64 {
	gpa, _, err := c.Memory().Alloc(4096)
	if err != nil {
		panic(err) // 64 MiB of guest memory
	}
	return gpa
}

func u32(v ...uint32) []byte {
	var b []byte
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}
