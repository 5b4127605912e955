// Package agentclient talks to a guest agent through a sandbox's agent.sock.
//
// A Conn serves one operation at a time: an exec or a file operation. A caller
// that does several things at once opens several connections, which cost a
// local connect each; so the back-pressure of a reader that does not read is
// the socket's own, and holds back nobody else.
package agentclient

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// handshakeTime bounds how long a relay may take to greet.
const handshakeTime = 10 * time.Second

// Conn is one connection to a relay.
type Conn struct {
	conn net.Conn
	in   *agentproto.Reader
	id   uint32 // of the session under way
	last uint32 // first id that is not ours

	wmu sync.Mutex
	out *agentproto.Writer // guarded by wmu

	Ready agentproto.Ready
}

// Dial connects to the relay at a socket path. A socket that is not there or
// does not answer gives errdefs.SandboxNotRunning.
func Dial(ctx context.Context, path string) (*Conn, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox is not running")
	}
	c, err := handshake(ctx, nc)
	if err != nil {
		nc.Close()
		return nil, errdefs.Wrap(errdefs.SandboxNotRunning, err, "guest agent does not answer")
	}
	return c, nil
}

func handshake(ctx context.Context, nc net.Conn) (*Conn, error) {
	defer interrupt(ctx, nc)()
	_ = nc.SetReadDeadline(time.Now().Add(handshakeTime))
	r := bufio.NewReaderSize(nc, 64<<10)
	var ids [8]byte
	if _, err := io.ReadFull(r, ids[:]); err != nil {
		return nil, err
	}
	c := &Conn{conn: nc, in: agentproto.NewReader(r, agentproto.MaxFrame), out: agentproto.NewWriter(nc, agentproto.MaxFrame)}
	c.id, c.last = binary.BigEndian.Uint32(ids[:4]), binary.BigEndian.Uint32(ids[4:])
	if c.id == 0 || c.id >= c.last {
		return nil, fmt.Errorf("id range %d to %d", c.id, c.last)
	}
	c.id-- // next takes the first one
	f, err := c.in.ReadFrame()
	if err != nil {
		return nil, err
	}
	t, _, p, err := agentproto.Decode(f.Body)
	if err != nil {
		return nil, err
	}
	if t != agentproto.MsgReady {
		return nil, fmt.Errorf("first frame is %q", t)
	}
	_ = nc.SetReadDeadline(time.Time{})
	return c, agentproto.Unmarshal(p, &c.Ready)
}

// interrupt makes blocked reads and writes end when ctx does; the returned
// function takes that back.
func interrupt(ctx context.Context, nc net.Conn) (release func()) {
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

// Close ends the connection; the guest kills what it still runs for it.
func (c *Conn) Close() error { return c.conn.Close() }

// next begins a session.
func (c *Conn) next() error {
	if c.id+1 >= c.last {
		return errors.New("agent connection has no ids left")
	}
	c.id++
	return nil
}

func (c *Conn) send(t string, flags uint8, payload any) error {
	body, err := agentproto.Encode(t, payload)
	if err != nil {
		return err
	}
	return c.sendBody(flags, body)
}

func (c *Conn) sendBody(flags uint8, body []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return c.out.WriteFrame(agentproto.Frame{ID: c.id, Flags: flags, Body: body})
}

// sendData sends one chunk; no data is the end of input.
func (c *Conn) sendData(t string, data []byte) error {
	for {
		n := min(len(data), agentproto.MaxData)
		if err := c.sendBody(0, agentproto.EncodeData(t, data[:n])); err != nil {
			return err
		}
		if data = data[n:]; len(data) == 0 {
			return nil
		}
	}
}

// message is one frame of the present session.
type message struct {
	kind     string
	payload  []byte
	terminal bool
}

// receive returns the next frame of the session; frames of earlier ones are
// skipped. The end of the connection is an error: a session ends with a frame.
func (c *Conn) receive() (message, error) {
	for {
		f, err := c.in.ReadFrame()
		if err != nil {
			return message{}, err
		}
		if f.ID != c.id {
			continue
		}
		t, _, p, err := agentproto.Decode(f.Body)
		if err != nil {
			return message{}, err
		}
		return message{t, p, f.Flags&agentproto.FlagTerminal != 0}, nil
	}
}

// lost explains a connection that ended inside a session.
func lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox stopped while it was serving the request")
}

func refused(p []byte) error {
	var e agentproto.Error
	if err := agentproto.Unmarshal(p, &e); err != nil {
		return err
	}
	return errdefs.New(errdefs.InvalidArgument, "guest agent refused the request: %s", e.Message)
}
