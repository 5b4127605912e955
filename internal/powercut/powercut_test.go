package powercut

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"
)

// TestMain lets this binary be PID 1 of the guest, and the processes that judge.
func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestMain()
	}
	if path := os.Getenv(jobEnv); path != "" {
		if err := jobMain(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// cutsEnv is the number of random cuts that "make soak" wants.
const cutsEnv = "MSB_SOAK_CUTS"

// What one guest is good for.
const (
	stepsPerGuest = 50
	flushesWanted = 300
	cutsPerGuest  = 2500
)

// TestPowerCut: whenever the power goes away, what was acknowledged holds,
// files are old or new, and every name can be used at once. Of a guest's log
// every flush is judged, and moments between flushes with a random part of the
// writes since then dropped or torn: 200, or as many as MSB_SOAK_CUTS says,
// from several guests, every other one with data=writeback.
func TestPowerCut(t *testing.T) {
	cuts, soak := 200, false
	if s := os.Getenv(cutsEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("%s=%q", cutsEnv, s)
		}
		cuts, soak = n, true
	}
	for seed := uint64(1); cuts > 0; seed++ {
		c := guestConfig{seed: seed, steps: stepsPerGuest}
		if seed%2 == 0 {
			c.mount = "data=writeback"
		}
		n := min(cuts, cutsPerGuest)
		cuts -= n
		t.Run(fmt.Sprintf("guest %d", seed), func(t *testing.T) { judgeGuest(t, c, n, soak) })
	}
}

// judgeGuest records one guest and judges all its flushes and n random cuts.
func judgeGuest(t *testing.T, c guestConfig, n int, all bool) {
	began := time.Now()
	r := record(t, c)
	recorded := time.Since(began)
	flushes := FlushCuts(r.log)
	if len(flushes) < flushesWanted {
		t.Errorf("the log has %d flushes after writes, want %d", len(flushes), flushesWanted)
	}
	j := job{Seed: c.seed, Steps: c.steps, Fsck: tool(t, "e2fsck"), All: all}
	for what, cuts := range map[string][]Cut{"flush": flushes, "random": RandomCuts(r.log, n, c.seed)} {
		j.Cuts = cuts
		bad, judged := judgeCuts(t, r, j)
		if judged != len(cuts) {
			t.Errorf("%d of %d %s cuts judged", judged, len(cuts), what)
		}
		for _, o := range bad[:min(len(bad), 10)] {
			t.Errorf("%s cut %+v, %d steps acknowledged: %q", what, o.Cut, o.Acked, o.Faults)
		}
		t.Logf("%d %s cuts, %d with faults", judged, what, len(bad))
	}
	t.Logf("%d entries in the log; recorded in %s, judged in %s", len(r.log), recorded, time.Since(began)-recorded)
}

// plants are builds with one sync left out. Each is found on ext4. Syncs of the
// store's directories are not among them: the commit of the records that follows
// commits ext4's whole journal. They are for file systems that sync one file at
// a time.
var plants = map[string]plant{
	"data of a file":     {"internal/volumefs/write.go", "unix.Fdatasync(r.tmp.fd())", "error(nil)"},
	"name of a file":     {"internal/volumefs/dirs.go", "return unix.Fsync(fd)", "return nil"},
	"note of a creation": {"internal/volstore/files.go", "err = f.Sync()", "err = nil"},
	"records":            {"internal/records/open.go", "synchronous(FULL)", "synchronous(OFF)"},
}

// TestPowerCutFindsAMissingSync: the test above fails for builds that lack one
// sync.
func TestPowerCutFindsAMissingSync(t *testing.T) {
	for name, bug := range plants {
		t.Run(name, func(t *testing.T) {
			c := guestConfig{seed: 1, steps: 8, bug: &bug}
			r := record(t, c)
			j := job{Seed: c.seed, Steps: c.steps, Stop: 1, Cuts: FlushCuts(r.log)}
			bad, judged := judgeCuts(t, r, j)
			if len(bad) == 0 {
				t.Fatalf("%d cuts judged, nothing found", judged)
			}
			t.Logf("found at the first of %d cuts judged: %q", judged, bad[0].Faults)
		})
	}
}
