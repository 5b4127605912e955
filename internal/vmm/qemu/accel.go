package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// probeDeadline bounds the probe's process: a broken KVM may hang in the kernel.
const probeDeadline = 2 * time.Second

// ProbeProcess is the hidden argument that makes msb the probe.
const ProbeProcess = "kvm-probe"

// probeEnv marks the probe's process: a program that is not msb, and starts
// itself as its own probe, must not do so without end.
const probeEnv = "MSB_KVM_PROBE"

// Probe says whether KVM runs guests on this host.
type Probe struct {
	Usable bool   `json:"usable"`
	Reason string `json:"reason"` // why not, or what was seen
	// Took is how long the probe's program ran in the guest, in nanoseconds.
	Took time.Duration `json:"took_ns"`
}

// Choose resolves auto: KVM where the probe says it runs 64-bit guests, else
// TCG. Asking for kvm where it does not is an error.
func Choose(ctx context.Context, want vmm.Accel, dir string) (vmm.Accel, error) {
	switch want {
	case vmm.AccelTCG:
		return vmm.AccelTCG, nil
	case vmm.AccelKVM, vmm.AccelAuto, "":
	default:
		return "", errdefs.New(errdefs.InvalidConfig, "accelerator %q is not auto, kvm or tcg", want)
	}
	p := ProbeKVM(ctx, dir)
	if p.Usable {
		return vmm.AccelKVM, nil
	}
	if want == vmm.AccelKVM {
		return "", errdefs.New(errdefs.InvalidConfig, "KVM cannot run a guest here: %s", p.Reason).
			WithHint("use the accelerator auto or tcg; msb doctor tells more")
	}
	return vmm.AccelTCG, nil
}

// ProbeKVM runs a small 64-bit program in a KVM guest, in a child process with
// a deadline. The answer is kept in dir for this boot of the host.
func ProbeKVM(ctx context.Context, dir string) Probe {
	cache := bootCache{dir: dir, name: "kvm-probe"}
	var p Probe
	if cache.load(&p) {
		return p
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return Probe{Reason: err.Error()} // cheap to ask again, and permissions change
	} else {
		f.Close()
	}
	p = probeInChild(ctx)
	if ctx.Err() == nil {
		cache.store(p)
	}
	return p
}

// RememberBroken stores that KVM failed with a real guest although the probe
// passed, so that auto chooses TCG until the host boots again.
func RememberBroken(dir, reason string) {
	bootCache{dir: dir, name: "kvm-probe"}.store(Probe{Reason: reason})
}

// probeProgram is the program that is started with ProbeProcess; tests replace it.
var probeProgram = os.Executable

func probeInChild(ctx context.Context) Probe {
	self, err := probeProgram()
	if err != nil {
		return Probe{Reason: err.Error()}
	}
	if os.Getenv(probeEnv) != "" {
		return Probe{Reason: self + " does not know how to probe KVM"}
	}
	ctx, cancel := context.WithTimeout(ctx, probeDeadline)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, self, ProbeProcess)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append(os.Environ(), probeEnv+"=1")
	cmd.WaitDelay = 100 * time.Millisecond
	err = cmd.Run()
	var p Probe
	if jerr := json.Unmarshal(out.Bytes(), &p); jerr == nil && err == nil {
		return p
	}
	if ctx.Err() != nil {
		return Probe{Reason: "the probe did not end within " + probeDeadline.String()}
	}
	return Probe{Reason: "the probe failed: " + strings.TrimSpace(errOut.String()+" "+errText(err))}
}

func errText(err error) string {
	if err == nil {
		return "no answer"
	}
	return err.Error()
}
