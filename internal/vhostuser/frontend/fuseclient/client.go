// Package fuseclient speaks FUSE to a virtio-fs device through a front end, one
// request at a time: what tests and the set-up of benchmarks need of a guest's
// kernel. It checks every reply as Linux 7.1 does.
package fuseclient

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// Flags of INIT as Debian's Linux 6.1 sends them.
const (
	initFlags  = 0x7bfffffb
	initFlags2 = 0x0000000b
)

// Client is one mount. Its methods may be called from any goroutine.
type Client struct {
	Init     fusewire.InitOut
	UID, GID uint32 // of the caller in every request
	Queue    int    // request queue to use

	c      *frontend.Client
	unique atomic.Uint64
}

// Mount sends INIT through request queue 1.
func Mount(c *frontend.Client) (*Client, error) { return MountOn(c, 1) }

// MountOn sends INIT, and then every other request, through this queue.
func MountOn(c *frontend.Client, queue int) (*Client, error) {
	m := &Client{c: c, Queue: queue}
	in := fusewire.InitIn{Major: fusewire.Major, Minor: 38, MaxReadahead: 128 << 10, Flags: initFlags, Flags2: initFlags2}
	b, err := m.Call(fusewire.OpInit, 0, fusewire.InitOutSize, fusewire.Append(nil, &in))
	if err != nil {
		return nil, fmt.Errorf("INIT: %w", err)
	}
	if _, ok := fusewire.Decode(b, &m.Init); !ok {
		return nil, fmt.Errorf("INIT: reply of %d bytes", len(b))
	}
	return m, nil
}

// Header returns the header of a request with args bytes after it.
func (m *Client) Header(op fusewire.Opcode, node uint64, args int) []byte {
	h := fusewire.InHeader{
		Len: uint32(fusewire.InHeaderSize + args), Opcode: op, Unique: 2 * m.unique.Add(1),
		NodeID: node, UID: m.UID, GID: m.GID, PID: 4711,
	}
	return fusewire.Append(nil, &h)
}

// Call sends one request and returns what follows the reply's header. out is
// the room for that; above 4096 bytes it is given page by page. The error is a
// syscall.Errno if the server sent one.
func (m *Client) Call(op fusewire.Opcode, node uint64, out int, args ...[]byte) ([]byte, error) {
	n := 0
	for _, a := range args {
		n += len(a)
	}
	h := m.Header(op, node, n)
	var room []int
	if !silent(op) {
		room = append(room, fusewire.OutHeaderSize)
		if out > 0 {
			room = append(room, out)
		}
	}
	reply, err := m.c.Do(m.queueOf(op), append([][]byte{h}, args...), room)
	if err != nil || silent(op) {
		return nil, err
	}
	return checkReply(h, reply)
}

// silent reports whether the request gets no reply.
func silent(op fusewire.Opcode) bool {
	return op == fusewire.OpForget || op == fusewire.OpBatchForget || op == fusewire.OpInterrupt
}

func (m *Client) queueOf(op fusewire.Opcode) int {
	if silent(op) {
		return 0
	}
	return m.Queue
}

// checkReply verifies a reply as Linux 7.1 does: used length, length in the
// header and unique must agree.
func checkReply(request, reply []byte) ([]byte, error) {
	var in fusewire.InHeader
	var out fusewire.OutHeader
	fusewire.Decode(request, &in)
	body, ok := fusewire.Decode(reply, &out)
	switch {
	case !ok:
		return nil, fmt.Errorf("opcode %d: reply of %d bytes", in.Opcode, len(reply))
	case int(out.Len) != len(reply):
		return nil, fmt.Errorf("opcode %d: reply says %d bytes, used length is %d", in.Opcode, out.Len, len(reply))
	case out.Unique != in.Unique:
		return nil, fmt.Errorf("opcode %d: reply to request %d, want %d", in.Opcode, out.Unique, in.Unique)
	case out.Error > 0 || out.Error <= -1000:
		return nil, fmt.Errorf("opcode %d: error %d", in.Opcode, out.Error)
	case out.Error != 0 && len(body) != 0:
		return nil, fmt.Errorf("opcode %d: error with %d bytes", in.Opcode, len(body))
	case out.Error != 0:
		return nil, syscall.Errno(-out.Error)
	}
	return body, nil
}

// name returns s as it travels.
func name(s string) []byte { return append([]byte(s), 0) }
