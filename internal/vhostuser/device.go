package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"syscall"
)

// Options describe the device that Serve offers.
type Options struct {
	Queues    int    // virtqueues, high-priority queue included; 0 means 2
	QueueSize int    // largest ring accepted, a power of two up to 1024; 0 means 1024
	Config    []byte // virtio configuration space; nil: the CONFIG feature is not offered (QEMU 7.1 to 8.0 crash on it)

	// Logf takes notes about broken queues and refused messages, at most one
	// a second; nil drops them. It is called without locks held.
	Logf func(format string, args ...any)
}

func (o Options) withDefaults() (Options, error) {
	if o.Queues == 0 {
		o.Queues = 2
	}
	if o.QueueSize == 0 {
		o.QueueSize = maxRingSize
	}
	if o.Queues < 1 || o.Queues > 64 {
		return o, fmt.Errorf("vhost-user device with %d queues", o.Queues)
	}
	if n := o.QueueSize; n < 1 || n > maxRingSize || n&(n-1) != 0 {
		return o, fmt.Errorf("vhost-user device with queues of %d", n)
	}
	if len(o.Config) > maxConfig {
		return o, fmt.Errorf("vhost-user device with %d bytes of configuration", len(o.Config))
	}
	return o, nil
}

// FileConn makes a connection of an inherited socket descriptor (one end of a
// socket pair, or an accepted connection). It takes its own duplicate; the
// caller still closes f.
func FileConn(f *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%s: not a unix socket", f.Name()), c.Close())
	}
	return u, nil
}

// ProtocolError says why a connection was ended: the front end sent something
// that cannot be obeyed and cannot be refused.
type ProtocolError struct {
	Request uint32 // vhost-user message number
	Reason  string
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("vhost-user message %d: %s", e.Request, e.Reason)
}

// device is one served connection. Everything in it belongs to the control
// loop; queues read features and mem only when called from it.
type device struct {
	opts     Options
	handler  Handler
	link     link
	queues   []*queue
	mem      *memory
	features uint64
	protocol uint64
	enables  bool // rings need SET_VRING_ENABLE
	log      limiter
}

// Serve runs one device on one front-end connection. It returns nil when the
// peer closes, ctx.Err() when ctx ends, and a *ProtocolError when the peer
// breaks the protocol. It owns conn. When it returns every queue's thread has
// ended, for which it waits until their handlers return; requests that are
// still detached may be completed later, into nothing.
func Serve(ctx context.Context, conn *net.UnixConn, h Handler, o Options) error {
	d, err := newDevice(conn, h, o)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	unhook := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer unhook()
	err = d.control()
	_ = conn.Close()
	d.close()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func newDevice(conn *net.UnixConn, h Handler, o Options) (*device, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	d := &device{opts: o, handler: h, link: link{conn: conn}, log: limiter{to: o.Logf}}
	if d.mem, err = newMemory(nil); err != nil {
		return nil, err
	}
	for i := range o.Queues {
		q, err := newQueue(d, i)
		if err != nil {
			d.close()
			return nil, err
		}
		d.queues = append(d.queues, q)
		go q.run()
	}
	return d, nil
}

// close ends all queues and joins their threads.
func (d *device) close() {
	for _, q := range d.queues {
		q.end()
	}
	for _, q := range d.queues {
		q.join()
	}
	d.mem.release()
}

// memory returns the current generation with a reference for the caller.
func (d *device) memory() *memory { return d.mem.retain() }

// setMemory makes m the current generation. The old one stays mapped until the
// last request in flight has ended; nobody waits for that.
func (d *device) setMemory(m *memory) {
	old := d.mem
	d.mem = m
	for _, q := range d.queues {
		q.refresh()
	}
	old.release()
}

// control answers messages until the connection ends. It never waits for a
// request, but for the bounded grace of GET_VRING_BASE: the front end may hold
// its big lock until it has an answer.
func (d *device) control() (err error) {
	defer guardControl(debug.SetPanicOnFault(true), &err)
	for {
		m, err := d.link.read()
		if err == nil {
			err = d.answer(m)
			m.close()
		}
		if hungUp(err) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// hungUp reports whether err means that the connection was closed, by the peer
// between two messages or by us.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// guardControl is deferred: touching a ring whose memory is gone ends the
// connection, not the process.
func guardControl(old bool, err *error) {
	debug.SetPanicOnFault(old)
	if p := recover(); p != nil {
		if !isFault(p, nil) {
			panic(p)
		}
		*err = &ProtocolError{Reason: errGuestMemory.Error()}
	}
}

// answer obeys one message. A message that cannot be obeyed is refused if the
// front end asked for an acknowledgement, else the connection ends: going on
// would leave the two sides with different ideas of the device.
func (d *device) answer(m *message) error {
	acks := m.flags&flagNeedAck != 0 && d.protocol&protoReplyAck != 0
	replied, err := d.dispatch(m)
	var broken *ProtocolError
	switch {
	case errors.As(err, &broken) || replied:
		return err
	case err != nil && !acks:
		return m.errf("%v", err)
	case err != nil:
		d.logf("message %d refused: %v", m.request, err)
		return d.link.replyU64(m, 1)
	case acks:
		return d.link.replyU64(m, 0)
	}
	return nil
}

func (d *device) logf(format string, args ...any) { d.log.printf(format, args...) }
