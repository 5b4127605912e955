package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

// Options describe the device that Serve offers.
type Options struct {
	Queues    int    // virtqueues, high-priority queue included; 0 means 2
	QueueSize int    // largest ring accepted, a power of two; 0 means 1024
	Config    []byte // virtio configuration space; nil: the CONFIG feature is not offered (QEMU 7.1 to 8.0 crash on it)

	// Logf takes notes about broken queues and refused messages, at most one
	// a second; nil drops them. It is called without locks held.
	Logf func(format string, args ...any)
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

// Serve runs one device on one front-end connection. It returns nil when the
// peer closes, ctx.Err() when ctx ends, and a *ProtocolError when the peer
// breaks the protocol. Every queue thread has ended then and conn is closed;
// requests still detached may complete later, into nothing.
func Serve(ctx context.Context, conn *net.UnixConn, h Handler, o Options) error {
	return errors.ErrUnsupported
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
