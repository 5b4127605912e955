package frontend

import (
	"errors"
	"fmt"
	"net"
	"sync"
)

// Device and protocol feature bits.
const (
	FeatureIndirect = 1 << 28
	FeatureEventIdx = 1 << 29
	FeatureProtocol = 1 << 30
	FeatureVersion1 = 1 << 32

	ProtocolMQ       = 1 << 0
	ProtocolReplyAck = 1 << 3
	ProtocolConfig   = 1 << 9
	ProtocolMemSlots = 1 << 15
)

// Options describe the machine that a Client pretends to be.
type Options struct {
	Queues     int  // virtqueues to set up, high-priority queue included; 0 means 2
	QueueSize  int  // ring size, a power of two; 0 means 1024
	MemMiB     int  // guest memory; 0 means 64
	Regions    int  // adjacent regions that memory is split into; 0 means 1
	NoEventIdx bool // do not negotiate EVENT_IDX
	NoIndirect bool // do not negotiate INDIRECT_DESC
	MemTable   bool // use SET_MEM_TABLE instead of ADD_MEM_REG
	Unsealed   bool // let Truncate take guest memory away
	Manual     bool // only connect and make memory; the caller sends every message
}

func (o Options) withDefaults() Options {
	if o.Queues == 0 {
		o.Queues = 2
	}
	if o.QueueSize == 0 {
		o.QueueSize = 1024
	}
	if o.MemMiB == 0 {
		o.MemMiB = 64
	}
	if o.Regions == 0 {
		o.Regions = 1
	}
	return o
}

// ErrDisconnected is returned when the device has closed the connection.
var ErrDisconnected = errors.New("vhost-user device closed the connection")

// Client is the VMM's side of one vhost-user connection, with guest memory of
// its own.
type Client struct {
	opts   Options
	wire   *wire
	mem    *Memory
	queues []*Queue

	Features  uint64 // negotiated, set by Negotiate
	Protocol  uint64
	MaxQueues int

	closing sync.Once
	watched chan struct{} // closed when the queues know that the device is gone
}

// Connect negotiates, shares memory and starts all queues. It owns conn.
func Connect(conn *net.UnixConn, o Options) (*Client, error) {
	o = o.withDefaults()
	c := &Client{opts: o, wire: newWire(conn)}
	var err error
	if c.mem, err = newMemory(o); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	for i := range o.Queues {
		q, err := newQueue(c, i)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.queues = append(c.queues, q)
	}
	c.watched = make(chan struct{})
	go c.watch()
	if o.Manual {
		return c, nil
	}
	if err := c.setUp(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// watch wakes everybody who waits for a completion when the device is gone.
func (c *Client) watch() {
	defer close(c.watched)
	<-c.wire.dead
	for _, q := range c.queues {
		writeEvent(q.stopping)
	}
}

// setUp does what QEMU does from realize to DRIVER_OK, in its order.
func (c *Client) setUp() error {
	if err := c.Negotiate(); err != nil {
		return fmt.Errorf("negotiate: %w", err)
	}
	if err := c.ShareMemory(); err != nil {
		return fmt.Errorf("share memory: %w", err)
	}
	for _, q := range c.queues {
		if err := q.Start(0); err != nil {
			return fmt.Errorf("start queue %d: %w", q.Index, err)
		}
	}
	return nil
}

// Negotiate agrees on features.
func (c *Client) Negotiate() error {
	offered, err := c.wire.callU64(msgGetFeatures)
	if err != nil {
		return err
	}
	c.Features = offered & (FeatureProtocol | FeatureVersion1 | FeatureIndirect | FeatureEventIdx)
	if c.opts.NoEventIdx {
		c.Features &^= FeatureEventIdx
	}
	if c.opts.NoIndirect {
		c.Features &^= FeatureIndirect
	}
	if offered&FeatureProtocol != 0 {
		if err := c.negotiateProtocol(); err != nil {
			return err
		}
	}
	if err := c.wire.send(msgSetOwner, nil); err != nil {
		return err
	}
	return c.wire.send(msgSetFeatures, u64(c.Features))
}

func (c *Client) negotiateProtocol() error {
	offered, err := c.wire.callU64(msgGetProtocolFeatures)
	if err != nil {
		return err
	}
	c.Protocol = offered & (ProtocolMQ | ProtocolReplyAck | ProtocolMemSlots | ProtocolConfig)
	if c.opts.MemTable {
		c.Protocol &^= ProtocolMemSlots
	}
	if err := c.wire.send(msgSetProtocolFeatures, u64(c.Protocol)); err != nil {
		return err
	}
	c.wire.acks = c.Protocol&ProtocolReplyAck != 0
	if c.Protocol&ProtocolMQ != 0 {
		n, err := c.wire.callU64(msgGetQueueNum)
		if err != nil {
			return err
		}
		c.MaxQueues = int(n)
	}
	return nil
}

// ShareMemory tells the device about guest memory.
func (c *Client) ShareMemory() error {
	if c.Protocol&ProtocolMemSlots == 0 {
		return c.SetMemTable(c.mem.Regions...)
	}
	for _, r := range c.mem.Regions {
		if err := c.AddRegion(r); err != nil {
			return err
		}
	}
	return nil
}

// Memory returns guest memory.
func (c *Client) Memory() *Memory { return c.mem }

// Queue returns the i-th queue; 0 is the high-priority one.
func (c *Client) Queue(i int) *Queue { return c.queues[i] }

// Done is closed when the device has closed the connection.
func (c *Client) Done() <-chan struct{} { return c.wire.dead }

// Do sends one request on queue q (0 is the high-priority queue) and waits for
// its completion. in are the device-readable parts, outLens the lengths of the
// device-writable parts; parts above 4096 bytes are described page by page in
// pages that are not adjacent, as a Linux guest does. The reply is as long as
// the used length the device reported. Safe for concurrent use.
func (c *Client) Do(q int, in [][]byte, outLens []int) (reply []byte, err error) {
	return c.queues[q].do(in, outLens)
}

// Close ends the connection, which stops all queues, and unmaps guest memory.
// Calls of Do that are under way return ErrDisconnected; no other call may be
// under way or follow.
func (c *Client) Close() error {
	var err error
	c.closing.Do(func() {
		err = c.wire.close()
		if c.watched != nil {
			<-c.watched
		}
		for _, q := range c.queues {
			q.close()
		}
		if c.mem != nil {
			err = errors.Join(err, c.mem.close())
		}
	})
	return err
}
