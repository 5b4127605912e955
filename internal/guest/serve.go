package guest

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// handler is one session: it gets the frames of its id.
type handler interface {
	// frame handles a frame on the reading goroutine; it must not block.
	frame(typ string, p []byte, bodyLen int)
	// abandon ends the session: nobody will read its answers.
	abandon()
}

// sessions holds the live sessions and the handles of all clients.
type sessions struct {
	mu      sync.Mutex
	live    map[uint32]handler // guarded by mu
	handles map[uint64]*handle // guarded by mu
	next    uint64             // last handle number given out, guarded by mu
}

func newSessions() *sessions {
	return &sessions{live: map[uint32]handler{}, handles: map[uint64]*handle{}}
}

// add registers a session; false if the id is taken.
func (s *sessions) add(id uint32, h handler) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.live[id]; taken {
		return false
	}
	s.live[id] = h
	return true
}

func (s *sessions) get(id uint32) handler {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live[id]
}

// drop forgets a session, if it is still h.
func (s *sessions) drop(id uint32, h handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live[id] == h {
		delete(s.live, id)
	}
}

// inRange returns the sessions with ids from start to before end.
func (s *sessions) inRange(start, end uint32) map[uint32]handler {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[uint32]handler{}
	for id, h := range s.live {
		if id >= start && id < end {
			out[id] = h
		}
	}
	return out
}

// errShutdown ends serve after an orderly shutdown.
var errShutdown = errors.New("shut down")

// serve handles frames until the supervisor asks to shut down or the link ends.
func (a *agent) serve() error {
	for {
		f, err := a.link.r.ReadFrame()
		if err != nil {
			a.shutdown(0)
			return fmt.Errorf("link: %w", err)
		}
		typ, _, p, err := agentproto.Decode(f.Body)
		if err != nil {
			a.refuse(f.ID, "malformed_message", err.Error(), "")
			continue
		}
		switch typ {
		case agentproto.MsgShutdown:
			var s agentproto.Shutdown
			_ = agentproto.Unmarshal(p, &s)
			a.shutdown(time.Duration(s.GraceMS) * time.Millisecond)
			return errShutdown
		case agentproto.MsgCredit:
			var c agentproto.Credit
			if agentproto.Unmarshal(p, &c) == nil {
				a.link.Credit(f.ID, c.N)
			}
		case agentproto.MsgPing:
			_ = a.link.send(f.ID, agentproto.FlagTerminal, agentproto.MsgPong, nil)
		case agentproto.MsgClientGone:
			var g agentproto.ClientGone
			if agentproto.Unmarshal(p, &g) == nil {
				a.clientGone(g)
			}
		case agentproto.MsgExec:
			a.startExec(f.ID, p)
		case agentproto.MsgFSRequest:
			a.startFS(f.ID, p)
		case agentproto.MsgStdin, agentproto.MsgSignal, agentproto.MsgResize, agentproto.MsgFSData:
			// Frames of an id that has just ended are normal: they are dropped.
			if h := a.sessions.get(f.ID); h != nil {
				h.frame(typ, p, len(f.Body))
			}
		default:
			if f.Flags&agentproto.FlagSessionStart != 0 || a.sessions.get(f.ID) == nil {
				a.refuse(f.ID, "unsupported_message_type", "unknown message type", typ)
			}
		}
	}
}

// refuse answers a frame that cannot be served. File errors are never answered
// this way: the peer's clients cannot read it there.
func (a *agent) refuse(id uint32, kind, message, typ string) {
	e := agentproto.Error{Kind: kind, Message: message}
	if typ != "" {
		e.OffendingType = &typ
	}
	_ = a.link.send(id, agentproto.FlagTerminal, agentproto.MsgError, e)
}

// clientGone ends what a client has left behind: its programs are killed, its
// transfers stopped, its handles closed.
func (a *agent) clientGone(g agentproto.ClientGone) {
	for id, h := range a.sessions.inRange(g.IDStart, g.IDEndExclusive) {
		a.link.Drop(id)
		a.sessions.drop(id, h)
		h.abandon()
	}
	a.sessions.closeHandles(func(h *handle) bool { return h.owner >= g.IDStart && h.owner < g.IDEndExclusive })
}
