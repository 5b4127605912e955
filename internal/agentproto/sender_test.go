package agentproto

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
)

// link returns a sender whose frames arrive at the reader.
func link(t *testing.T) (*Sender, *LinkReader) {
	t.Helper()
	a, b := net.Pipe()
	s := NewSender(a)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run() }()
	t.Cleanup(func() { s.Close(io.EOF); a.Close(); b.Close(); <-done })
	return s, NewLinkReader(b, MaxLinkFrame)
}

func read(t *testing.T, r *LinkReader) (Frame, string, []byte) {
	t.Helper()
	f, err := r.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	typ, _, p, err := Decode(f.Body)
	if err != nil {
		t.Fatal(err)
	}
	return f, typ, p
}

func TestSenderStopsWithoutCredit(t *testing.T) {
	s, r := link(t)
	one, two := s.Open(1), s.Open(2)
	chunk := make([]byte, MaxData)
	sent := make(chan error)
	go func() {
		for {
			err := one.Data(MsgStdout, chunk)
			sent <- err
			if err != nil {
				return
			}
		}
	}()
	got := 0
	for range 4 { // four full frames fit a window
		<-sent
		f, _, _ := read(t, r)
		got += len(f.Body)
	}
	// The fifth waits; another session and control frames do not.
	if err := two.Data(MsgStdout, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if f, _, _ := read(t, r); f.ID != 2 {
		t.Fatalf("frame of id %d while it has no credit", f.ID)
	}
	if err := s.Control(Frame{ID: 1, Body: MustEncode(MsgStarted, Started{PID: 7})}); err != nil {
		t.Fatal(err)
	}
	if _, typ, _ := read(t, r); typ != MsgStarted {
		t.Fatalf("got %s", typ)
	}
	select {
	case err := <-sent:
		t.Fatalf("Data returned %v without credit", err)
	default:
	}
	s.Credit(1, uint32(got))
	<-sent
	if f, _, _ := read(t, r); f.ID != 1 || f.Flags != FlagData {
		t.Fatalf("frame %d %b after credit", f.ID, f.Flags)
	}
	for range 3 {
		<-sent
		read(t, r)
	}
	s.Drop(1)
	if err := <-sent; !errors.Is(err, ErrNoSession) {
		t.Errorf("Data after Drop: %v", err)
	}
}

func TestSenderFinalComesLast(t *testing.T) {
	s, r := link(t)
	one := s.Open(1)
	if err := one.Data(MsgStdout, []byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := one.Final(FlagTerminal, MustEncode(MsgExited, Exited{Code: 3})); err != nil {
		t.Fatal(err)
	}
	if err := one.Data(MsgStdout, []byte("late")); !errors.Is(err, ErrNoSession) {
		t.Errorf("Data after Final: %v", err)
	}
	if _, typ, _ := read(t, r); typ != MsgStdout {
		t.Fatalf("first frame is %s", typ)
	}
	if f, typ, _ := read(t, r); typ != MsgExited || f.Flags != FlagTerminal {
		t.Fatalf("second frame is %s %b", typ, f.Flags)
	}
	if err := one.Final(0, nil); !errors.Is(err, ErrNoSession) {
		t.Errorf("second Final: %v", err)
	}
}

func TestLinkJoinsLongFrames(t *testing.T) {
	s, r := link(t)
	list := make([]FSEntry, 9000)
	for i := range list {
		list[i] = FSEntry{Path: "/a/file/with/some/longer/name", Kind: KindFile}
	}
	nine := s.Open(9)
	body := MustEncode(MsgFSResponse, FSResponse{OK: true, Data: &FSData{List: &list}})
	if len(body) < 5*MaxLinkFrame {
		t.Fatalf("only %d bytes", len(body))
	}
	if err := nine.Final(FlagTerminal, body); err != nil {
		t.Fatal(err)
	}
	f, err := r.ReadFrame()
	if err != nil || f.Flags != FlagTerminal || !bytes.Equal(f.Body, body) {
		t.Fatalf("%d of %d bytes, flags %b, %v", len(f.Body), len(body), f.Flags, err)
	}
}

func TestLinkReaderBoundsParts(t *testing.T) {
	part := Frame{ID: 1, Flags: FlagMore, Body: make([]byte, maxFragment)}
	var endless bytes.Buffer
	for range MaxFrame/maxFragment + 2 {
		endless.Write(AppendFrame(nil, part))
	}
	if _, err := NewLinkReader(&endless, MaxLinkFrame).ReadFrame(); !errors.Is(err, ErrFrameLength) {
		t.Errorf("endless parts: %v", err)
	}
	var many bytes.Buffer
	for id := range uint32(maxPartial/maxFragment + 2) {
		part.ID = id
		many.Write(AppendFrame(nil, part))
	}
	if _, err := NewLinkReader(&many, MaxLinkFrame).ReadFrame(); !errors.Is(err, ErrFrameLength) {
		t.Errorf("parts of many ids: %v", err)
	}
}

func TestSenderClampsCreditAndStalls(t *testing.T) {
	s := NewSender(io.Discard) // Run is not called: nothing is read
	s.Open(1)
	s.Credit(1, 1<<31)
	for range 4 {
		if s.sessions[1].credit > Window {
			t.Fatalf("credit %d", s.sessions[1].credit)
		}
	}
	body := make([]byte, 1<<20)
	var err error
	for range maxControl/len(body) + 1 {
		err = s.Control(Frame{Body: body})
	}
	if !errors.Is(err, ErrLinkStalled) {
		t.Errorf("unread control frames: %v", err)
	}
}

func TestMeterNeverStarves(t *testing.T) {
	var m Meter
	avail := Window
	for range 10000 {
		frame := MaxData + DataOverhead
		if avail < frame {
			t.Fatalf("sender starves with %d", avail)
		}
		avail -= frame
		avail += int(m.Add(frame))
	}
}

// TestStreamOutlivedByItsID: an operation that ends after its client has gone
// must not answer the next client that gets the id.
func TestStreamOutlivedByItsID(t *testing.T) {
	s, r := link(t)
	old := s.Open(1)
	s.Drop(1)
	fresh := s.Open(1)
	for name, err := range map[string]error{
		"Data": old.Data(MsgFSData, []byte("stale")), "Final": old.Final(FlagTerminal, nil), "Control": old.Control(nil),
	} {
		if !errors.Is(err, ErrNoSession) {
			t.Errorf("%s on a dropped stream: %v", name, err)
		}
	}
	if err := fresh.Data(MsgFSData, []byte("new")); err != nil {
		t.Fatal(err)
	}
	if _, _, p := read(t, r); !bytes.HasSuffix(p, []byte("new")) {
		t.Errorf("got %q", p)
	}
	if err := s.Drain(); err != nil {
		t.Errorf("Drain: %v", err)
	}
}
