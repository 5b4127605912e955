package qemu

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// standInQEMU is a QEMU that aborts, says nothing, or reports that the guest
// cannot be run. Its monitor is the descriptor that the command line names.
func standInQEMU(kind string) int {
	var fd int
	for _, a := range os.Args {
		if _, err := fmt.Sscanf(a, "socket,id=mon,fd=%d", &fd); err == nil {
			break
		}
	}
	mon := os.NewFile(uintptr(fd), "mon")
	in := bufio.NewReader(mon)
	greet := func() {
		fmt.Fprintln(mon, `{"QMP": {"version": {}, "capabilities": []}}`)
		_, _ = in.ReadString('\n')
		fmt.Fprintln(mon, `{"return": {}}`)
	}
	switch kind {
	case "aborts":
		fmt.Fprintln(os.Stderr, "qemu: could not do it")
		return 1
	case "silent":
		hang()
	case "internal-error":
		greet()
		fmt.Fprintln(mon, `{"event": "STOP"}`)
		_, _ = in.ReadString('\n')
		fmt.Fprintln(mon, `{"return": {"status": "internal-error", "running": false}}`)
		hang() // neither exits nor says so, as the real one
	case "full":
		greet()
		fmt.Fprintln(mon, `{"event": "BLOCK_IO_ERROR", "data": {"node-name": "d1", "reason": "No space left on device", "nospace": true, "operation": "write", "action": "stop"}}`)
		fmt.Fprintln(mon, `{"event": "STOP"}`)
		_, _ = in.ReadString('\n')
		fmt.Fprintln(mon, `{"return": {"status": "io-error", "running": false}}`)
		hang()
	case "runs":
		greet()
		_, _ = in.ReadString('\n') // until the other end has gone
	case "stops":
		greet()
		fmt.Fprintln(mon, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}`)
	case "panics":
		greet()
		fmt.Fprintln(os.NewFile(uintptr(console()), "console"), "Kernel panic - not syncing: \x1b[31mno init")
		fmt.Fprintln(mon, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`)
	}
	return 0
}

// console is the descriptor of a stand-in's console.
func console() (fd int) {
	for _, a := range os.Args {
		if _, err := fmt.Sscanf(a, "socket,id=con,fd=%d", &fd); err == nil {
			break
		}
	}
	return fd
}

// standIn returns a machine around a stand-in.
func standIn(t *testing.T, kind string) vmm.Machine { return standInWith(t, kind, nil) }

func standInWith(t *testing.T, kind string, change func(*vmm.Config)) vmm.Machine {
	t.Helper()
	t.Setenv(standInEnv, kind)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	console, err := os.OpenFile(filepath.Join(t.TempDir(), "console"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	agent := os.NewFile(uintptr(fds[1]), "agent")
	t.Cleanup(func() { unix.Close(fds[0]); agent.Close(); console.Close() })
	cfg := vmm.Config{ID: "T", CPUs: 1, MemoryMiB: 128, Accel: vmm.AccelTCG, Kernel: vmm.Kernel{Image: "/k", Initrd: "/i"}, Agent: agent, Console: console, Stderr: console}
	if change != nil {
		change(&cfg)
	}
	m, err := New(cfg, Options{Binary: self})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestStartReportsWhatQEMUSaid(t *testing.T) {
	m := standIn(t, "aborts")
	err := m.Start(context.Background())
	if err == nil || !strings.Contains(err.Error(), "could not do it") {
		t.Fatalf("Start = %v, want QEMU's own words", err)
	}
	if m.State() != vmm.Failed {
		t.Errorf("state = %s", m.State())
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	m := standIn(t, "silent")
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := m.Start(ctx); err == nil {
		t.Fatal("Start of a silent QEMU succeeded")
	}
	<-m.Done()
}

// TestStoppedByItself: a QEMU that stops the guest neither exits nor says so.
func TestStoppedByItself(t *testing.T) {
	for kind, says := range map[string]string{"internal-error": "internal-error", "full": "the host's disk is full"} {
		t.Run(kind, func(t *testing.T) {
			m := standIn(t, kind)
			if err := m.Start(context.Background()); err != nil {
				t.Fatal(err)
			}
			<-m.Done()
			if e := m.Exit(); !strings.Contains(e.Detail, says) || m.State() != vmm.Failed {
				t.Errorf("exit = %+v in state %s", e, m.State())
			}
		})
	}
}

func TestPanicIsNotACleanStop(t *testing.T) {
	m := standIn(t, "panics")
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
	if e := m.Exit(); e.Reason != "guest-reset" || m.State() != vmm.Failed {
		t.Errorf("exit = %+v in state %s, want guest-reset and failed", e, m.State())
	}
	if d := m.Exit().Detail; d != "guest: Kernel panic - not syncing: [31mno init" {
		t.Errorf("detail = %q, want the console's words, printable", d)
	}
}

// TestTheReasonIsNotLost: QEMU ends right after it has said why.
func TestTheReasonIsNotLost(t *testing.T) {
	for range 20 {
		m := standIn(t, "stops")
		if err := m.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
		m.AgentReady()
		<-m.Done()
		if e := m.Exit(); e.Reason != "guest-shutdown" || m.State() != vmm.Stopped {
			t.Fatalf("exit = %+v in state %s", e, m.State())
		}
	}
}

func TestBootDeadline(t *testing.T) {
	m := standInWith(t, "runs", func(c *vmm.Config) { c.BootTimeout = 50 * time.Millisecond })
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
	if e := m.Exit(); !strings.Contains(e.Detail, "did not boot within 50ms") || m.State() != vmm.Failed {
		t.Errorf("exit = %+v in state %s", e, m.State())
	}
}

// TestAFailedStartIsDone: whoever waits for the end of a machine that never ran
// must not wait for ever.
func TestAFailedStartIsDone(t *testing.T) {
	m := standInWith(t, "runs", func(c *vmm.Config) { c.Accel = "warp" })
	if err := m.Start(context.Background()); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Fatalf("Start = %v", err)
	}
	m.Kill()
	<-m.Done()
	if m.State() != vmm.Failed {
		t.Errorf("state = %s", m.State())
	}
	m = standIn(t, "runs")
	m.Kill()
	m.Kill()
	<-m.Done()
}

func TestTailBoundsWhatAGuestPrints(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tl := newTail(f)
	for range maxLogged/(64<<10) + 10 {
		if _, err := tl.Write(make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = tl.Write([]byte("last words\n"))
	tl.close()
	fi, err := f.Stat()
	if err != nil || fi.Size() > maxLogged+100 {
		t.Errorf("%d bytes kept, %v", fi.Size(), err)
	}
	if got := tl.lastLine("words"); got != "last words" || len(tl.String()) > tailSize {
		t.Errorf("end is %q of %d bytes", got, len(tl.String()))
	}
}

func TestAgentFailpointsReachTheGuest(t *testing.T) {
	if got := agentFailpoints("supervisor.ready=kill;agent.crash=exit;agent.x=a b"); got != "agent.crash=exit" {
		t.Errorf("got %q", got)
	}
}

func TestKillIsIdempotentAndStates(t *testing.T) {
	m := standIn(t, "runs")
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	m.AgentReady()
	if m.State() != vmm.Running {
		t.Fatalf("state = %s", m.State())
	}
	m.Stopping()
	m.Kill()
	m.Kill()
	<-m.Done()
	if m.State() != vmm.Stopped {
		t.Errorf("state = %s, want stopped", m.State())
	}
	if err := m.Start(context.Background()); err == nil {
		t.Error("a stopped machine started again")
	}
}

func TestDeviceBudget(t *testing.T) {
	cfg := vmm.Config{ID: "T", CPUs: 1, MemoryMiB: 128, Agent: os.Stdin, Disks: make([]vmm.Disk, DeviceSlots+1)}
	for i := range cfg.Disks {
		cfg.Disks[i] = vmm.Disk{Serial: fmt.Sprint("d", i), Format: "raw", File: os.Stdin}
	}
	if _, err := New(cfg, Options{}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("New with %d disks = %v", len(cfg.Disks), err)
	}
	cfg.Disks = cfg.Disks[:DeviceSlots]
	if _, err := New(cfg, Options{}); err != nil {
		t.Errorf("New with %d disks = %v", len(cfg.Disks), err)
	}
	for name, change := range map[string]func(*vmm.Disk){
		"comma":  func(d *vmm.Disk) { d.Serial = "a,readonly=off" },
		"format": func(d *vmm.Disk) { d.Format = "qcow2" },
		"twice":  func(d *vmm.Disk) { d.Serial = cfg.Disks[0].Serial },
		"long":   func(d *vmm.Disk) { d.Serial = strings.Repeat("x", maxSerial+1) },
	} {
		bad := cfg
		bad.Disks = append([]vmm.Disk(nil), cfg.Disks...)
		change(&bad.Disks[1])
		if _, err := New(bad, Options{}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
