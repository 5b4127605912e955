package agentclient

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// EventKind says what an exec event is.
type EventKind int

// Events of a program, in the order of the public constants.
const (
	Started EventKind = iota
	Stdout
	Stderr
	Exited
	Failed
	StdinError
	Done
)

// Event is one thing a program did.
type Event struct {
	Kind EventKind
	PID  uint32
	Data []byte
	Code int
	// Failure is set with Failed and StdinError.
	Failure *Failure
}

// Failure says why a program could not be started or fed.
type Failure struct {
	Kind      string
	Errno     *int
	ErrnoName string
	Message   string
	Stage     string
}

// Exec is a program running in the guest. Recv is called from one goroutine at
// a time; input and signals may come from others.
type Exec struct {
	c    *Conn
	done atomic.Bool // the final event was received, or Close called

	mu    sync.Mutex
	ended bool // guarded by mu: no more input or signals
}

// StartExec starts a program over the connection, which belongs to it from then
// on. It returns before the program runs: failures come as events. A command
// line that no message can hold is an error of kind InvalidArgument.
func (c *Conn) StartExec(ctx context.Context, req agentproto.Exec) (*Exec, error) {
	if err := checkSize(&req); err != nil {
		return nil, err
	}
	if err := c.next(); err != nil {
		return nil, err
	}
	defer interrupt(ctx, c.conn)()
	if err := c.send(agentproto.MsgExec, agentproto.FlagSessionStart, req); err != nil {
		return nil, lost(ctx, err)
	}
	return &Exec{c: c}, nil
}

// checkSize refuses what does not fit into a request.
func checkSize(req *agentproto.Exec) error {
	for what, n := range map[string]int{"arguments": len(req.Args), "environment variables": len(req.Env)} {
		if n > agentproto.MaxElements {
			return errdefs.New(errdefs.InvalidArgument, "%d %s: a command can have %d", n, what, agentproto.MaxElements).
				WithHint("give them to the program's standard input, for example with xargs")
		}
	}
	const overhead, perString = 1 << 10, 5 // bytes of the request itself and of each length, at most
	size := overhead + len(req.Cmd)
	for _, list := range [][]string{req.Args, req.Env} {
		for _, s := range list {
			size += perString + len(s)
		}
	}
	if size > agentproto.MaxRequest {
		return errdefs.New(errdefs.InvalidArgument, "command, arguments and environment of %d bytes: at most %d fit into a request", size, agentproto.MaxRequest).
			WithHint("give the data to the program's standard input, or put it into a file")
	}
	return nil
}

// Recv returns the next event. After Exited or Failed it returns Done, for ever.
func (e *Exec) Recv(ctx context.Context) (Event, error) {
	if e.done.Load() {
		return Event{Kind: Done}, nil
	}
	defer interrupt(ctx, e.c.conn)()
	for {
		m, err := e.c.receive()
		if err != nil {
			return Event{}, lost(ctx, err)
		}
		ev, known, err := event(m)
		if err != nil {
			return Event{}, err
		}
		if m.terminal {
			e.finish()
		}
		if known {
			return ev, nil
		}
		if m.terminal {
			return Event{Kind: Done}, nil
		}
	}
}

func (e *Exec) finish() {
	e.done.Store(true)
	e.mu.Lock()
	e.ended = true
	e.mu.Unlock()
}

// event translates a frame; kinds that a later agent may add are skipped.
func event(m message) (Event, bool, error) {
	switch m.kind {
	case agentproto.MsgStarted:
		var p agentproto.Started
		err := agentproto.Unmarshal(m.payload, &p)
		return Event{Kind: Started, PID: p.PID}, true, err
	case agentproto.MsgStdout, agentproto.MsgStderr:
		data, err := agentproto.DecodeData(m.payload)
		if m.kind == agentproto.MsgStderr {
			return Event{Kind: Stderr, Data: data}, true, err
		}
		return Event{Kind: Stdout, Data: data}, true, err
	case agentproto.MsgExited:
		var p agentproto.Exited
		err := agentproto.Unmarshal(m.payload, &p)
		return Event{Kind: Exited, Code: int(p.Code)}, true, err
	case agentproto.MsgExecFailed:
		var p agentproto.ExecFailed
		err := agentproto.Unmarshal(m.payload, &p)
		return Event{Kind: Failed, Failure: failure(p)}, true, err
	case agentproto.MsgStdinError:
		var p agentproto.StdinError
		err := agentproto.Unmarshal(m.payload, &p)
		return Event{Kind: StdinError, Failure: failure(agentproto.ExecFailed{Kind: "stdin", Errno: p.Errno, ErrnoName: p.ErrnoName, Message: p.Message})}, true, err
	case agentproto.MsgError:
		return Event{}, false, refused(m.payload)
	}
	return Event{}, false, nil
}

func failure(p agentproto.ExecFailed) *Failure {
	f := &Failure{Kind: p.Kind, Message: p.Message}
	if p.Errno != nil {
		n := int(*p.Errno)
		f.Errno = &n
	}
	if p.ErrnoName != nil {
		f.ErrnoName = *p.ErrnoName
	}
	if p.Stage != nil {
		f.Stage = *p.Stage
	}
	return f
}

// errEnded is returned for input to a program that has ended.
var errEnded = errdefs.New(errdefs.ExecFailed, "program has ended")

func (e *Exec) live() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ended {
		return errEnded
	}
	return nil
}

// WriteStdin sends input; it blocks while the program does not read.
func (e *Exec) WriteStdin(ctx context.Context, p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := e.live(); err != nil {
		return 0, io.ErrClosedPipe
	}
	defer interrupt(ctx, e.c.conn)()
	if err := e.c.sendData(agentproto.MsgStdin, p); err != nil {
		return 0, lost(ctx, err)
	}
	return len(p), nil
}

// CloseStdin ends the program's input.
func (e *Exec) CloseStdin() error {
	if e.live() != nil {
		return nil
	}
	return e.c.sendData(agentproto.MsgStdin, nil)
}

// Signal sends a signal to the program's process group.
func (e *Exec) Signal(ctx context.Context, signal int) error {
	if err := e.live(); err != nil {
		return err
	}
	defer interrupt(ctx, e.c.conn)()
	return e.c.send(agentproto.MsgSignal, 0, agentproto.Signal{Signal: int32(signal)})
}

// Close ends the connection and with it the program, if it still runs. It is
// idempotent.
func (e *Exec) Close() error {
	e.finish()
	if err := e.c.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}
