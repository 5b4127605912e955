package supervisor

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// fakeGuest is the far end of a link: it answers exec requests by the program's
// name, without the credit scheme's sender but with its accounting.
type fakeGuest struct {
	t      *testing.T
	conn   net.Conn
	out    chan agentproto.Frame
	credit chan [2]uint32 // id, bytes returned by the relay
	seen   chan string    // message types, as they arrive
	gone   chan struct{}  // closed when the link has ended
}

// newRelayUnderTest returns the socket of a relay whose guest is a fakeGuest.
func newRelayUnderTest(t *testing.T) (socket string, g *fakeGuest) {
	t.Helper()
	here, there := net.Pipe()
	dir := t.TempDir()
	log, err := openOutputLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := newRelay(here, log)
	r.ready = agentproto.MustEncode(agentproto.MsgReady, agentproto.Ready{AgentVersion: "test"})
	socket = filepath.Join(dir, "a.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g = &fakeGuest{t: t, conn: there, out: make(chan agentproto.Frame, 1<<16), credit: make(chan [2]uint32, 1<<16), seen: make(chan string, 1<<16), gone: make(chan struct{})}
	go g.write()
	go g.read()
	go r.run(agentproto.NewLinkReader(here, agentproto.MaxLinkFrame))
	served := make(chan struct{})
	go func() { r.serve(l); close(served) }()
	t.Cleanup(func() {
		l.Close()
		there.Close()
		r.close(nil)
		<-r.done
		<-served
		log.close()
	})
	return socket, g
}

func (g *fakeGuest) write() {
	w := agentproto.NewWriter(g.conn, agentproto.MaxLinkFrame)
	for f := range g.out {
		if w.WriteFrame(f) != nil {
			return
		}
	}
}

func (g *fakeGuest) read() {
	defer close(g.gone)
	in := agentproto.NewReader(g.conn, agentproto.MaxFrame)
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return
		}
		t, _, p, err := agentproto.Decode(f.Body)
		if err != nil {
			g.t.Errorf("relay sent a malformed frame: %v", err)
			return
		}
		g.seen <- t
		switch t {
		case agentproto.MsgExec:
			var x agentproto.Exec
			if err := agentproto.Unmarshal(p, &x); err != nil {
				g.t.Error(err)
				return
			}
			g.exec(f.ID, x.Cmd)
		case agentproto.MsgCredit:
			var c agentproto.Credit
			_ = agentproto.Unmarshal(p, &c)
			g.credit <- [2]uint32{f.ID, c.N}
		}
	}
}

// exec plays "true" and "flood", which fills its window at once.
func (g *fakeGuest) exec(id uint32, cmd string) {
	g.out <- agentproto.Frame{ID: id, Body: agentproto.MustEncode(agentproto.MsgStarted, agentproto.Started{PID: 7})}
	switch cmd {
	case "true":
		g.out <- agentproto.Frame{ID: id, Flags: agentproto.FlagTerminal, Body: agentproto.MustEncode(agentproto.MsgExited, agentproto.Exited{})}
	case "flood":
		body := agentproto.EncodeData(agentproto.MsgStdout, make([]byte, 32<<10))
		for sent := 0; sent+len(body) <= agentproto.Window; sent += len(body) {
			g.out <- agentproto.Frame{ID: id, Flags: agentproto.FlagData, Body: body}
		}
	}
}

func dial(t *testing.T, socket string) *agentclient.Conn {
	t.Helper()
	c, err := agentclient.Dial(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func execTrue(t *testing.T, socket string) time.Duration {
	t.Helper()
	began := time.Now()
	c := dial(t, socket)
	defer c.Close()
	x, err := c.StartExec(context.Background(), agentproto.Exec{Cmd: "true"})
	if err != nil {
		t.Fatal(err)
	}
	for {
		ev, err := x.Recv(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if ev.Kind == agentclient.Exited {
			return time.Since(began)
		}
	}
}

func TestRelayCreditsWhatAClientHasRead(t *testing.T) {
	socket, g := newRelayUnderTest(t)
	x, err := dial(t, socket).StartExec(context.Background(), agentproto.Exec{Cmd: "flood"})
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	for got < agentproto.Window*3/4 {
		ev, err := x.Recv(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		got += len(ev.Data)
	}
	returned := 0
	for returned < agentproto.Window/4 {
		select {
		case c := <-g.credit:
			returned += int(c[1])
		case <-time.After(10 * time.Second):
			t.Fatalf("%d bytes read, %d credited", got, returned)
		}
	}
}

func TestRelayStalledClientHoldsBackNobodyElse(t *testing.T) {
	socket, _ := newRelayUnderTest(t)
	for range 8 { // each fills its socket and its window, and never reads
		if _, err := dial(t, socket).StartExec(context.Background(), agentproto.Exec{Cmd: "flood"}); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		execTrue(t, socket)
	}
}

func TestRelayRefusesForeignIDsAndUnknownMessages(t *testing.T) {
	socket, _ := newRelayUnderTest(t)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var greeting [8]byte
	if _, err := conn.Read(greeting[:]); err != nil {
		t.Fatal(err)
	}
	// An id outside the range ends the connection.
	body := agentproto.MustEncode(agentproto.MsgExec, agentproto.Exec{Cmd: "true"})
	if err := agentproto.WriteFrame(conn, agentproto.Frame{ID: 1 << 31, Body: body}); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	for {
		if _, err := conn.Read(buf); err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatal("the relay kept a client that used a foreign id")
			}
			break
		}
	}
	execTrue(t, socket)
}

func TestRelayEndsProgramsOfAClientThatGoes(t *testing.T) {
	socket, g := newRelayUnderTest(t)
	c := dial(t, socket)
	if _, err := c.StartExec(context.Background(), agentproto.Exec{Cmd: "sleep"}); err != nil {
		t.Fatal(err)
	}
	for (<-g.seen) != agentproto.MsgExec {
	}
	c.Close()
	want := map[string]bool{agentproto.MsgSignal: true, agentproto.MsgClientGone: true}
	for len(want) > 0 {
		select {
		case m := <-g.seen:
			delete(want, m)
		case <-time.After(10 * time.Second):
			t.Fatalf("the guest was not told: %v", want)
		}
	}
}

func TestRelayEndsWhenAnAgentOverrunsAWindow(t *testing.T) {
	socket, g := newRelayUnderTest(t)
	if _, err := dial(t, socket).StartExec(context.Background(), agentproto.Exec{Cmd: "sleep"}); err != nil {
		t.Fatal(err)
	}
	for (<-g.seen) != agentproto.MsgExec {
	}
	// Nobody reads: what the client's socket does not take stays uncredited.
	body := agentproto.EncodeData(agentproto.MsgStdout, make([]byte, 32<<10))
	go func() {
		for range 64 * agentproto.Window / len(body) {
			g.out <- agentproto.Frame{ID: 1, Flags: agentproto.FlagData, Body: body}
		}
	}()
	select {
	case <-g.gone:
	case <-time.After(20 * time.Second):
		t.Fatal("an agent that ignores windows is still served")
	}
}
