package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// maxControlLine bounds a request on control.sock in bytes.
const maxControlLine = 4096

// controlTime bounds one exchange on control.sock.
const controlTime = 10 * time.Second

// answerTime is how long a supervisor may take to accept a request to end: it
// has nothing to do for that, so one that takes longer hangs.
const answerTime = 2 * time.Second

// serveControl answers control.sock until the listener ends.
func (s *supervisor) serveControl(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, ok := accept(l)
		if !ok {
			return
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(controlTime))
			line, err := bufio.NewReader(io.LimitReader(conn, maxControlLine)).ReadBytes('\n')
			if err != nil {
				return
			}
			reply := s.control(line)
			if b, err := json.Marshal(reply); err == nil {
				_, _ = conn.Write(append(b, '\n'))
			}
		}()
	}
}

// acceptPause is how long a listener rests when the process or the host has no
// descriptors left: the sandbox must not become unreachable for good.
const acceptPause = 50 * time.Millisecond

// accept waits for a connection; false when the listener has ended.
func accept(l net.Listener) (net.Conn, bool) {
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			return conn, true
		case errors.Is(err, net.ErrClosed):
			return nil, false
		}
		time.Sleep(acceptPause)
	}
}

func (s *supervisor) control(line []byte) controlReply {
	var req controlRequest
	if err := json.Unmarshal(line, &req); err != nil {
		return controlReply{Failure: newFailure(errdefs.Wrap(errdefs.InvalidArgument, err, "control request"))}
	}
	switch req.Op {
	case "stop":
		return s.requestStop(stopRequest{why: "stop requested", grace: req.Grace})
	case "kill":
		return s.requestStop(stopRequest{why: "kill requested"})
	case "status":
		b, err := json.Marshal(s.live())
		if err != nil {
			return controlReply{Failure: newFailure(err)}
		}
		return controlReply{OK: true, Status: b}
	}
	return controlReply{Failure: newFailure(errdefs.New(errdefs.InvalidArgument, "unknown control request %q", req.Op))}
}

// requestStop passes the first request to the main loop; who asks learns of the
// end when the sandbox's lock is free, not from the reply. A later request can
// only make the end come sooner.
func (s *supervisor) requestStop(r stopRequest) controlReply {
	s.mu.Lock()
	first := !s.stopping
	s.stopping = true
	s.mu.Unlock()
	switch {
	case first:
		s.stop <- r // has room: nobody else sends
	case r.grace <= 0:
		s.machine.Kill()
	default:
		time.AfterFunc(r.grace, s.machine.Kill)
	}
	return controlReply{OK: true}
}

func (s *supervisor) live() Live {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := Live{
		SupervisorPID: os.Getpid(), VMMPID: s.machine.PID(), Accel: string(s.machine.Accel()),
		State: s.state, Attached: s.attached, BootNS: s.bootNS,
	}
	if s.files != nil {
		l.FileServerPID = s.files.PID()
	}
	return l
}

// control sends one request to the supervisor of a sandbox and returns its
// answer. A supervisor that is not there gives errdefs.SandboxNotRunning; one
// that does not answer within wait, or until ctx ends, errdefs.Internal with the
// cause ErrSilent.
func control(ctx context.Context, h home.Dir, id string, req controlRequest, wait time.Duration) (controlReply, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(h.Run(id), ControlSocket))
	if err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox is not running")
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(wait))
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	b, err := json.Marshal(req)
	if err != nil {
		return controlReply{}, err
	}
	if _, err := conn.Write(append(b, '\n')); err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox is not running")
	}
	var reply controlReply
	err = json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&reply)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return controlReply{}, errdefs.Wrap(errdefs.Internal, ErrSilent, "")
	}
	if err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "supervisor ended")
	}
	if reply.Failure != nil {
		return reply, reply.Failure.err()
	}
	return reply, nil
}

// RequestStop asks a sandbox to stop within grace, then to be killed; with no
// grace it is killed at once. It returns when the request has been taken; a
// supervisor that does not take it within grace and answerTime gives ErrSilent.
func RequestStop(ctx context.Context, h home.Dir, id string, grace time.Duration) error {
	op := "stop"
	if grace <= 0 {
		op = "kill"
	}
	wait := grace + answerTime
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2) // the rest is for what the caller does then
	}
	_, err := control(ctx, h, id, controlRequest{Op: op, Grace: grace}, wait)
	return err
}

// Query returns what the supervisor of a running sandbox says of it.
func Query(ctx context.Context, h home.Dir, id string) (*Live, error) {
	reply, err := control(ctx, h, id, controlRequest{Op: "status"}, controlTime)
	if err != nil {
		return nil, err
	}
	var l Live
	if err := json.Unmarshal(reply.Status, &l); err != nil {
		return nil, err
	}
	return &l, nil
}
