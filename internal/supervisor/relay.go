package supervisor

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// Limits of a relay.
const (
	maxClients        = 128
	maxClientSessions = 64       // live ids of one client: 64 windows are 16 MiB
	maxClientBytes    = 16 << 20 // bytes queued per client and direction
	idsPerClient      = 1 << 12
	maxControlQueue   = 64
	maxRequest        = agentproto.MaxRequest
	frameCost         = 128 // bytes that a queued frame costs beside its body
	// partingTime is for clients to take what is queued when the guest is gone.
	// It is part of the two seconds in which a dead sandbox frees its locks.
	partingTime = 300 * time.Millisecond
)

// relay multiplexes the agent link over the clients of agent.sock. Each client
// gets a range of ids; the relay moves frames, keeps the credit of every id and
// drops what it does not know. A client that stops reading holds back its own
// ids only: their credit is returned when bytes have reached its socket.
//
// Lock order: relay.mu, then client.mu. No lock is held over I/O.
type relay struct {
	link  io.ReadWriteCloser
	ready []byte // body of MsgReady, sent to every client
	log   *outputLog

	mu       sync.Mutex
	wake     *sync.Cond          // link writer: control, active or closed changed
	room     *sync.Cond          // client readers: the control queue or a client's bytes shrank
	control  []agentproto.Frame  // frames that need no credit
	active   []*session          // sessions with data and credit, round robin
	sessions map[uint32]*session // live ids
	clients  map[*client]struct{}
	nextID   uint32
	closed   bool
	err      error

	goodbye chan struct{} // closed when the agent has said goodbye
	done    chan struct{} // closed when the link is gone
	wg      sync.WaitGroup

	clientsDone sync.WaitGroup // clients still being served; Add needs mu and !closed
}

func newRelay(link io.ReadWriteCloser, log *outputLog) *relay {
	r := &relay{
		link: link, log: log, nextID: 1,
		sessions: map[uint32]*session{}, clients: map[*client]struct{}{},
		goodbye: make(chan struct{}), done: make(chan struct{}),
	}
	r.wake, r.room = sync.NewCond(&r.mu), sync.NewCond(&r.mu)
	return r
}

// run moves frames until the link ends. The boot exchange is over by then.
func (r *relay) run(in *agentproto.LinkReader) {
	r.wg.Add(1)
	go func() { defer r.wg.Done(); r.writeLink() }()
	err := r.readLink(in)
	r.close(err)
	r.wg.Wait()
	close(r.done)
}

// close ends the relay and every client.
func (r *relay) close(err error) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return
	}
	r.closed, r.err = true, err
	clients := make([]*client, 0, len(r.clients))
	for c := range r.clients {
		clients = append(clients, c)
	}
	r.wake.Broadcast()
	r.room.Broadcast()
	r.mu.Unlock()
	r.link.Close()
	for _, c := range clients {
		c.finish()
		_ = c.conn.SetDeadline(time.Now().Add(partingTime))
	}
}

func (r *relay) readLink(in *agentproto.LinkReader) error {
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return err
		}
		if err := r.fromGuest(f); err != nil {
			return err
		}
	}
}

// fromGuest handles one frame of the agent, which is not trusted: what it may
// hold back or make us keep is bounded by the window of each id.
func (r *relay) fromGuest(f agentproto.Frame) error {
	msgType, _, payload, err := agentproto.Decode(f.Body)
	if err != nil {
		return fmt.Errorf("agent sent a malformed frame: %w", err)
	}
	if f.ID == 0 {
		if msgType == agentproto.MsgGoodbye {
			r.sayGoodbye()
		}
		return nil
	}
	r.mu.Lock()
	s := r.sessions[f.ID]
	if s == nil {
		r.mu.Unlock()
		return nil // a session that has ended; its frames are dropped
	}
	if msgType == agentproto.MsgCredit {
		var c agentproto.Credit
		if err := agentproto.Unmarshal(payload, &c); err == nil {
			s.credit = min(s.credit+int(c.N), agentproto.Window)
			r.activate(s)
		}
		r.mu.Unlock()
		return nil
	}
	data := f.Flags&agentproto.FlagData != 0
	if data {
		s.received += len(f.Body)
		if s.received > agentproto.Window+agentproto.MaxLinkFrame {
			r.mu.Unlock()
			return errors.New("agent exceeded the window of an id")
		}
	}
	if f.Flags&agentproto.FlagTerminal != 0 {
		r.drop(s)
	}
	c := s.client
	r.mu.Unlock()

	if s.exec && data {
		r.log.output(f.ID, msgType, payload)
	}
	c.enqueue(outFrame{frame: agentproto.Frame{ID: f.ID, Flags: f.Flags &^ agentproto.FlagData, Body: f.Body}, session: s, data: data})
	return nil
}

func (r *relay) sayGoodbye() {
	select {
	case <-r.goodbye:
	default:
		close(r.goodbye)
	}
}

// drop forgets a session; relay.mu is held.
func (r *relay) drop(s *session) {
	delete(r.sessions, s.id)
	s.client.live--
	s.client.toGuest -= s.queued
	s.toGuest, s.queued = nil, 0
	r.room.Broadcast()
}

// activate puts a session with data and credit in line; relay.mu is held.
func (r *relay) activate(s *session) {
	if s.inActive || len(s.toGuest) == 0 || s.credit < len(s.toGuest[0]) {
		return
	}
	s.inActive = true
	r.active = append(r.active, s)
	r.wake.Signal()
}

// send queues a control frame for the agent. It waits while the queue is long,
// so that a client cannot make it grow.
func (r *relay) send(f agentproto.Frame) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.control) >= maxControlQueue && !r.closed {
		r.room.Wait()
	}
	return r.push(f)
}

// push queues a control frame without waiting; relay.mu is held.
func (r *relay) push(f agentproto.Frame) error {
	if r.closed {
		return net.ErrClosed
	}
	r.control = append(r.control, f)
	r.wake.Signal()
	return nil
}

func (r *relay) writeLink() {
	w := agentproto.NewWriter(r.link, agentproto.MaxFrame)
	for {
		f, ok := r.next()
		if !ok {
			return
		}
		if err := w.WriteFrame(f); err != nil {
			r.close(err)
			return
		}
	}
}

// next waits for a frame to send: control frames first, then one data frame of
// each active session in turn.
func (r *relay) next() (agentproto.Frame, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if r.closed {
			return agentproto.Frame{}, false
		}
		if len(r.control) > 0 {
			f := r.control[0]
			r.control = r.control[1:]
			r.room.Broadcast()
			return f, true
		}
		if len(r.active) > 0 {
			s := r.active[0]
			r.active = r.active[1:]
			s.inActive = false
			if len(s.toGuest) == 0 { // dropped meanwhile
				continue
			}
			body := s.toGuest[0]
			s.toGuest = s.toGuest[1:]
			s.queued -= len(body)
			s.credit -= len(body)
			s.client.toGuest -= len(body)
			r.room.Broadcast()
			r.activate(s)
			return agentproto.Frame{ID: s.id, Flags: agentproto.FlagData, Body: body}, true
		}
		r.wake.Wait()
	}
}

// written returns credit for data that has reached the client's socket.
func (r *relay) written(s *session, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.passed += n
	if s.passed < agentproto.Window/4 || r.sessions[s.id] != s {
		return
	}
	b, err := agentproto.Encode(agentproto.MsgCredit, agentproto.Credit{N: uint32(s.passed)})
	if err != nil {
		return
	}
	s.received -= s.passed
	s.passed = 0
	_ = r.push(agentproto.Frame{ID: s.id, Body: b})
}

// endedBy says what ended the link, once done is closed.
func (r *relay) endedBy() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// wait returns when the link has ended and every client has got what was queued
// for it, or did not take it in time.
func (r *relay) wait() {
	<-r.done
	r.clientsDone.Wait()
}

// stopGuest asks the agent to end programs, unmount and power off. It does not
// wait: the link may be full, and a stopped VMM never takes anything.
func (r *relay) stopGuest(grace time.Duration) error {
	b, err := agentproto.Encode(agentproto.MsgShutdown, agentproto.Shutdown{GraceMS: uint32((grace / 2).Milliseconds())})
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.push(agentproto.Frame{Flags: agentproto.FlagShutdown, Body: b})
}
