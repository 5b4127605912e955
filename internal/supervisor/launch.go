package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// Times that bound a program at MSB_PATH which is not ours, or hangs.
const (
	requestTime = 10 * time.Second // to take the request
	versionTime = 20 * time.Second // to say its version
	abortTime   = 5 * time.Second  // to end after a boot was given up: its tear-down takes 2 s
)

// Handle is the creator's hold on a supervisor that it started. Its methods may
// be called from several goroutines.
type Handle struct {
	process  *os.Process
	followed chan struct{} // closed when nobody reads the status any more
	exited   chan struct{} // closed when the supervisor was reaped
	cause    string        // why the sandbox crashed; valid after exited

	mu       sync.Mutex
	lifeline *os.File // guarded by mu; nil when detached or released
}

// Detach lets the sandbox live on when its creator goes.
func (h *Handle) Detach() error {
	f := h.takeLifeline()
	if f == nil {
		return nil
	}
	_, err := f.Write([]byte{'d'})
	return errors.Join(err, f.Close())
}

// Release ends the sandbox the way the death of its creator would, unless it
// was detached. It does not wait.
func (h *Handle) Release() {
	if f := h.takeLifeline(); f != nil {
		f.Close()
	}
}

func (h *Handle) takeLifeline() *os.File {
	h.mu.Lock()
	defer h.mu.Unlock()
	f := h.lifeline
	h.lifeline = nil
	return f
}

// Held reports whether the sandbox ends with this process.
func (h *Handle) Held() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lifeline != nil
}

// Exited is closed when the supervisor has ended and was reaped.
func (h *Handle) Exited() <-chan struct{} { return h.exited }

// Cause says why the sandbox crashed, "" for a clean stop. It waits for Exited.
func (h *Handle) Cause() string {
	<-h.exited
	return h.cause
}

// abort ends a supervisor whose boot was given up, and waits for its end. One
// that does not tear down by itself is killed, and its children with it.
func (h *Handle) abort() {
	h.Release()
	select {
	case <-h.exited:
	case <-time.After(abortTime):
		_ = h.process.Kill()
		<-h.exited
	}
}

// Launch starts the supervisor of a sandbox with the program at msb and returns
// when the guest serves requests. lock is the sandbox's lock, which the
// supervisor inherits; the caller closes its own copy afterwards. When Launch
// fails or ctx ends, nothing is left running.
func Launch(ctx context.Context, h home.Dir, msb string, c *Config, lock *os.File, step func(string)) (*Handle, error) {
	log, err := home.OpenFile(logFile(h, c.Name, SupervisorLog), unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND)
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
	handle := &Handle{process: cmd.Process, lifeline: p.lifeW, exited: make(chan struct{}), followed: make(chan struct{})}
	go handle.wait(cmd)
	lines := bufio.NewScanner(p.statR)
	lines.Buffer(nil, 1<<20)
	err = writeRequest(p.reqW, request{Version: version.Version, Home: string(h), Config: *c, Attached: true})
	if err == nil {
		err = awaitReady(ctx, p.statR, lines, msb, step)
	}
	if err != nil {
		p.statR.Close()
		close(handle.followed)
		handle.abort()
		return nil, err
	}
	go handle.follow(p.statR, lines)
	return handle, nil
}

// wait reaps the supervisor.
func (h *Handle) wait(cmd *exec.Cmd) {
	_ = cmd.Wait()
	<-h.followed
	close(h.exited)
}

// follow reads what a sandbox that was ready says at its end.
func (h *Handle) follow(statR *os.File, lines *bufio.Scanner) {
	defer close(h.followed)
	defer statR.Close()
	_ = statR.SetReadDeadline(time.Time{})
	for lines.Scan() {
		var st status
		if json.Unmarshal(lines.Bytes(), &st) == nil && st.Ended != nil {
			h.cause = *st.Ended
			return
		}
	}
	h.cause = SupervisorGone
}

func logFile(h home.Dir, name, file string) string { return h.Sandbox(name) + "/logs/" + file }

func writeRequest(f *os.File, r request) error {
	b, err := json.Marshal(r)
	if err == nil {
		_ = f.SetWriteDeadline(time.Now().Add(requestTime))
		_, err = f.Write(b)
	}
	err = errors.Join(err, f.Close())
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil // it ended early and has said why, or does not know what to do with a request
	}
	return err
}

// awaitReady reads status lines until the sandbox is ready or has failed. The
// first line proves that the program is ours and of our version.
func awaitReady(ctx context.Context, statR *os.File, lines *bufio.Scanner, msb string, step func(string)) error {
	defer context.AfterFunc(ctx, func() { _ = statR.SetReadDeadline(time.Unix(1, 0)) })()
	greeting := time.AfterFunc(versionTime, func() { _ = statR.SetReadDeadline(time.Unix(1, 0)) })
	defer greeting.Stop()
	known := false
	for lines.Scan() {
		var st status
		if err := json.Unmarshal(lines.Bytes(), &st); err != nil {
			if !known {
				return wrongVersion(msb, "unknown")
			}
			return errdefs.Wrap(errdefs.Internal, err, "supervisor status")
		}
		switch {
		case !known:
			if st.Version != version.Version {
				return wrongVersion(msb, st.Version)
			}
			known = true
			greeting.Stop()
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
	if v == "" {
		v = "unknown"
	}
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
