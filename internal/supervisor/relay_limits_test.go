package supervisor

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// rawClient is a client that sends what it likes.
type rawClient struct {
	net.Conn
	in    *agentproto.Reader
	first uint32
}

func dialRaw(t *testing.T, socket string) *rawClient {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	var ids [8]byte
	if _, err := io.ReadFull(conn, ids[:]); err != nil {
		t.Fatal(err)
	}
	c := &rawClient{conn, agentproto.NewReader(conn, agentproto.MaxFrame), binary.BigEndian.Uint32(ids[:4])}
	if got := c.next(t); got != agentproto.MsgReady {
		t.Fatalf("first frame is %q", got)
	}
	return c
}

func (c *rawClient) next(t *testing.T) string {
	t.Helper()
	f, err := c.in.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	kind, _, _, err := agentproto.Decode(f.Body)
	if err != nil {
		t.Fatal(err)
	}
	return kind
}

func (c *rawClient) send(t *testing.T, id uint32, kind string, payload any) {
	t.Helper()
	if err := agentproto.WriteFrame(c, agentproto.Frame{ID: id, Body: agentproto.MustEncode(kind, payload)}); err != nil {
		t.Fatal(err)
	}
}

// TestRelayRefusesLargeMessages: what does not fit the link is refused to its
// sender; it does not end the link of everybody.
func TestRelayRefusesLargeMessages(t *testing.T) {
	socket, g := newRelayUnderTest(t)
	c := dialRaw(t, socket)
	large := make([]byte, maxRequest)
	for _, kind := range []string{agentproto.MsgPing, agentproto.MsgSignal, agentproto.MsgExec, agentproto.MsgFSRequest} {
		c.send(t, c.first, kind, map[string]any{"x": large})
		if got := c.next(t); got != agentproto.MsgError {
			t.Errorf("%s: answer %q", kind, got)
		}
	}
	select {
	case <-g.gone:
		t.Error("link has ended")
	default:
	}
}

// TestRelayEndsForeignIDs: a client that uses the ids of another is cut off.
func TestRelayEndsForeignIDs(t *testing.T) {
	socket, g := newRelayUnderTest(t)
	honest, other := dialRaw(t, socket), dialRaw(t, socket)
	other.send(t, honest.first, agentproto.MsgExec, agentproto.Exec{Cmd: "true"})
	if _, err := other.in.ReadFrame(); err == nil {
		t.Error("a foreign id was accepted")
	}
	honest.send(t, honest.first, agentproto.MsgExec, agentproto.Exec{Cmd: "true"})
	if got := honest.next(t); got != agentproto.MsgStarted {
		t.Errorf("answer %q", got)
	}
	select {
	case <-g.gone:
		t.Error("link has ended")
	default:
	}
}

// TestStopOnFullLink: a guest that takes nothing, as one whose VMM is stopped,
// cannot make a stop wait, nor hold the relay's end.
func TestStopOnFullLink(t *testing.T) {
	here, there := net.Pipe() // nobody reads there
	log, err := openOutputLog(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer log.close()
	r := newRelay(here, log)
	r.ready = agentproto.MustEncode(agentproto.MsgReady, agentproto.Ready{})
	go r.run(agentproto.NewLinkReader(here, agentproto.MaxLinkFrame))
	client, peer := net.Pipe() // and this client reads nothing
	c, err := r.admit(peer)
	if err != nil {
		t.Fatal(err)
	}
	go func() { defer r.clientsDone.Done(); c.run() }()
	go func() {
		var skip [64 << 10]byte
		_, _ = client.Read(skip[:8])
		for {
			if agentproto.WriteFrame(client, agentproto.Frame{ID: c.first, Body: agentproto.MustEncode(agentproto.MsgPing, struct{}{})}) != nil {
				return
			}
		}
	}()
	full := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.control) >= maxControlQueue
	}
	for !full() {
		time.Sleep(time.Millisecond)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := r.stopGuest(time.Second); err != nil {
			t.Error(err)
		}
		r.close(nil)
		r.wait()
	}()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("stop waits for a full link")
	}
	there.Close()
	client.Close()
}
