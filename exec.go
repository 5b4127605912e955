package microsandbox

import (
	"bytes"
	"context"
	"fmt"
	"sort"
	"sync/atomic"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// ExecConfig says how a program is run. The zero value runs it in the sandbox's
// working directory, as its user, without input and without a deadline.
type ExecConfig struct {
	Cwd       string
	Timeout   time.Duration // 0: none; the program is killed when it passes
	StdinPipe bool          // TakeStdin feeds the program; otherwise it reads /dev/null
	TTY       bool          // not supported yet
	User      string
	Env       map[string]string // over the sandbox's environment
}

// ExecOption sets fields of an ExecConfig.
type ExecOption func(*ExecConfig)

// WithExecCwd sets the working directory.
func WithExecCwd(path string) ExecOption { return func(c *ExecConfig) { c.Cwd = path } }

// WithExecTimeout kills the program when it runs longer than d.
func WithExecTimeout(d time.Duration) ExecOption { return func(c *ExecConfig) { c.Timeout = d } }

// WithExecStdinPipe gives the program a pipe as standard input.
func WithExecStdinPipe() ExecOption { return func(c *ExecConfig) { c.StdinPipe = true } }

// WithExecTTY asks for a terminal.
func WithExecTTY(enabled bool) ExecOption { return func(c *ExecConfig) { c.TTY = enabled } }

// WithExecUser sets the user: name, uid, name:group or uid:gid.
func WithExecUser(user string) ExecOption { return func(c *ExecConfig) { c.User = user } }

// WithExecEnv merges variables into the program's environment.
func WithExecEnv(env map[string]string) ExecOption {
	return func(c *ExecConfig) { c.Env = merge(c.Env, env) }
}

// ExecOutput is what a finished program printed and returned.
type ExecOutput struct {
	stdout, stderr bytes.Buffer
	code           int
}

// Stdout returns the standard output as text.
func (o *ExecOutput) Stdout() string { return o.stdout.String() }

// StdoutBytes returns the standard output.
func (o *ExecOutput) StdoutBytes() []byte { return o.stdout.Bytes() }

// Stderr returns the standard error as text.
func (o *ExecOutput) Stderr() string { return o.stderr.String() }

// StderrBytes returns the standard error.
func (o *ExecOutput) StderrBytes() []byte { return o.stderr.Bytes() }

// ExitCode returns the program's exit code; 128+n for signal n.
func (o *ExecOutput) ExitCode() int { return o.code }

// Success reports whether the exit code is 0.
func (o *ExecOutput) Success() bool { return o.code == 0 }

// ExecFailure says why a program could not be run. It is the cause of an error
// of kind [ErrExecFailed].
type ExecFailure struct {
	// Kind is not_found, permission_denied, not_executable, bad_cwd, bad_args,
	// resource_limit, user_setup_failed, out_of_memory, pty_setup_failed or other.
	Kind      string
	Errno     *int
	ErrnoName string
	Message   string
	Path      string // the program
}

// Error returns the message.
func (f *ExecFailure) Error() string { return f.Message }

// Exec runs a program and waits for it. A program that ran is no error, whatever
// its exit code. Its whole output is kept in memory: use ExecStream for more
// than that can hold.
//
// Errors: kinds [ErrExecFailed] with a *[ExecFailure] as cause, [ErrExecTimeout],
// [ErrSandboxNotRunning], [ErrCancelled]. When ctx ends the program is killed.
func (s *Sandbox) Exec(ctx context.Context, cmd string, args []string, opts ...ExecOption) (*ExecOutput, error) {
	h, err := s.ExecStream(ctx, cmd, args, opts...)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return h.Collect(ctx)
}

// ExecDefault runs the image's entrypoint and command. Errors: kind
// [ErrNoDefaultCommand] when it has none.
func (s *Sandbox) ExecDefault(ctx context.Context, opts ...ExecOption) (*ExecOutput, error) {
	h, err := s.ExecDefaultStream(ctx, opts...)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	return h.Collect(ctx)
}

// Shell runs a command line with the sandbox's shell (/bin/sh -c).
func (s *Sandbox) Shell(ctx context.Context, command string, opts ...ExecOption) (*ExecOutput, error) {
	return s.Exec(ctx, s.run.Config().Shell, []string{"-c", command}, opts...)
}

// ShellStream is Shell with streamed output.
func (s *Sandbox) ShellStream(ctx context.Context, command string, opts ...ExecOption) (*ExecHandle, error) {
	return s.ExecStream(ctx, s.run.Config().Shell, []string{"-c", command}, opts...)
}

// ExecDefaultStream is ExecDefault with streamed output.
func (s *Sandbox) ExecDefaultStream(ctx context.Context, opts ...ExecOption) (*ExecHandle, error) {
	argv := s.defaultCommand(nil)
	if len(argv) == 0 {
		return nil, &Error{Kind: ErrNoDefaultCommand, Message: fmt.Sprintf("image %q of sandbox %q has no default command", s.run.Config().Image, s.Name()), Hint: "name a program to run"}
	}
	return s.ExecStream(ctx, argv[0], argv[1:], opts...)
}

// defaultCommand is the entrypoint followed by args, or by the image's command
// when there are none.
func (s *Sandbox) defaultCommand(args []string) []string {
	cfg := s.run.Config()
	if len(args) == 0 {
		args = cfg.Cmd
	}
	return append(append([]string(nil), cfg.Entrypoint...), args...)
}

// ExecStream starts a program and returns a handle on its events. A program that
// cannot be started shows as an [ExecEventFailed] event. The program blocks when
// its events are not received; it is killed when the handle is closed.
func (s *Sandbox) ExecStream(ctx context.Context, cmd string, args []string, opts ...ExecOption) (*ExecHandle, error) {
	var c ExecConfig
	for _, o := range opts {
		o(&c)
	}
	if c.TTY {
		return nil, &Error{Kind: ErrUnsupportedOperation, Message: "exec with a terminal is not supported yet"}
	}
	conn, err := s.run.Dial(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	x, err := conn.StartExec(ctx, c.request(cmd, args))
	if err != nil {
		conn.Close()
		return nil, toPublic(err)
	}
	h := &ExecHandle{x: x, cmd: cmd, timeout: c.Timeout, piped: c.StdinPipe}
	if c.Timeout > 0 {
		h.timer = time.AfterFunc(c.Timeout, h.expire)
	}
	return h, nil
}

func (c *ExecConfig) request(cmd string, args []string) agentproto.Exec {
	req := agentproto.Exec{Cmd: cmd, Args: args, Stdin: &c.StdinPipe}
	if c.Cwd != "" {
		req.Cwd = &c.Cwd
	}
	if c.User != "" {
		req.User = &c.User
	}
	for k, v := range c.Env {
		req.Env = append(req.Env, k+"="+v)
	}
	sort.Strings(req.Env)
	return req
}

// ExecEventKind says what an event is.
type ExecEventKind int

// Kinds of events.
const (
	ExecEventStarted ExecEventKind = iota
	ExecEventStdout
	ExecEventStderr
	ExecEventExited
	ExecEventFailed
	ExecEventStdinError
	ExecEventDone
)

// ExecEvent is one thing a program did.
type ExecEvent struct {
	Kind     ExecEventKind
	PID      uint32
	Data     []byte
	ExitCode int
	Failure  *ExecFailure
}

// ExecHandle is a started program. Recv, Wait and Collect are called from one
// goroutine at a time; the rest from any.
type ExecHandle struct {
	x       *agentclient.Exec
	cmd     string
	piped   bool
	timeout time.Duration
	timer   *time.Timer // runs expire; nil without a timeout
	expired atomic.Bool
}

// killWait is how long a program that was killed at its timeout may take to end.
const killWait = 5 * time.Second

// killed is the exit code of a program that SIGKILL has ended.
const killed = 128 + 9

// Recv returns the next event. After Exited or Failed comes Done, for ever.
// Errors: kind [ErrExecTimeout] when the program was killed at its timeout.
func (h *ExecHandle) Recv(ctx context.Context) (*ExecEvent, error) {
	ev, err := h.x.Recv(ctx)
	switch {
	case err != nil && h.expired.Load() && ctx.Err() == nil:
		return nil, h.timedOut()
	case err != nil:
		return nil, toPublic(err)
	case ev.Kind == agentclient.Exited && ev.Code == killed && h.expired.Load():
		return nil, h.timedOut()
	case ev.Kind == agentclient.Exited:
		h.stopTimer()
	}
	out := &ExecEvent{Kind: ExecEventKind(ev.Kind), PID: ev.PID, Data: ev.Data, ExitCode: ev.Code}
	if f := ev.Failure; f != nil {
		out.Failure = &ExecFailure{Kind: f.Kind, Errno: f.Errno, ErrnoName: f.ErrnoName, Message: f.Message, Path: h.cmd}
	}
	return out, nil
}

// expire kills a program whose timeout has passed, whether or not somebody
// receives its events. One that does not end even so is given up, and with it
// the events that nobody has received by then.
func (h *ExecHandle) expire() {
	h.expired.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), killWait)
	defer cancel()
	if h.x.Signal(ctx, 9) == nil {
		time.AfterFunc(killWait, func() { _ = h.x.Close() })
	}
}

func (h *ExecHandle) stopTimer() {
	if h.timer != nil {
		h.timer.Stop()
	}
}

func (h *ExecHandle) timedOut() error {
	return &Error{Kind: ErrExecTimeout, Message: fmt.Sprintf("%s ran longer than %s and was killed", h.cmd, h.timeout)}
}

// Collect receives everything to the end of the program.
func (h *ExecHandle) Collect(ctx context.Context) (*ExecOutput, error) {
	out := &ExecOutput{}
	for {
		ev, err := h.Recv(ctx)
		if err != nil {
			return nil, err
		}
		switch ev.Kind {
		case ExecEventStdout:
			out.stdout.Write(ev.Data)
		case ExecEventStderr:
			out.stderr.Write(ev.Data)
		case ExecEventExited:
			out.code = ev.ExitCode
			return out, nil
		case ExecEventFailed:
			return nil, execFailed(ev.Failure)
		case ExecEventDone:
			return out, nil
		}
	}
}

func execFailed(f *ExecFailure) error {
	return &Error{Kind: ErrExecFailed, Message: fmt.Sprintf("cannot run %s: %s", f.Path, f.Message), Cause: f}
}

// Wait discards the program's output and returns its exit code.
func (h *ExecHandle) Wait(ctx context.Context) (int, error) {
	for {
		ev, err := h.Recv(ctx)
		if err != nil {
			return 0, err
		}
		switch ev.Kind {
		case ExecEventExited:
			return ev.ExitCode, nil
		case ExecEventFailed:
			return 0, execFailed(ev.Failure)
		case ExecEventDone:
			return 0, nil
		}
	}
}

// TakeStdin returns the program's input, nil unless WithExecStdinPipe was given.
func (h *ExecHandle) TakeStdin() *ExecSink {
	if !h.piped {
		return nil
	}
	return &ExecSink{h.x}
}

// Signal sends a signal to the program's process group.
func (h *ExecHandle) Signal(ctx context.Context, signal int) error {
	return toPublic(h.x.Signal(ctx, signal))
}

// Kill sends SIGKILL.
func (h *ExecHandle) Kill(ctx context.Context) error { return h.Signal(ctx, 9) }

// Close ends the session; a program that still runs is killed. It is idempotent.
func (h *ExecHandle) Close() error {
	h.stopTimer()
	return toPublic(h.x.Close())
}

// ExecSink feeds a program's standard input. A write blocks while the program
// does not read.
type ExecSink struct{ x *agentclient.Exec }

// Write sends p.
func (s *ExecSink) Write(p []byte) (int, error) { return s.WriteCtx(context.Background(), p) }

// WriteCtx sends p; when ctx ends the session cannot be used any more.
func (s *ExecSink) WriteCtx(ctx context.Context, p []byte) (int, error) {
	n, err := s.x.WriteStdin(ctx, p)
	return n, toPublic(err)
}

// Close ends the program's input.
func (s *ExecSink) Close() error { return toPublic(s.x.CloseStdin()) }
