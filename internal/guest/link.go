package guest

import (
	"os"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// link is the stream of frames to and from the supervisor.
type link struct {
	*agentproto.Sender
	r    *agentproto.LinkReader
	port *os.File
	done chan struct{} // closed when the sender has ended
}

func newLink(port *os.File) *link {
	l := &link{
		Sender: agentproto.NewSender(port),
		r:      agentproto.NewLinkReader(port, agentproto.MaxFrame),
		port:   port,
		done:   make(chan struct{}),
	}
	go func() {
		defer close(l.done)
		_ = l.Run()
	}()
	return l
}

// send queues a control frame.
func (l *link) send(id uint32, flags uint8, typ string, payload any) error {
	body, err := agentproto.Encode(typ, payload)
	if err != nil {
		return err
	}
	return l.Control(agentproto.Frame{ID: id, Flags: flags, Body: body})
}

// finish queues the terminal frame of a session behind its data. A client that
// is gone has no session any more.
func finish(st *agentproto.Stream, typ string, payload any) {
	body, err := agentproto.Encode(typ, payload)
	if err != nil {
		logf("agent: %v", err)
		return
	}
	_ = st.Final(agentproto.FlagTerminal, body)
}

// tell sends a control frame of a session.
func tell(st *agentproto.Stream, typ string, payload any) {
	_ = st.Control(agentproto.MustEncode(typ, payload))
}

// close writes what is queued and closes the port. Closing is a message of its
// own that the device handles after all data: when it returns the host has
// everything. A host that does not read is not waited for.
func (l *link) close() {
	stalled := time.AfterFunc(time.Second, func() {
		l.Sender.Close(agentproto.ErrLinkStalled)
		l.port.Close()
	})
	defer stalled.Stop()
	_ = l.Drain()
	l.Sender.Close(os.ErrClosed)
	<-l.done
	l.port.Close()
}
