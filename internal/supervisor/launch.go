package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// Handle is the creator's hold on a supervisor that it started.
type Handle struct {
	lifeline *os.File
	exited   chan struct{} // closed when the supervisor was reaped
}

// Detach lets the sandbox live on when its creator goes.
func (h *Handle) Detach() error {
	if h.lifeline == nil {
		return nil
	}
	_, err := h.lifeline.Write([]byte{'d'})
	err = errors.Join(err, h.lifeline.Close())
	h.lifeline = nil
	return err
}

// Release ends the sandbox the way the death of its creator would, unless it
// was detached. It does not wait.
func (h *Handle) Release() {
	if h.lifeline != nil {
		h.lifeline.Close()
		h.lifeline = nil
	}
}

// Exited is closed when the supervisor has ended and was reaped.
func (h *Handle) Exited() <-chan struct{} { return h.exited }

// Launch starts the supervisor of a sandbox with the program at msb and returns
// when the guest serves requests. lock is the sandbox's lock, which the
// supervisor inherits; the caller closes its own copy afterwards. When Launch
// fails or ctx ends, nothing is left running.
func Launch(ctx context.Context, h home.Dir, msb string, c *Config, lock *os.File, step func(string)) (*Handle, error) {
	log, err := os.OpenFile(logFile(h, c.Name, SupervisorLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p, err := newPipes()
	if err != nil {
		return nil, err
	}
	defer p.closeTheirs()
	cmd := exec.Command(msb, "supervise")
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{p.reqR, p.statW, lock, p.lifeR} // fdRequest, fdStatus, fdLock, fdLifeline
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		p.closeOurs()
		return nil, errdefs.Wrap(errdefs.LibraryNotLoaded, err, "cannot start %s", msb)
	}
	p.closeTheirs()
	handle := &Handle{lifeline: p.lifeW, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(handle.exited)
	}()
	err = writeRequest(p.reqW, request{Version: version.Version, Home: string(h), Config: *c, Attached: true})
	if err == nil {
		err = awaitReady(ctx, p.statR, msb, step)
	}
	p.statR.Close()
	if err != nil {
		handle.Release()
		<-handle.exited // its tear-down is bounded
		return nil, err
	}
	return handle, nil
}

func logFile(h home.Dir, name, file string) string { return h.Sandbox(name) + "/logs/" + file }

func writeRequest(f *os.File, r request) error {
	b, err := json.Marshal(r)
	if err == nil {
		_, err = f.Write(b)
	}
	err = errors.Join(err, f.Close())
	if errors.Is(err, syscall.EPIPE) {
		return nil // it ended early and has said why
	}
	return err
}

// awaitReady reads status lines until the sandbox is ready or has failed. The
// first line proves that the program is ours and of our version.
func awaitReady(ctx context.Context, statR *os.File, msb string, step func(string)) error {
	defer context.AfterFunc(ctx, func() { statR.Close() })()
	lines := bufio.NewScanner(statR)
	lines.Buffer(nil, 1<<20)
	known := false
	for lines.Scan() {
		var st status
		if err := json.Unmarshal(lines.Bytes(), &st); err != nil {
			return errdefs.Wrap(errdefs.Internal, err, "supervisor status")
		}
		switch {
		case st.Version != "":
			if st.Version != version.Version {
				return wrongVersion(msb, st.Version)
			}
			known = true
		case st.Failure != nil:
			return st.Failure.err()
		case st.Ready:
			return nil
		case st.Step != "" && step != nil:
			step(st.Step)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !known {
		return wrongVersion(msb, "unknown")
	}
	return errdefs.New(errdefs.Internal, "supervisor ended before the sandbox was ready").
		WithHint("see logs/%s of the sandbox", SupervisorLog)
}

func wrongVersion(msb, v string) error {
	return errdefs.New(errdefs.LibraryNotLoaded, "%s is not msb %s (its version: %s)", msb, version.Version, v).
		WithHint("point MSB_PATH at the msb of this release")
}

// pipes are the four ends of each side of a launch; lock is the caller's.
type pipes struct {
	reqR, reqW, statR, statW, lifeR, lifeW *os.File
}

func newPipes() (*pipes, error) {
	var p pipes
	for _, pair := range []struct{ r, w **os.File }{{&p.reqR, &p.reqW}, {&p.statR, &p.statW}, {&p.lifeR, &p.lifeW}} {
		r, w, err := os.Pipe()
		if err != nil {
			p.closeTheirs()
			p.closeOurs()
			return nil, fmt.Errorf("pipe: %w", err)
		}
		*pair.r, *pair.w = r, w
	}
	return &p, nil
}

func (p *pipes) closeTheirs() { closeAll([]*os.File{p.reqR, p.statW, p.lifeR}) }
func (p *pipes) closeOurs()   { closeAll([]*os.File{p.reqW, p.statR, p.lifeW}) }
