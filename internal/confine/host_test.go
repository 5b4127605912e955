package confine

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFinding: what a host lacks is said with what it costs and what mends it.
func TestFinding(t *testing.T) {
	const all = mountAndPID | otherSpaces
	full := Host{Privileged: true, Clone: all, Mounts: true, LandlockABI: 7, Seccomp: true}
	with := func(change func(*Host)) Host {
		h := full
		change(&h)
		return h
	}
	tests := map[string]struct {
		host    Host
		measure Measure
		want    Status
	}{
		"all there":               {full, PrivateRoot, Applied},
		"no namespaces":           {with(func(h *Host) { h.Clone, h.refused = 0, unix.EPERM }), PrivateRoot, Missing},
		"no namespaces: pid":      {with(func(h *Host) { h.Clone, h.refused = 0, unix.EPERM }), PIDNamespace, Missing},
		"no network namespace":    {with(func(h *Host) { h.Clone &^= unix.CLONE_NEWNET }), Namespaces, Weaker},
		"ordinary user":           {with(func(h *Host) { h.Privileged = false }), OwnUser, Weaker},
		"no Landlock":             {with(func(h *Host) { h.LandlockABI = 0 }), Landlock, Missing},
		"Landlock without rename": {with(func(h *Host) { h.LandlockABI = 1 }), Landlock, Missing},
		"no filters":              {with(func(h *Host) { h.Seccomp = false }), Seccomp, Missing},
		"capabilities are always": {Host{}, Capabilities, Applied},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := tt.host.finding(tt.measure)
			if f.Status != tt.want || f.Measure != tt.measure {
				t.Errorf("finding = %+v, want status %s", f, tt.want)
			}
			if f.Status == Missing && (f.Detail == "" || f.Hint == "") {
				t.Errorf("finding says not enough: %+v", f)
			}
		})
	}
}

func TestReport(t *testing.T) {
	for _, f := range Report() {
		t.Log(f)
		if f.Status != Applied && f.Detail == "" {
			t.Errorf("%+v has no detail", f)
		}
	}
}

// TestProbeSaysWhy: a clone that is refused is told apart from one that works.
func TestProbeSaysWhy(t *testing.T) {
	if err := tryClone(unix.CLONE_NEWNS | unix.CLONE_FS); !errors.Is(err, unix.EINVAL) { // contradict each other
		t.Errorf("impossible flags: %v", err)
	}
	if err := tryClone(0); (err == nil) != hasCapability(unix.CAP_SYS_ADMIN) {
		t.Errorf("a mount namespace of our own user namespace: %v", err)
	}
}
