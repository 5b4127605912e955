package frontend

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// Message numbers.
const (
	msgGetFeatures         = 1
	msgSetFeatures         = 2
	msgSetOwner            = 3
	msgSetMemTable         = 5
	msgSetVringNum         = 8
	msgSetVringAddr        = 9
	msgSetVringBase        = 10
	msgGetVringBase        = 11
	msgSetVringKick        = 12
	msgSetVringCall        = 13
	msgSetVringErr         = 14
	msgGetProtocolFeatures = 15
	msgSetProtocolFeatures = 16
	msgGetQueueNum         = 17
	msgSetVringEnable      = 18
	msgGetConfig           = 24
	msgAddMemReg           = 37
	msgRemMemReg           = 38

	headerSize  = 12
	flagVersion = 1
	flagReply   = 1 << 2
	flagAck     = 1 << 3
)

// wire sends messages and waits for their replies, one at a time. A goroutine
// reads all the time, so that the end of the connection is noticed by who waits
// for something else.
type wire struct {
	conn    *net.UnixConn
	mu      sync.Mutex // held over a message and its reply
	acks    bool       // REPLY_ACK was negotiated
	replies chan []byte
	dead    chan struct{}
}

func newWire(conn *net.UnixConn) *wire {
	w := &wire{conn: conn, replies: make(chan []byte, 1), dead: make(chan struct{})}
	go w.read()
	return w
}

func (w *wire) read() {
	defer close(w.dead)
	for {
		h := make([]byte, headerSize)
		if _, err := io.ReadFull(w.conn, h); err != nil {
			return
		}
		n := binary.LittleEndian.Uint32(h[8:])
		if n > 1<<16 {
			return
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(w.conn, p); err != nil {
			return
		}
		w.replies <- p
	}
}

func (w *wire) close() error {
	err := w.conn.Close()
	for {
		select {
		case <-w.replies:
		case <-w.dead:
			return err
		}
	}
}

// write sends one message with any header.
func (w *wire) write(request, flags, size uint32, payload []byte, fds []int) error {
	b := binary.LittleEndian.AppendUint32(nil, request)
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = binary.LittleEndian.AppendUint32(b, size)
	b = append(b, payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, oobn, err := w.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && (n != len(b) || oobn != len(oob)) {
		err = io.ErrShortWrite
	}
	return err
}

// send sends a message that has no reply of its own, and waits for the
// acknowledgement if there is one.
func (w *wire) send(request uint32, payload []byte, fds ...int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	flags := uint32(flagVersion)
	if w.acks {
		flags |= flagAck
	}
	if err := w.write(request, flags, uint32(len(payload)), payload, fds); err != nil || !w.acks {
		return err
	}
	p, err := w.reply()
	if err != nil {
		return err
	}
	if len(p) != 8 || binary.LittleEndian.Uint64(p) != 0 {
		return &Refused{Request: request}
	}
	return nil
}

// call sends a message and returns the payload of its reply.
func (w *wire) call(request uint32, payload []byte) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.write(request, flagVersion, uint32(len(payload)), payload, nil); err != nil {
		return nil, err
	}
	return w.reply()
}

func (w *wire) callU64(request uint32) (uint64, error) {
	p, err := w.call(request, nil)
	if err != nil {
		return 0, err
	}
	if len(p) != 8 {
		return 0, fmt.Errorf("message %d: reply of %d bytes", request, len(p))
	}
	return binary.LittleEndian.Uint64(p), nil
}

func (w *wire) reply() ([]byte, error) {
	select {
	case p := <-w.replies:
		return p, nil
	case <-w.dead:
		return nil, ErrDisconnected
	}
}

// Refused is returned when the device answers a message with a refusal.
type Refused struct{ Request uint32 }

func (e *Refused) Error() string { return fmt.Sprintf("vhost-user message %d was refused", e.Request) }

// Message sends one message as it is, with any header size, and does not wait
// for a reply.
func (c *Client) Message(request, flags, size uint32, payload []byte, fds ...int) error {
	return c.wire.write(request, flags, size, payload, fds)
}

// Send sends one message and waits for the acknowledgement if REPLY_ACK was
// negotiated; a refusal is a *Refused.
func (c *Client) Send(request uint32, payload []byte, fds ...int) error {
	return c.wire.send(request, payload, fds...)
}

// Call sends one message and returns the payload of its reply.
func (c *Client) Call(request uint32, payload []byte) ([]byte, error) {
	return c.wire.call(request, payload)
}

// Config reads n bytes of the configuration space.
func (c *Client) Config(off, n uint32) ([]byte, error) {
	p := append(u32(off, n, 0), make([]byte, n)...)
	b, err := c.wire.call(msgGetConfig, p)
	if err != nil || len(b) < 12 {
		return nil, err
	}
	return b[12:], nil
}

func u64(v ...uint64) []byte {
	var b []byte
	for _, x := range v {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

func u32(v ...uint32) []byte {
	var b []byte
	for _, x := range v {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}
