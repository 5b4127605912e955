package agentproto

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// FlagMore marks a control frame whose body goes on in the next frame of its id.
// It is private to the link: [LinkReader] joins the parts, [Sender] makes them.
const FlagMore = 0b0100_0000

// maxFragment is the body of each part of a control frame that is too long for
// one frame of the link.
const maxFragment = MaxData

// maxControl bounds the bytes of control frames waiting for a link that the
// other side does not read.
const maxControl = 16 << 20

// Errors of a Sender.
var (
	// ErrNoSession reports a frame for an id that is not open (any more).
	ErrNoSession = errors.New("agentproto: no such session")
	// ErrLinkStalled reports a link whose other side has stopped reading.
	ErrLinkStalled = errors.New("agentproto: link stalled")
)

// Sender writes one direction of the link between supervisor and agent: control
// frames first, then the data of all sessions in turn, each within its window.
// Its methods may be called from several goroutines; Run writes.
//
// [Stream.Data] blocks its caller while the session has no credit; nothing else
// but Drain blocks.
type Sender struct {
	w io.Writer

	mu       sync.Mutex
	work     sync.Cond // signalled when there is something to write
	control  []Frame
	queued   int // bytes in control
	sessions map[uint32]*session
	turn     []*session // sessions with frames to write, in order
	writing  bool       // Run is in w.Write
	idle     sync.Cond  // signalled when nothing is left to write
	err      error
}

// session is the sending side of one id. All fields are guarded by Sender.mu.
type session struct {
	id     uint32
	credit int
	frames []Frame // data that has credit, then the final frame
	inTurn bool
	final  bool // a final frame is queued; nothing may follow
	closed bool
	room   sync.Cond
}

// NewSender returns a sender that writes to w. It starts nothing: call Run.
func NewSender(w io.Writer) *Sender {
	s := &Sender{w: w, sessions: map[uint32]*session{}}
	s.work.L, s.idle.L = &s.mu, &s.mu
	return s
}

// Stream is the sending side of one session. It stays bound to its session: once
// that is dropped its methods fail, also when the id is opened again.
type Stream struct {
	s  *Sender
	ss *session
}

// Open gives id a fresh window. An id that is open starts over; the stream it
// had is dropped.
func (s *Sender) Open(id uint32) *Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(id)
	ss := &session{id: id, credit: Window}
	ss.room.L = &s.mu
	s.sessions[id] = ss
	return &Stream{s, ss}
}

// Drop forgets id: its waiting data is thrown away and blocked calls of
// [Stream.Data] return [ErrNoSession].
func (s *Sender) Drop(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(id)
}

func (s *Sender) drop(id uint32) {
	if ss := s.sessions[id]; ss != nil {
		ss.closed, ss.frames = true, nil
		ss.room.Broadcast()
		delete(s.sessions, id)
	}
}

// Credit adds n bytes to the window of id. Unknown ids are ignored, and a
// window never grows beyond [Window], whatever the other side says.
func (s *Sender) Credit(id uint32, n uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ss := s.sessions[id]; ss != nil {
		ss.credit = int(min(int64(ss.credit)+int64(n), Window))
		ss.room.Broadcast()
	}
}

// Data sends a data frame of at most MaxData bytes. It blocks until the session
// has credit; p may be reused when it returns.
func (st *Stream) Data(typ string, p []byte) error {
	if len(p) > MaxData {
		return fmt.Errorf("%w: %d bytes of data", ErrFrameLength, len(p))
	}
	body := EncodeData(typ, p)
	s, ss := st.s, st.ss
	s.mu.Lock()
	defer s.mu.Unlock()
	for !ss.closed && !ss.final && s.err == nil && (len(ss.frames) > 0 || ss.credit < len(body)) {
		ss.room.Wait()
	}
	switch {
	case s.err != nil:
		return s.err
	case ss.closed || ss.final:
		return ErrNoSession
	}
	ss.credit -= len(body)
	s.push(ss, Frame{ID: ss.id, Flags: FlagData, Body: body})
	return nil
}

// Final sends the session's last frame behind all of its data, without credit;
// the id is forgotten once it is on its way.
func (st *Stream) Final(flags uint8, body []byte) error {
	s, ss := st.s, st.ss
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if ss.closed || ss.final {
		return ErrNoSession
	}
	for _, part := range fragments(Frame{ID: ss.id, Flags: flags, Body: body}) {
		s.push(ss, part)
	}
	ss.final = true
	return nil
}

// Control sends a control frame of the session, unless that has ended.
func (st *Stream) Control(body []byte) error {
	s, ss := st.s, st.ss
	s.mu.Lock()
	defer s.mu.Unlock()
	if ss.closed || ss.final {
		return ErrNoSession
	}
	return s.addControl(Frame{ID: ss.id, Body: body})
}

// push appends a frame to a session and puts it in turn. s.mu is held.
func (s *Sender) push(ss *session, f Frame) {
	ss.frames = append(ss.frames, f)
	if !ss.inTurn {
		ss.inTurn = true
		s.turn = append(s.turn, ss)
	}
	s.work.Signal()
}

// Control sends a frame before all data. It never blocks; when the other side
// leaves 16 MiB of control frames unread the link ends with [ErrLinkStalled].
func (s *Sender) Control(f Frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addControl(f)
}

// addControl queues a control frame. s.mu is held.
func (s *Sender) addControl(f Frame) error {
	if s.err != nil {
		return s.err
	}
	if s.queued += len(f.Body); s.queued > maxControl {
		s.fail(ErrLinkStalled)
		return s.err
	}
	s.control = append(s.control, fragments(f)...)
	s.work.Signal()
	return nil
}

// fragments splits a frame that is too long for the link.
func fragments(f Frame) []Frame {
	if len(f.Body)+bodyOverhead <= MaxLinkFrame {
		return []Frame{f}
	}
	var out []Frame
	for len(f.Body) > maxFragment {
		out = append(out, Frame{ID: f.ID, Flags: f.Flags | FlagMore, Body: f.Body[:maxFragment]})
		f.Body = f.Body[maxFragment:]
	}
	return append(out, f)
}

// Run writes frames until the sender is closed or a write fails, and returns
// that error.
func (s *Sender) Run() error {
	var buf []byte
	for {
		var err error
		if buf, err = s.next(buf[:0]); err != nil {
			return err
		}
		if _, err := s.w.Write(buf); err != nil {
			s.Close(err)
			return err
		}
	}
}

// next waits for frames and appends about one link frame's worth of them to buf.
func (s *Sender) next(buf []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = false
	for len(s.control) == 0 && len(s.turn) == 0 && s.err == nil {
		s.idle.Broadcast()
		s.work.Wait()
	}
	if s.err != nil {
		return nil, s.err
	}
	for len(buf) < MaxLinkFrame {
		f, ok := s.pop()
		if !ok {
			break
		}
		buf = AppendFrame(buf, f)
	}
	s.writing = len(buf) > 0
	return buf, nil
}

// pop takes the next frame: control first, then one of each session in turn.
func (s *Sender) pop() (Frame, bool) {
	if len(s.control) > 0 {
		f := s.control[0]
		s.control[0], s.control = Frame{}, s.control[1:]
		s.queued -= len(f.Body)
		return f, true
	}
	for len(s.turn) > 0 {
		ss := s.turn[0]
		s.turn[0], s.turn = nil, s.turn[1:]
		ss.inTurn = false
		if len(ss.frames) == 0 {
			continue // dropped meanwhile
		}
		f := ss.frames[0]
		ss.frames = ss.frames[1:]
		switch {
		case len(ss.frames) > 0:
			ss.inTurn = true
			s.turn = append(s.turn, ss)
		case ss.final && s.sessions[ss.id] == ss:
			s.drop(ss.id)
		default:
			ss.room.Broadcast()
		}
		return f, true
	}
	return Frame{}, false
}

// Drain waits until everything queued has been written, or the sender ended;
// then it returns that error.
func (s *Sender) Drain() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil && (len(s.control) > 0 || len(s.turn) > 0 || s.writing) {
		s.idle.Wait()
	}
	return s.err
}

// Close ends the sender: Run, and all present and later calls, return err.
// It does not close the writer. The first error stays.
func (s *Sender) Close(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail(err)
}

func (s *Sender) fail(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	s.work.Broadcast()
	s.idle.Broadcast()
	for _, ss := range s.sessions {
		ss.room.Broadcast()
	}
}

// Meter counts bytes passed on by a receiver and says when to return credit.
// It keeps less than a quarter of the window back, so a sender never starves.
type Meter struct{ n int }

// Add counts the body length of one data frame and returns the credit to send
// now; 0 means not yet.
func (m *Meter) Add(n int) uint32 {
	m.n += n
	if m.n < Window/4 {
		return 0
	}
	give := m.n
	m.n = 0
	return uint32(give)
}

// maxPartial bounds the bytes of unfinished control frames of all ids together.
const maxPartial = 16 << 20

// LinkReader reads frames of the link and joins the parts of long ones, up to
// MaxFrame each.
type LinkReader struct {
	r       *Reader
	partial map[uint32][]byte
	held    int
}

// NewLinkReader returns a reader of one direction of the link. max bounds each
// frame on the wire: MaxLinkFrame for what an agent sends.
func NewLinkReader(r io.Reader, max int) *LinkReader {
	return &LinkReader{r: NewReader(r, max), partial: map[uint32][]byte{}}
}

// ReadFrame returns the next whole frame. Errors are those of [Reader]; parts
// that do not end within the limits are [ErrFrameLength].
func (l *LinkReader) ReadFrame() (Frame, error) {
	for {
		f, err := l.r.ReadFrame()
		if err != nil {
			return Frame{}, err
		}
		part, some := l.partial[f.ID]
		if f.Flags&(FlagMore|FlagData) == 0 && !some || f.Flags&FlagData != 0 {
			return f, nil
		}
		l.held += len(f.Body)
		if len(part)+len(f.Body)+bodyOverhead > MaxFrame || l.held > maxPartial {
			return Frame{}, fmt.Errorf("%w: parts of id %d", ErrFrameLength, f.ID)
		}
		part = append(part, f.Body...)
		if f.Flags&FlagMore != 0 {
			l.partial[f.ID] = part
			continue
		}
		delete(l.partial, f.ID)
		l.held -= len(part)
		f.Body = part
		return f, nil
	}
}
