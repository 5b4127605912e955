package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// greetTime bounds the time from fork to QEMU's greeting.
const greetTime = 20 * time.Second

// maxStderr is how much of what QEMU prints is kept for a failure's message.
const maxStderr = 4096

// Options say how QEMU is found and started. The zero value is useful.
type Options struct {
	Binary string // "" asks Find
	// Launch makes the command, confined; nil starts QEMU as it is. files
	// become descriptors 3 and up; binds are the files QEMU opens by path.
	Launch func(argv []string, files []*os.File, binds []string) (*exec.Cmd, error)
	// Spawn starts the command; nil means cmd.Start. The parent-death signal
	// follows the thread that starts QEMU, so it must not end before QEMU.
	Spawn func(*exec.Cmd) error
	// Runtime is a directory where facts about this host's boot are kept: the
	// accelerator probe and the TSC frequency. "" keeps nothing.
	Runtime string
}

// machine is one QEMU process.
//
// Created -> Booting -> Running -> Stopping -> Stopped; any of the middle -> Failed.
type machine struct {
	cfg vmm.Config
	o   Options

	mu    sync.Mutex
	state vmm.State // guarded by mu; changed by to only
	accel vmm.Accel // guarded by mu
	cmd   *exec.Cmd // guarded by mu
	exit  vmm.Exit  // guarded by mu until done is closed

	killOnce sync.Once
	done     chan struct{}
}

// transitions are the allowed changes of state.
var transitions = map[vmm.State][]vmm.State{
	vmm.Created:  {vmm.Booting},
	vmm.Booting:  {vmm.Running, vmm.Stopping, vmm.Stopped, vmm.Failed},
	vmm.Running:  {vmm.Stopping, vmm.Stopped, vmm.Failed},
	vmm.Stopping: {vmm.Stopped, vmm.Failed},
}

// New describes a machine; nothing is started.
func New(cfg vmm.Config, o Options) (vmm.Machine, error) {
	if err := check(&cfg); err != nil {
		return nil, err
	}
	return &machine{cfg: cfg, o: o, done: make(chan struct{})}, nil
}

// to changes the state. An illegal change is an error that names both states.
func (m *machine) to(next vmm.State) error {
	m.mu.Lock()
	from := m.state
	allowed := false
	for _, s := range transitions[from] {
		allowed = allowed || s == next
	}
	if allowed {
		m.state = next
	}
	m.mu.Unlock()
	if !allowed {
		return fmt.Errorf("machine %s cannot become %s: it is %s", m.cfg.ID, next, from)
	}
	if m.cfg.Changed != nil {
		m.cfg.Changed(from, next)
	}
	return nil
}

func (m *machine) State() vmm.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *machine) Accel() vmm.Accel {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.accel
}

func (m *machine) PID() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cmd == nil || m.cmd.Process == nil {
		return 0
	}
	return m.cmd.Process.Pid
}

func (m *machine) AgentReady()           { _ = m.to(vmm.Running) }
func (m *machine) Stopping()             { _ = m.to(vmm.Stopping) }
func (m *machine) Done() <-chan struct{} { return m.done }

// Exit says how QEMU ended; valid once Done is closed.
func (m *machine) Exit() vmm.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// Kill ends QEMU at once, also one that is stopped by a signal.
func (m *machine) Kill() {
	m.killOnce.Do(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.cmd != nil && m.cmd.Process != nil {
			_ = m.cmd.Process.Kill()
		}
	})
}

// Start starts QEMU and waits for its greeting. After an error nothing runs.
func (m *machine) Start(ctx context.Context) error {
	if err := m.to(vmm.Booting); err != nil {
		return err
	}
	binary, accel, tsc, err := m.prepare(ctx)
	if err != nil {
		return err
	}
	ours, theirs, err := monitorPair()
	if err != nil {
		return err
	}
	defer theirs.Close()
	argv, files := commandLine(&m.cfg, binary, accel, theirs, tsc)
	cmd, stderr, err := m.command(argv, files)
	if err != nil {
		ours.Close()
		return err
	}
	spawn := m.o.Spawn
	if spawn == nil {
		spawn = (*exec.Cmd).Start
	}
	err = spawn(cmd)
	stderr.writer.Close()
	if err != nil {
		ours.Close()
		stderr.reader.Close()
		return errdefs.Wrap(errdefs.Internal, err, "start %s", binary)
	}
	m.mu.Lock()
	m.cmd, m.accel = cmd, accel
	m.mu.Unlock()
	return m.watch(ctx, newQMP(ours), cmd, stderr)
}

// prepare finds QEMU, the accelerator and, for TCG, the TSC's frequency.
func (m *machine) prepare(ctx context.Context) (binary string, accel vmm.Accel, tscKHz int, err error) {
	if binary = m.o.Binary; binary == "" {
		if binary, _, err = Find(); err != nil {
			return "", "", 0, err
		}
	}
	if accel, err = Choose(ctx, m.cfg.Accel, m.o.Runtime); err != nil {
		return "", "", 0, err
	}
	if accel == vmm.AccelTCG {
		if tscKHz, err = TSCKHz(m.o.Runtime); err != nil {
			return "", "", 0, err
		}
	}
	return binary, accel, tscKHz, nil
}

// stderrPipe carries what QEMU prints: to the log, and its end to a message.
type stderrPipe struct{ reader, writer *os.File }

func (m *machine) command(argv []string, files []*os.File) (*exec.Cmd, *stderrPipe, error) {
	var cmd *exec.Cmd
	if m.o.Launch != nil {
		var err error
		if cmd, err = m.o.Launch(argv, files, []string{m.cfg.Kernel.Image, m.cfg.Kernel.Initrd}); err != nil {
			return nil, nil, err
		}
	} else {
		cmd = exec.Command(argv[0], argv[1:]...)
		cmd.ExtraFiles = files
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		cmd.Dir = "/"
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdout, cmd.Stderr = w, w
	return cmd, &stderrPipe{r, w}, nil
}

// watch starts the goroutines that follow QEMU to its end and waits for the
// greeting.
func (m *machine) watch(ctx context.Context, q *qmp, cmd *exec.Cmd, stderr *stderrPipe) error {
	greeted := make(chan error, 1)
	log := duplicate(m.cfg.Stderr) // the caller closes its own after Start
	var wg sync.WaitGroup
	var reason, detail, printed string
	wg.Add(2)
	go func() {
		defer wg.Done()
		reason, detail = m.listen(q, greeted)
	}()
	go func() {
		defer wg.Done()
		printed = copyStderr(log, stderr.reader)
	}()
	go func() {
		err := cmd.Wait()
		q.f.Close()
		wg.Wait()
		m.ended(err, reason, detail, printed)
	}()
	ctx, cancel := context.WithTimeout(ctx, greetTime)
	defer cancel()
	select {
	case err := <-greeted:
		if err == nil {
			return nil
		}
		m.Kill()
		<-m.done
		return m.startError(err)
	case <-ctx.Done():
		m.Kill()
		<-m.done
		return m.startError(errors.Join(errors.New("QEMU does not answer"), context.Cause(ctx)))
	}
}

func (m *machine) startError(err error) error {
	e := m.Exit()
	what := e.Detail
	if what == "" {
		what = err.Error()
	}
	return errdefs.Wrap(errdefs.Internal, err, "QEMU did not start (%s): %s", e.Status, what)
}

// listen follows QMP to its end and returns the reason of the shutdown and what
// went wrong. A guest that KVM cannot run stops in state internal-error, and
// QEMU neither exits nor says so by itself.
func (m *machine) listen(q *qmp, greeted chan<- error) (reason, detail string) {
	err := q.greet()
	greeted <- err
	for err == nil {
		var msg *qmpMessage
		if msg, err = q.next(); err != nil {
			break
		}
		switch msg.Event {
		case "SHUTDOWN":
			reason = msg.Data.Reason
		case "GUEST_PANICKED":
			detail = "guest panicked"
		case "STOP":
			_ = q.command("query-status")
		}
		if strings.Contains(string(msg.Return), `"internal-error"`) {
			detail = internalError
			m.Kill()
		}
	}
	return reason, detail
}

// internalError is the detail of an exit because the accelerator could not run
// the guest.
const internalError = "internal-error: the accelerator cannot run this guest"

func (m *machine) ended(err error, reason, detail, printed string) {
	status := "exit status 0"
	if err != nil {
		status = err.Error()
	}
	if detail == "" && (err != nil || reason == "") {
		detail = lastLine(printed)
	}
	m.mu.Lock()
	m.exit = vmm.Exit{Reason: reason, Status: status, Detail: detail}
	stopping := m.state == vmm.Stopping
	m.mu.Unlock()
	next := vmm.Failed
	if stopping || reason == "guest-shutdown" {
		next = vmm.Stopped
	}
	_ = m.to(next)
	close(m.done)
}

// copyStderr passes what QEMU prints on and returns its end.
func copyStderr(log, r *os.File) string {
	defer r.Close()
	if log != nil {
		defer log.Close()
	}
	var tail []byte
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			tail = append(tail, buf[:n]...)
			tail = tail[max(0, len(tail)-maxStderr):]
			if log != nil {
				_, _ = log.Write(buf[:n])
			}
		}
		if err != nil {
			return string(tail)
		}
	}
}

// duplicate returns a close-on-exec copy of f, nil if there is none.
func duplicate(f *os.File) *os.File {
	if f == nil {
		return nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	return os.NewFile(uintptr(fd), f.Name())
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// monitorPair is a connected socket pair; ours is close-on-exec and polled.
func monitorPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "qmp"), os.NewFile(uintptr(fds[1]), "qmp (QEMU)"), nil
}
