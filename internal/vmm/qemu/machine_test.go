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
	case "runs":
		greet()
		_, _ = in.ReadString('\n') // until the other end has gone
	case "panics":
		greet()
		fmt.Fprintln(mon, `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`)
	}
	return 0
}

// standIn returns a machine around a stand-in.
func standIn(t *testing.T, kind string) vmm.Machine {
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
	m, err := New(vmm.Config{ID: "T", CPUs: 1, MemoryMiB: 128, Accel: vmm.AccelTCG, Kernel: vmm.Kernel{Image: "/k", Initrd: "/i"}, Agent: agent, Console: console, Stderr: console},
		Options{Binary: self})
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

func TestInternalErrorEndsTheMachine(t *testing.T) {
	m := standIn(t, "internal-error")
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
	if e := m.Exit(); !strings.Contains(e.Detail, "internal-error") || m.State() != vmm.Failed {
		t.Errorf("exit = %+v in state %s", e, m.State())
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
	cfg := vmm.Config{Disks: make([]vmm.Disk, DeviceSlots+1)}
	for i := range cfg.Disks {
		cfg.Disks[i] = vmm.Disk{Serial: fmt.Sprint("d", i), Format: "raw"}
	}
	if _, err := New(cfg, Options{}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("New with %d disks = %v", len(cfg.Disks), err)
	}
	cfg.Disks = cfg.Disks[:DeviceSlots]
	if _, err := New(cfg, Options{}); err != nil {
		t.Errorf("New with %d disks = %v", len(cfg.Disks), err)
	}
}
