package probe

import (
	"errors"
	"fmt"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

func chainLoop(_ *Target, c *frontend.Client) error {
	return push(c, frontend.Descriptor{Addr: page(c), Len: 64, Flags: frontend.FlagNext, Next: 0})
}

func indirectLoop(_ *Target, c *frontend.Client) error {
	gpa, table, err := c.Memory().Alloc(64)
	if err != nil {
		return err
	}
	frontend.PutDescriptor(table, 0, frontend.Descriptor{Addr: page(c), Len: 8, Flags: frontend.FlagNext, Next: 1})
	frontend.PutDescriptor(table, 1, frontend.Descriptor{Addr: page(c), Len: 8, Flags: frontend.FlagNext, Next: 0})
	return push(c, frontend.Descriptor{Addr: gpa, Len: 32, Flags: frontend.FlagIndirect})
}

// indirect refers to a table of this length.
func indirect(n uint32, flags uint16) func(*Target, *frontend.Client) error {
	return func(_ *Target, c *frontend.Client) error {
		return push(c, frontend.Descriptor{Addr: frontend.GuestBase, Len: n, Flags: frontend.FlagIndirect | flags, Next: 1})
	}
}

func indirectNested(_ *Target, c *frontend.Client) error {
	gpa, table, err := c.Memory().Alloc(64)
	if err != nil {
		return err
	}
	frontend.PutDescriptor(table, 0, frontend.Descriptor{Addr: gpa, Len: 16, Flags: frontend.FlagIndirect})
	return push(c, frontend.Descriptor{Addr: gpa, Len: 16, Flags: frontend.FlagIndirect})
}

func misordered(_ *Target, c *frontend.Client) error {
	return push(c,
		frontend.Descriptor{Addr: page(c), Len: 16, Flags: frontend.FlagWrite | frontend.FlagNext, Next: 1},
		frontend.Descriptor{Addr: page(c), Len: 40})
}

// tooLong describes the same 4 MiB three hundred times: more bytes than a
// 32-bit sum holds.
func tooLong(_ *Target, c *frontend.Client) error {
	const n = 300
	d := make([]frontend.Descriptor, n)
	for i := range d {
		d[i] = frontend.Descriptor{Addr: frontend.GuestBase, Len: 4 << 20, Flags: frontend.FlagNext, Next: uint16(i + 1)}
	}
	d[n-1].Flags = 0
	return push(c, d...)
}

func headOutside(_ *Target, c *frontend.Client) error {
	c.Queue(1).PushHead(c.Queue(1).Size)
	return nil
}

func availableJump(_ *Target, c *frontend.Client) error {
	c.Queue(1).SetAvailable(5000)
	c.Queue(1).Kick()
	return nil
}

func addressOutside(_ *Target, c *frontend.Client) error {
	return push(c, frontend.Descriptor{Addr: 0x10, Len: 64})
}

func addressWraps(_ *Target, c *frontend.Client) error {
	return push(c, frontend.Descriptor{Addr: ^uint64(0) - 16, Len: 64})
}

func bufferRunsOut(_ *Target, c *frontend.Client) error {
	end := frontend.GuestBase + uint64(len(c.Memory().Bytes))
	return push(c, frontend.Descriptor{Addr: end - 32, Len: 64})
}

func tableOutside(_ *Target, c *frontend.Client) error {
	end := frontend.GuestBase + uint64(len(c.Memory().Bytes))
	return push(c, frontend.Descriptor{Addr: end - 16, Len: 32, Flags: frontend.FlagIndirect})
}

func nextOutside(_ *Target, c *frontend.Client) error {
	return push(c, frontend.Descriptor{Addr: page(c), Len: 40, Flags: frontend.FlagNext, Next: c.Queue(1).Size})
}

// shortRequest sends 7 bytes. Whatever the device makes of them, the head must
// come back.
func shortRequest(t *Target, c *frontend.Client) error {
	err := push(c,
		frontend.Descriptor{Addr: page(c), Len: 7, Flags: frontend.FlagNext, Next: 1},
		frontend.Descriptor{Addr: page(c), Len: 4096, Flags: frontend.FlagWrite})
	return errors.Join(err, cameBack(t, c))
}

// noWritable sends the honest request with no room for a reply.
func noWritable(t *Target, c *frontend.Client) error {
	gpa, b, err := c.Memory().Alloc(len(t.Request))
	if err != nil {
		return err
	}
	copy(b, t.Request)
	if err := push(c, frontend.Descriptor{Addr: gpa, Len: uint32(len(b))}); err != nil {
		return err
	}
	if err := expect(c.Queue(1), 0, 0); err != nil {
		return err
	}
	return errors.Join(submit(t, c), t.Alive(c, 0))
}

// cameBack expects head 0, and that the queue goes on.
func cameBack(t *Target, c *frontend.Client) error {
	h, _, err := completion(c.Queue(1))
	if err == nil && h != 0 {
		err = fmt.Errorf("head %d came back, want 0", h)
	}
	if err != nil {
		return err
	}
	return errors.Join(submit(t, c), t.Alive(c, 0))
}

// resetAndReuse breaks a queue, stops it as a device reset does, and uses it
// again.
func resetAndReuse(t *Target, c *frontend.Client) error {
	if err := broken(chainLoop)(t, c); err != nil {
		return err
	}
	q := c.Queue(1)
	if _, err := q.Stop(); err != nil {
		return err
	}
	q.Reset()
	if err := q.Start(0); err != nil {
		return err
	}
	return submit(t, c)
}
