package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
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

// serveControl answers control.sock until the listener ends.
func (s *supervisor) serveControl(l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer conn.Close()
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
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

// requestStop passes the request to the main loop; who asks learns of the end
// when the sandbox's lock is free, not from the reply.
func (s *supervisor) requestStop(r stopRequest) controlReply {
	select {
	case s.stop <- r:
	default: // one is under way
		if r.grace == 0 {
			s.machine.Kill()
		}
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

// Control sends one request to the supervisor of a sandbox and returns its
// answer. A supervisor that is not there gives errdefs.SandboxNotRunning.
func control(ctx context.Context, h home.Dir, id string, req controlRequest) (controlReply, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(h.Run(id), ControlSocket))
	if err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox is not running")
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	b, err := json.Marshal(req)
	if err != nil {
		return controlReply{}, err
	}
	if _, err := conn.Write(append(b, '\n')); err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox is not running")
	}
	var reply controlReply
	if err := json.NewDecoder(io.LimitReader(conn, 1<<20)).Decode(&reply); err != nil {
		return controlReply{}, errdefs.Wrap(errdefs.SandboxNotRunning, err, "supervisor ended")
	}
	if reply.Failure != nil {
		return reply, reply.Failure.err()
	}
	return reply, nil
}

// RequestStop asks a sandbox to stop within grace, then to be killed; with no
// grace it is killed at once. It returns when the request has been taken.
func RequestStop(ctx context.Context, h home.Dir, id string, grace time.Duration) error {
	op := "stop"
	if grace <= 0 {
		op = "kill"
	}
	_, err := control(ctx, h, id, controlRequest{Op: op, Grace: grace})
	return err
}

// Query returns what the supervisor of a running sandbox says of it.
func Query(ctx context.Context, h home.Dir, id string) (*Live, error) {
	reply, err := control(ctx, h, id, controlRequest{Op: "status"})
	if err != nil {
		return nil, err
	}
	var l Live
	if err := json.Unmarshal(reply.Status, &l); err != nil {
		return nil, err
	}
	return &l, nil
}
