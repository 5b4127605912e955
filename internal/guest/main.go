package guest

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// Instants at which tests let the agent fail. agent.crash is hit when the first
// program is asked for.
var (
	pointReady = failpoint.New("agent.ready")
	pointCrash = failpoint.New("agent.crash")
)

// Main runs the agent as PID 1. It does not return.
func Main() {
	if len(os.Args) > 1 && os.Args[1] == shimArg {
		shimMain(os.Args[2:])
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "msb-agent: this program is the init process of a sandbox; it does nothing here")
		os.Exit(2)
	}
	began := bootNS()
	a := &agent{began: began, devNull: -1, waits: newLockWaits()}
	err := a.run()
	logf("agent: %v", err)
	powerOff()
}

// run does everything from the first mount to the goodbye.
func (a *agent) run() error {
	if err := earlyMounts(); err != nil {
		return err
	}
	if err := failpoint.ArmSpec(cmdlineWord("msb.failpoint")); err != nil {
		logf("agent: %v", err)
	}
	mods, problems := loadBootModules()
	a.modules = mods
	port, err := openPort(agentproto.PortName, 10*time.Second)
	if err != nil {
		return err
	}
	a.link = newLink(port)
	hello := agentproto.Hello{Version: version.Version, BootNS: a.began, Modules: problems}
	if err := a.link.send(0, 0, agentproto.MsgHello, hello); err != nil {
		return err
	}
	if err := a.link.Drain(); err != nil { // reading is an end of file until the host has opened its side
		return err
	}
	boot, err := a.waitBoot()
	if err != nil {
		return err
	}
	a.procs, a.sessions = newProcs(), newSessions()
	if err := a.boot(boot); err != nil {
		return a.bootFailed(err)
	}
	_ = pointReady.Hit()
	ready := agentproto.Ready{
		BootTimeNS: a.began, InitTimeNS: bootNS() - a.began, ReadyTimeNS: bootNS(), AgentVersion: version.Version,
	}
	if err := a.link.send(0, 0, agentproto.MsgReady, ready); err != nil {
		return err
	}
	if err := a.link.Drain(); err != nil {
		return err
	}
	a.beforePrograms()
	return a.serve()
}

// beforePrograms does what only programs need, before any request is read: it
// takes 20 ms of an emulated guest, about what the host takes to ask for the
// first one.
func (a *agent) beforePrograms() {
	catchSignals()
	a.procs.watch(a.waits.soon)
	a.waits.watch()
	if err := loopbackUp(); err != nil {
		logf("agent: loopback: %v", err)
	}
}

// catchSignals keeps signals from ending PID 1, which would panic the kernel.
// They are caught, not ignored: programs would inherit an ignored one. These are
// the signals that end a Go program; the kernel gives PID 1 no signal it has no
// handler for, and the runtime's handler does nothing about others. All 64 would
// take 10 ms of an emulated guest's boot.
func catchSignals() {
	c := make(chan os.Signal, 1) // never read: signal delivery does not block
	signal.Notify(c, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT,
		unix.SIGBUS, unix.SIGFPE, unix.SIGSEGV, unix.SIGPIPE, unix.SIGTERM, unix.SIGSTKFLT, unix.SIGSYS)
}

// agent is the state of PID 1.
type agent struct {
	began   uint64
	link    *link
	modules *modules
	root    *rootFS
	growth  growth
	waits   *lockWaits
	env     []string // default environment of programs
	workdir string
	user    string

	devNull int // descriptor of /dev/null, opened before any program ran

	procs    *procs
	sessions *sessions
}

// waitBoot reads frames until the supervisor says what to set up.
func (a *agent) waitBoot() (*agentproto.Boot, error) {
	for {
		f, err := a.link.r.ReadFrame()
		if err != nil {
			return nil, err
		}
		typ, _, p, err := agentproto.Decode(f.Body)
		if err != nil {
			return nil, err
		}
		switch typ {
		case agentproto.MsgBoot:
			var b agentproto.Boot
			return &b, agentproto.Unmarshal(p, &b)
		case agentproto.MsgShutdown:
			return nil, errors.New("shut down before boot")
		}
	}
}

// stepError names the step of Boot that failed.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.step + ": " + e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// bootFailed reports why the sandbox cannot start and ends the link in order.
func (a *agent) bootFailed(err error) error {
	f := agentproto.BootFailed{Step: "boot", Message: err.Error()}
	var se *stepError
	if errors.As(err, &se) {
		f.Step, f.Message = se.step, se.err.Error()
	}
	_ = a.link.send(0, 0, agentproto.MsgBootFailed, f)
	a.unmountAll()
	a.link.close()
	return err
}

// bootNS is CLOCK_BOOTTIME in nanoseconds.
func bootNS() uint64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return uint64(ts.Nano())
}

// logf writes a line to the console.
func logf(format string, args ...any) { fmt.Fprintf(os.Stderr, "msb-"+format+"\n", args...) }

// cmdlineWord returns the value of NAME=VALUE on the kernel's command line.
func cmdlineWord(name string) string {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for _, w := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(w, name+"="); ok {
			return v
		}
	}
	return ""
}

// powerOff ends the machine. It does not return.
func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	for {
		time.Sleep(time.Hour) // the VMM ends us; returning would panic the kernel
	}
}
