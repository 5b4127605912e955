package supervisor

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// client is one connection of agent.sock.
type client struct {
	relay *relay
	conn  net.Conn
	first uint32 // ids first <= id < first+idsPerClient

	live    int // sessions; guarded by relay.mu
	toGuest int // bytes queued towards the guest; guarded by relay.mu

	mu    sync.Mutex
	more  *sync.Cond
	queue []outFrame // guarded by mu
	bytes int        // guarded by mu
	ended bool       // guarded by mu
}

// outFrame is a frame on its way to a client.
type outFrame struct {
	frame   agentproto.Frame
	session *session
	data    bool
}

// serve accepts clients until the listener ends.
func (r *relay) serve(l net.Listener) {
	for {
		conn, ok := accept(l)
		if !ok {
			return
		}
		c, err := r.admit(conn)
		if err != nil {
			conn.Close()
			continue
		}
		go func() { defer r.clientsDone.Done(); c.run() }()
	}
}

// admit registers a client under a range of ids nobody uses.
func (r *relay) admit(conn net.Conn) (*client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, net.ErrClosed
	}
	if len(r.clients) >= maxClients {
		return nil, errors.New("too many clients")
	}
	c := &client{relay: r, conn: conn, first: r.freeRange()}
	c.more = sync.NewCond(&c.mu)
	r.clients[c] = struct{}{}
	r.clientsDone.Add(1) // before closed is set, so that wait sees it
	return c, nil
}

// freeRange takes the next id range that no client has. Ranges are handed out
// in turn, so that a late frame of an ended client meets nobody; relay.mu is held.
func (r *relay) freeRange() uint32 {
	for {
		first := r.nextID
		r.nextID += idsPerClient
		if r.nextID > 1<<31 {
			r.nextID = 1
		}
		taken := false
		for c := range r.clients {
			taken = taken || c.first == first
		}
		if !taken {
			return first
		}
	}
}

func (c *client) run() {
	var wg sync.WaitGroup
	wg.Add(1)
	go func() { defer wg.Done(); c.writeAll() }()
	_ = c.readAll()
	c.leave()
	c.finish()
	wg.Wait()
	c.conn.Close()
}

// leave ends the client's programs and closes its handles in the guest.
func (c *client) leave() {
	r := c.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.clients, c)
	for id, s := range r.sessions {
		if s.client != c {
			continue
		}
		if b, err := agentproto.Encode(agentproto.MsgSignal, agentproto.Signal{Signal: 9}); err == nil && s.exec {
			_ = r.push(agentproto.Frame{ID: id, Body: b})
		}
		r.drop(s)
	}
	gone := agentproto.ClientGone{IDStart: c.first, IDEndExclusive: c.first + idsPerClient}
	if b, err := agentproto.Encode(agentproto.MsgClientGone, gone); err == nil {
		_ = r.push(agentproto.Frame{Body: b})
	}
}

func (c *client) readAll() error {
	in := agentproto.NewReader(bufio.NewReaderSize(c.conn, 64<<10), agentproto.MaxFrame)
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return err
		}
		if f.ID < c.first || f.ID >= c.first+idsPerClient {
			return fmt.Errorf("client used foreign id %d", f.ID)
		}
		if err := c.toAgent(f); err != nil {
			return err
		}
	}
}

// toAgent passes one frame of the client on, data through the id's credit.
func (c *client) toAgent(f agentproto.Frame) error {
	msgType, _, payload, err := agentproto.Decode(f.Body)
	if err != nil {
		return err
	}
	switch msgType {
	case agentproto.MsgExec, agentproto.MsgFSRequest:
		return c.open(f, msgType)
	case agentproto.MsgStdin, agentproto.MsgFSData:
		data, err := agentproto.DecodeData(payload)
		if err != nil {
			return err
		}
		return c.input(f.ID, msgType, data)
	case agentproto.MsgSignal, agentproto.MsgResize, agentproto.MsgPing:
		if !fitsLink(f.Body) { // the link would end for everybody
			return c.refuse(f.ID, "invalid_payload", fmt.Sprintf("message of %d bytes is larger than %d", len(f.Body), maxRequest))
		}
		return c.relay.send(agentproto.Frame{ID: f.ID, Flags: f.Flags & agentproto.FlagSessionStart, Body: f.Body})
	}
	return c.refuse(f.ID, "unsupported_message_type", "message type "+msgType+" is not served here")
}

// open starts a session. A second request on a live id, too many sessions and a
// request that does not fit the link are refused.
func (c *client) open(f agentproto.Frame, msgType string) error {
	if !fitsLink(f.Body) {
		return c.refuse(f.ID, "invalid_payload", fmt.Sprintf("request of %d bytes is larger than %d", len(f.Body), maxRequest))
	}
	r := c.relay
	r.mu.Lock()
	switch {
	case r.sessions[f.ID] != nil:
		r.mu.Unlock()
		return c.refuse(f.ID, "invalid_session", "id is in use")
	case c.live >= maxClientSessions:
		r.mu.Unlock()
		return c.refuse(f.ID, "invalid_session", fmt.Sprintf("more than %d sessions on one connection", maxClientSessions))
	}
	r.sessions[f.ID] = newSession(f.ID, c, msgType == agentproto.MsgExec)
	c.live++
	r.mu.Unlock()
	return r.send(agentproto.Frame{ID: f.ID, Flags: agentproto.FlagSessionStart, Body: f.Body})
}

// fitsLink reports whether a frame with this body may go to the agent.
func fitsLink(body []byte) bool {
	return len(body)+agentproto.FrameHeaderLen <= maxRequest
}

// input queues data for the guest and waits while the client has too much of it.
func (c *client) input(id uint32, msgType string, data []byte) error {
	bodies := splitData(msgType, data)
	r := c.relay
	r.mu.Lock()
	defer r.mu.Unlock()
	for c.toGuest >= maxClientBytes && !r.closed && r.sessions[id] != nil {
		r.room.Wait()
	}
	s := r.sessions[id]
	if s == nil || r.closed {
		return nil // the session has ended; its input goes nowhere
	}
	for _, b := range bodies {
		s.toGuest = append(s.toGuest, b)
		s.queued += len(b)
		c.toGuest += len(b)
	}
	r.activate(s)
	return nil
}

func (c *client) refuse(id uint32, kind, message string) error {
	b, err := agentproto.Encode(agentproto.MsgError, agentproto.Error{Kind: kind, Message: message})
	if err != nil {
		return err
	}
	c.enqueue(outFrame{frame: agentproto.Frame{ID: id, Flags: agentproto.FlagTerminal, Body: b}})
	return nil
}

// enqueue hands a frame to the client's writer. Data is bounded by the windows
// of the client's sessions; a client drowned in control frames is dropped.
func (c *client) enqueue(f outFrame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return
	}
	if c.bytes > 2*maxClientBytes {
		c.ended = true
		c.conn.Close()
	} else {
		c.queue = append(c.queue, f)
		c.bytes += len(f.frame.Body) + frameCost
	}
	c.more.Signal()
}

// finish lets the writer end after what is queued.
func (c *client) finish() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.more.Broadcast()
}

func (c *client) writeAll() {
	defer c.conn.Close() // ends the reader too
	out := bufio.NewWriterSize(c.conn, 64<<10)
	var rng [8]byte
	binary.BigEndian.PutUint32(rng[:4], c.first)
	binary.BigEndian.PutUint32(rng[4:], c.first+idsPerClient)
	w := agentproto.NewWriter(out, agentproto.MaxFrame)
	if _, err := out.Write(rng[:]); err != nil {
		return
	}
	if err := w.WriteFrame(agentproto.Frame{Body: c.relay.ready}); err != nil || out.Flush() != nil {
		return
	}
	for {
		batch, ok := c.take()
		if !ok {
			return
		}
		for _, f := range batch {
			if err := w.WriteFrame(f.frame); err != nil {
				return
			}
		}
		if out.Flush() != nil {
			return
		}
		for _, f := range batch {
			if f.data {
				c.relay.written(f.session, len(f.frame.Body))
			}
		}
	}
}

// take waits for queued frames; false when the client has ended and none is left.
func (c *client) take() ([]outFrame, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) == 0 && !c.ended {
		c.more.Wait()
	}
	batch := c.queue
	c.queue, c.bytes = nil, 0
	return batch, len(batch) > 0
}
