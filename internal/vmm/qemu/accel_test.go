package qemu

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

func standInProbe(kind string) int {
	switch kind {
	case "probe-hangs":
		hang()
	case "probe-crashes":
		fmt.Fprintln(os.Stderr, "boom")
		return 3
	case "probe-says-yes":
		fmt.Println(`{"usable":true,"reason":"stand-in"}`)
		return 0
	}
	return ProbeMain(nil)
}

// withKVM skips where there is no /dev/kvm to ask about.
func withKVM(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("missing: a /dev/kvm that can be opened: %v", err)
	}
	f.Close()
}

func TestProbeAnswersAndIsRemembered(t *testing.T) {
	withKVM(t)
	dir := t.TempDir()
	p := ProbeKVM(context.Background(), dir)
	if p.Reason == "" {
		t.Fatalf("ProbeKVM = %+v: no reason", p)
	}
	t.Logf("KVM here: %+v", p)
	t.Setenv(standInEnv, "probe-crashes")
	if again := ProbeKVM(context.Background(), dir); again != p {
		t.Errorf("second probe = %+v, want the remembered %+v", again, p)
	}
}

func TestChooseFallsBackWhenTheProbeFails(t *testing.T) {
	withKVM(t)
	for _, kind := range []string{"probe-hangs", "probe-crashes"} {
		t.Run(kind, func(t *testing.T) {
			t.Setenv(standInEnv, kind)
			began := time.Now()
			got, err := Choose(context.Background(), vmm.AccelAuto, t.TempDir())
			if err != nil || got != vmm.AccelTCG {
				t.Fatalf("Choose(auto) = %q, %v; want tcg", got, err)
			}
			if took := time.Since(began); took > probeDeadline+5*time.Second {
				t.Errorf("took %s", took)
			}
			_, err = Choose(context.Background(), vmm.AccelKVM, t.TempDir())
			if !errdefs.Is(err, errdefs.InvalidConfig) || !strings.Contains(err.Error(), "KVM cannot run a guest") {
				t.Errorf("Choose(kvm) = %v", err)
			}
		})
	}
}

func TestChooseRemembersABrokenKVM(t *testing.T) {
	withKVM(t)
	t.Setenv(standInEnv, "probe-says-yes")
	dir := t.TempDir()
	if got, err := Choose(context.Background(), vmm.AccelAuto, dir); err != nil || got != vmm.AccelKVM {
		t.Fatalf("Choose = %q, %v; want kvm", got, err)
	}
	RememberBroken(dir, "internal-error")
	if got, err := Choose(context.Background(), vmm.AccelAuto, dir); err != nil || got != vmm.AccelTCG {
		t.Fatalf("Choose after a failed guest = %q, %v; want tcg", got, err)
	}
}

func TestTSCFrequencyIsPlausibleAndRemembered(t *testing.T) {
	if !hasTSC {
		t.Skip("missing: a time stamp counter on this architecture")
	}
	dir := t.TempDir()
	khz, err := TSCKHz(dir)
	if err != nil || khz < 100_000 || khz > 10_000_000 {
		t.Fatalf("TSCKHz = %d, %v", khz, err)
	}
	if again, err := TSCKHz(dir); err != nil || again != khz {
		t.Errorf("second TSCKHz = %d, %v, want the remembered %d", again, err, khz)
	}
}
