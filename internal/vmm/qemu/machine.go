package qemu

import (
	"context"
	"encoding/json"
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

// Options say how QEMU is started.
type Options struct {
	// Binary is the path of QEMU; "" means that of Find.
	Binary string
	// Launch makes the command: argv, files that become its descriptors 3 and
	// up, and the paths it opens for reading. nil runs argv as it is.
	Launch func(argv []string, files []*os.File, binds []string) (*exec.Cmd, error)
	// Spawn starts the command, from a thread that lives on; nil: cmd.Start.
	Spawn func(*exec.Cmd) error
	// Runtime is where facts about this boot of the host are kept: the cache of host facts; "" keeps none.
	Runtime string
}

// greetTime bounds the time from the start of QEMU to its QMP greeting (30
// ms here when idle).
const greetTime = 20 * time.Second

// allowed lists the states each state may change to. Nothing leaves Stopped
// and Failed.
var allowed = map[vmm.State][]vmm.State{
	vmm.Created:  {vmm.Booting},
	vmm.Booting:  {vmm.Running, vmm.Stopping, vmm.Failed},
	vmm.Running:  {vmm.Stopping, vmm.Failed},
	vmm.Stopping: {vmm.Stopped, vmm.Failed},
}

// machine is one QEMU process.
type machine struct {
	cfg  vmm.Config
	opts Options

	mu       sync.Mutex
	state    vmm.State   // guarded by mu
	accel    vmm.Accel   // guarded by mu; chosen by Start
	cmd      *exec.Cmd   // guarded by mu; set when started
	exit     vmm.Exit    // guarded by mu until done is closed
	cause    string      // guarded by mu: first reason of a failure
	killed   bool        // guarded by mu: Kill was called by the owner
	deadline *time.Timer // guarded by mu: boot deadline

	console, stderr *tail
	readers         sync.WaitGroup // of console and QMP
	done            chan struct{}
}

// New prepares a machine; nothing is started and nothing looked for.
func New(cfg vmm.Config, o Options) (vmm.Machine, error) {
	if err := check(&cfg); err != nil {
		return nil, err
	}
	return &machine{cfg: cfg, opts: o, done: make(chan struct{})}, nil
}

// to changes the state. An illegal change is refused; callers that do not care
// are those racing with the end of the process.
func (m *machine) to(next vmm.State) error {
	m.mu.Lock()
	from := m.state
	ok := false
	for _, s := range allowed[from] {
		ok = ok || s == next
	}
	if ok {
		m.state = next
	}
	m.mu.Unlock()
	if !ok {
		return errdefs.New(errdefs.Internal, "machine cannot go from %s to %s", from, next)
	}
	if m.cfg.Changed != nil {
		m.cfg.Changed(from, next)
	}
	return nil
}

// Start starts QEMU and returns when it has greeted on QMP.
func (m *machine) Start(ctx context.Context) error {
	if err := m.to(vmm.Booting); err != nil {
		return err
	}
	err := m.start(ctx)
	if err == nil {
		return nil
	}
	m.fail(err.Error())
	if m.PID() == 0 { // nothing to wait for
		_ = m.to(vmm.Failed)
		close(m.done)
		return err
	}
	m.kill()
	<-m.done
	return m.startError(ctx, err)
}

// startError adds what QEMU said to why it did not start.
func (m *machine) startError(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "QEMU")
	}
	said := m.stderr.lastLine(program() + ": ")
	if _, text, ok := strings.Cut(said, program()+": "); ok {
		said = text
	} else {
		said = m.stderr.lastLine("")
	}
	if said == "" {
		return errdefs.Wrap(errdefs.Internal, err, "QEMU did not start").WithHint("msb doctor shows what QEMU needs")
	}
	e := errdefs.New(errdefs.Internal, "QEMU did not start: %s", said)
	switch {
	case strings.Contains(said, "lock"):
		return e.WithHint("another program uses a disk of the sandbox")
	case strings.Contains(said, "memory"):
		return e.WithHint("give the sandbox less memory")
	}
	return e.WithHint("msb doctor shows what QEMU needs")
}

// start does the work of Start up to the greeting.
func (m *machine) start(ctx context.Context) error {
	binary, accel, tscKHz, err := m.prepare(ctx)
	if err != nil {
		return err
	}
	monOurs, monTheirs, err := socketpair("qmp")
	if err != nil {
		return err
	}
	conOurs, conTheirs, err := socketpair("console")
	if err != nil {
		monOurs.Close()
		monTheirs.Close()
		return err
	}
	argv, files := commandLine(&m.cfg, binary, accel, ends{monitor: monTheirs, console: conTheirs}, tscKHz)
	err = m.spawn(argv, files)
	monTheirs.Close() // only QEMU may hold them: its end is the end of file
	conTheirs.Close()
	if err != nil {
		monOurs.Close()
		conOurs.Close()
		return err
	}
	copyConsole(m.console, conOurs, &m.readers)
	greeted := make(chan error, 1)
	q := newQMP(monOurs)
	m.readers.Go(func() { m.listen(q, greeted) })
	go m.reap(monOurs, conOurs)
	return m.waitGreeting(ctx, greeted)
}

// prepare finds QEMU, the accelerator and, for TCG, the TSC's frequency.
func (m *machine) prepare(ctx context.Context) (binary string, accel vmm.Accel, tscKHz int, err error) {
	if binary = m.opts.Binary; binary == "" {
		if binary, _, err = Find(); err != nil {
			return "", "", 0, err
		}
	}
	if accel, err = Choose(ctx, m.cfg.Accel, m.opts.Runtime); err != nil {
		return "", "", 0, err
	}
	if accel == vmm.AccelTCG {
		if tscKHz, err = TSCKHz(m.opts.Runtime); err != nil {
			return "", "", 0, err
		}
	}
	m.mu.Lock()
	m.accel = accel
	m.mu.Unlock()
	return binary, accel, tscKHz, nil
}

// waitGreeting waits for the first sign of life; then the boot has its deadline.
func (m *machine) waitGreeting(ctx context.Context, greeted <-chan error) error {
	timeout := time.NewTimer(greetTime)
	defer timeout.Stop()
	select {
	case err := <-greeted:
		if err == nil {
			m.armDeadline()
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout.C:
		return fmt.Errorf("QEMU gave no sign of life within %s", greetTime)
	}
}

// spawn runs the command with its files and keeps it.
func (m *machine) spawn(argv []string, files []*os.File) error {
	launch := m.opts.Launch
	if launch == nil {
		launch = plainLaunch
	}
	cmd, err := launch(argv, files, []string{m.cfg.Kernel.Image, m.cfg.Kernel.Initrd})
	if err != nil {
		return err
	}
	m.console, m.stderr = newTail(m.cfg.Console), newTail(m.cfg.Stderr)
	cmd.Stdout, cmd.Stderr = m.stderr, m.stderr
	cmd.WaitDelay = drainTime // a descriptor that leaked must not keep us waiting
	start := m.opts.Spawn
	if start == nil {
		start = (*exec.Cmd).Start
	}
	if err := start(cmd); err != nil {
		m.console.close()
		m.stderr.close()
		return errdefs.Wrap(errdefs.Internal, err, "start %s", argv[0])
	}
	m.mu.Lock()
	m.cmd = cmd
	m.mu.Unlock()
	return nil
}

func plainLaunch(argv []string, files []*os.File, _ []string) (*exec.Cmd, error) {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Dir = "/"
	return cmd, nil
}

// armDeadline limits the time until AgentReady.
func (m *machine) armDeadline() {
	d := m.cfg.BootTimeout
	if d <= 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.deadline = time.AfterFunc(d, func() {
		if m.State() != vmm.Booting {
			return
		}
		m.fail(fmt.Sprintf("guest did not boot within %s", d))
		m.kill()
	})
}

// fail notes why the machine failed; the first reason stays.
func (m *machine) fail(why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cause == "" && !m.killed {
		m.cause = why
	}
}

// listen follows QMP from greeting to end of file.
func (m *machine) listen(q *qmp, greeted chan<- error) {
	err := q.greet(func(msg *qmpMessage) { m.handle(q, msg) })
	greeted <- err
	for err == nil {
		var msg *qmpMessage
		if msg, err = q.next(); err == nil {
			m.handle(q, msg)
		}
	}
}

// handle handles one message. STOP comes without having been asked for when KVM
// gives up on a guest: QEMU neither exits nor says so, only query-status tells.
// It also comes after a disk's image could not get longer for want of space on
// the host; other errors of disks are the guest's to see.
func (m *machine) handle(q *qmp, msg *qmpMessage) {
	switch msg.Event {
	case "SHUTDOWN":
		m.mu.Lock()
		m.exit.Reason = msg.Data.Reason
		m.mu.Unlock()
	case "GUEST_PANICKED":
		m.fail("guest kernel panicked")
	case "BLOCK_IO_ERROR":
		if msg.Data.NoSpace && msg.Data.Action == "stop" {
			m.fail("the host's disk is full: a disk of the sandbox cannot be written")
		}
	case "STOP":
		_ = q.command("query-status")
	}
	var answer struct {
		Status string `json:"status"`
	}
	if len(msg.Return) == 0 || json.Unmarshal(msg.Return, &answer) != nil {
		return
	}
	switch answer.Status {
	case "internal-error":
		m.fail("internal-error: the accelerator cannot run this guest")
		m.kill()
	case "io-error":
		m.fail("io-error: a disk of the sandbox cannot be read or written")
		m.kill()
	}
}

// reap waits for the process and everything that reads from it, then says how
// the machine ended.
func (m *machine) reap(qmp, console *os.File) {
	err := m.cmd.Wait()
	limit := time.AfterFunc(drainTime, func() { qmp.Close(); console.Close() })
	m.readers.Wait()
	limit.Stop()
	qmp.Close()
	console.Close()
	m.finish(err)
	m.console.close()
	m.stderr.close()
	close(m.done)
}

// finish computes Exit and the final state.
func (m *machine) finish(err error) {
	m.mu.Lock()
	if m.deadline != nil {
		m.deadline.Stop()
	}
	e := &m.exit
	e.Status = m.cmd.ProcessState.String()
	asked := m.state == vmm.Stopping
	clean := e.Reason == "guest-shutdown" && m.cause == ""
	switch {
	case m.cause != "":
		e.Detail = m.cause
	case clean || m.killed:
	case e.Reason == "guest-reset" || e.Reason == "guest-panic":
		e.Detail = "guest kernel panicked"
		if line := m.console.lastLine("Kernel panic"); line != "" {
			e.Detail = "guest: " + line
		}
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		e.Detail = err.Error()
		if said := m.stderr.lastLine(""); said != "" {
			e.Detail = said
		}
	}
	m.mu.Unlock()
	if clean && !asked {
		asked = m.to(vmm.Stopping) == nil
	}
	if asked && (clean || m.killed) {
		_ = m.to(vmm.Stopped)
		return
	}
	_ = m.to(vmm.Failed)
}

// AgentReady ends the boot.
func (m *machine) AgentReady() {
	m.mu.Lock()
	if m.deadline != nil {
		m.deadline.Stop()
	}
	m.mu.Unlock()
	_ = m.to(vmm.Running)
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

// Stopping tells the machine that its end is wanted.
func (m *machine) Stopping() { _ = m.to(vmm.Stopping) }

// Kill ends QEMU at once. A machine that was never started stays Created.
func (m *machine) Kill() {
	m.mu.Lock()
	m.killed = true
	started := m.cmd != nil
	never := m.state == vmm.Created
	m.mu.Unlock()
	if never {
		m.mu.Lock()
		m.state = vmm.Failed
		m.mu.Unlock()
		close(m.done)
		return
	}
	if started {
		m.Stopping()
		m.kill()
	}
}

// kill sends SIGKILL, which also ends a stopped process. os.Process keeps a
// pidfd, so a reaped process is not mistaken.
func (m *machine) kill() {
	m.mu.Lock()
	cmd := m.cmd
	m.mu.Unlock()
	if cmd != nil {
		_ = cmd.Process.Kill()
	}
}

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Exit() vmm.Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

// socketpair returns our end, which is non-blocking, and the child's.
func socketpair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair for %s: %w", name, err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" of QEMU"), nil
}

// dup duplicates a file's descriptor without changing its mode.
func dup(f *os.File) (int, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	cerr := c.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) })
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}
