package probe

import (
	"errors"
	"fmt"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// Message numbers the probes send by hand.
const (
	setOwner     = 3
	setVringNum  = 8
	getVringBase = 11
	setVringAddr = 9
)

func badRingIndex(_ *Target, c *frontend.Client) error {
	return c.Message(setVringNum, 1, 8, u32(77, 64))
}

func ringSize(n uint32) func(*Target, *frontend.Client) error {
	return func(_ *Target, c *frontend.Client) error {
		return c.Message(setVringNum, 1, 8, u32(1, n))
	}
}

// ringPastEnd asks for a ring of which the last byte is outside memory.
func ringPastEnd(_ *Target, c *frontend.Client) error {
	end := frontend.GuestBase + uint64(len(c.Memory().Bytes))
	size := uint64(c.Queue(1).Size)
	return refusedAddr(c, map[string][3]uint64{
		"descriptors": {end - 16*size + 16, frontend.GuestBase, frontend.GuestBase + 1<<16},
		"available":   {frontend.GuestBase, end - (6 + 2*size) + 2, frontend.GuestBase + 1<<16},
		"used":        {frontend.GuestBase, frontend.GuestBase + 1<<16, end - (6 + 8*size) + 2},
		"everything":  {end, end, end},
		"nowhere":     {0, 0, 0},
	})
}

func ringMisaligned(_ *Target, c *frontend.Client) error {
	const a, b = frontend.GuestBase + 1<<16, frontend.GuestBase + 1<<17
	return refusedAddr(c, map[string][3]uint64{
		"descriptors": {frontend.GuestBase + 8, a, b},
		"available":   {frontend.GuestBase, a + 1, b},
		"used":        {frontend.GuestBase, a, b + 2},
	})
}

// refusedAddr expects that SET_VRING_ADDR refuses each of these places
// (descriptors, available, used) and goes on with an honest one.
func refusedAddr(c *frontend.Client, places map[string][3]uint64) error {
	if err := errors.Join(c.Negotiate(), c.ShareMemory()); err != nil {
		return err
	}
	q := c.Queue(1)
	if err := c.Send(setVringNum, u32(1, uint32(q.Size))); err != nil {
		return err
	}
	for name, p := range places {
		var refused *frontend.Refused
		if err := q.SetAddr(p[0], p[1], p[2]); !errors.As(err, &refused) {
			return fmt.Errorf("%s: %v, want a refusal", name, err)
		}
	}
	return q.SetAddr(q.DescGPA, q.AvailGPA, q.UsedGPA)
}

func hugeHeader(_ *Target, c *frontend.Client) error {
	return c.Message(setOwner, 1, 0xfffffff0, nil)
}

func wrongVersion(_ *Target, c *frontend.Client) error {
	return c.Message(setOwner, 2, 0, nil)
}

func unknownMessage(_ *Target, c *frontend.Client) error {
	return c.Message(9999, 1, 0, nil)
}

func shortPayload(_ *Target, c *frontend.Client) error {
	return c.Message(setVringAddr, 1, 4, u32(1))
}

// strayDescriptors attaches files to a message that takes none.
func strayDescriptors(_ *Target, c *frontend.Client) error {
	f, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	if err := c.Message(setOwner, 1, 0, nil, fd, fd, fd); err != nil {
		return err
	}
	return c.Negotiate()
}

// vringBase asks for the base of a ring that runs and of one that does not.
func vringBase(t *Target, c *frontend.Client) error {
	if err := submit(t, c); err != nil {
		return err
	}
	for _, want := range []uint16{1, 1} {
		if base, err := c.Queue(1).Stop(); err != nil || base != want {
			return fmt.Errorf("base = %d, %v, want %d", base, err, want)
		}
	}
	return t.Alive(c, 0)
}

// cut ends the connection after half a header.
func cut(_ *Target, c *frontend.Client) error {
	return c.Message(getVringBase, 1, 8, u32(1))
}
