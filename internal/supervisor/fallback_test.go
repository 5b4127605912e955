package supervisor

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// newSupervisor returns a supervisor of a sandbox without root image and mounts
// whose QEMU is the stand-in of the kind, on a host whose KVM probe said yes.
func newSupervisor(t *testing.T, kind string) *supervisor {
	t.Helper()
	dir, err := os.MkdirTemp("", "s") // socket names are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := home.Dir(filepath.Join(dir, "h"))
	if err := h.Ensure(); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	standIn := filepath.Join(dir, "qemu-"+kind)
	if err := os.WriteFile(standIn, b, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(qemu.BinaryEnv, standIn)
	t.Setenv(kernel.EnvVar, fakeKernel(t, dir))
	probeSays(t, h, true)
	s := &supervisor{
		h: h, msb: exe, agent: []byte("no agent: the stand-in boots nothing"), began: time.Now(),
		stop: make(chan stopRequest, 1), state: StatusStarting,
		cfg: Config{ID: ulid.Make().String(), Name: "s", CPUs: 1, MemoryMiB: 128, Accel: "auto", BootTimeout: 2 * time.Second},
	}
	if err := os.MkdirAll(s.logPath(""), 0o700); err != nil {
		t.Fatal(err)
	}
	if s.lock, err = Lock(h, s.cfg.Name); err != nil {
		t.Fatal(err)
	}
	if s.log, err = openOutputLog(s.logPath("")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.tearDown()
		s.log.close()
		s.lock.Close()
	})
	return s
}

// fakeKernel writes a file that passes for a bzImage.
func fakeKernel(t *testing.T, dir string) string {
	t.Helper()
	b := make([]byte, 0x400)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	copy(b[0x300:], "6.1.0-test (nobody)")
	path := filepath.Join(dir, "bzImage")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// probeSays stores the answer of the KVM probe for this boot of the host, as the
// probe does.
func probeSays(t *testing.T, h home.Dir, usable bool) {
	t.Helper()
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"boot_id": strings.TrimSpace(string(id)), "value": qemu.Probe{Usable: usable, Reason: "stand-in"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.Kernels(), ".kvm-probe.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if p := qemu.ProbeKVM(context.Background(), h.Kernels()); p.Usable != usable {
		t.Fatalf("probe says %+v", p)
	}
}

func systemLog(t *testing.T, s *supervisor, file string) string {
	t.Helper()
	b, err := os.ReadFile(s.logPath(file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestFallBackToTCG: a KVM that passed the probe and then aborts, hangs or gives
// up on the guest costs one more start, and is not tried again.
func TestFallBackToTCG(t *testing.T) {
	for _, kind := range []string{"aborts", "hangs", "reports"} {
		t.Run(kind, func(t *testing.T) {
			s := newSupervisor(t, kind)
			var steps []string
			if err := s.startAny(context.Background(), func(step string) { steps = append(steps, step) }); err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(steps, " "); strings.Count(got, "boot") != 2 || !strings.Contains(got, "retry with TCG") {
				t.Errorf("steps: %s", got)
			}
			if s.machine.Accel() != vmm.AccelTCG {
				t.Errorf("accelerator %s", s.machine.Accel())
			}
			said := systemLog(t, s, SupervisorLog)
			if strings.Count(said, "-accel kvm") != 1 || strings.Count(said, "-accel tcg") != 1 {
				t.Errorf("QEMU was started with %s", said)
			}
			if p := qemu.ProbeKVM(context.Background(), s.h.Kernels()); p.Usable || !strings.Contains(p.Reason, "did not boot") {
				t.Errorf("KVM is remembered as %+v", p)
			}
			if out := systemLog(t, s, OutputLog); !strings.Contains(out, "KVM could not boot the guest, trying TCG") {
				t.Errorf("the log says %q", out)
			}
			serves(t, s)
			stops(t, s)
		})
	}
}

// serves wants the relay to greet a client.
func serves(t *testing.T, s *supervisor) {
	t.Helper()
	c, err := agentclient.Dial(context.Background(), filepath.Join(s.runDir, AgentSocket))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// stops wants a stop request to end the sandbox cleanly.
func stops(t *testing.T, s *supervisor) {
	t.Helper()
	if r := s.requestStop(stopRequest{why: "test", grace: time.Minute}); !r.OK {
		t.Fatal(r)
	}
	if status, cause := s.wait(nil, nil); status != StatusStopped || cause != "" {
		t.Errorf("%s (%s)", status, cause)
	}
	if e := s.machine.Exit(); e.Reason != "guest-shutdown" {
		t.Errorf("%+v", e)
	}
}

// TestNoFallBack: KVM that was asked for by name is not replaced, and a guest
// that does not boot under TCG either says nothing about KVM.
func TestNoFallBack(t *testing.T) {
	t.Run("asked for", func(t *testing.T) {
		s := newSupervisor(t, "aborts")
		s.cfg.Accel = "kvm"
		err := s.startAny(context.Background(), func(string) {})
		if err == nil || !strings.Contains(err.Error(), "kvm run failed") {
			t.Errorf("error %v", err)
		}
		stillUsable(t, s)
	})
	t.Run("fails anyway", func(t *testing.T) {
		s := newSupervisor(t, "always-aborts")
		if err := s.startAny(context.Background(), func(string) {}); err == nil {
			t.Error("started")
		}
		if said := systemLog(t, s, SupervisorLog); strings.Count(said, "-accel kvm") != 1 || strings.Count(said, "-accel tcg") != 1 {
			t.Errorf("QEMU was started with %s", said)
		}
		stillUsable(t, s)
	})
}

func stillUsable(t *testing.T, s *supervisor) {
	t.Helper()
	if p := qemu.ProbeKVM(context.Background(), s.h.Kernels()); !p.Usable {
		t.Errorf("KVM is remembered as %+v", p)
	}
}
