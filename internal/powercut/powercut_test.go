package powercut

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/powercut/writelog"
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

// run is one guest and how much of its log is judged.
type run struct {
	guestConfig
	flushes int  // after a write, at least, all of which are judged
	random  int  // cuts between them
	all     bool // see judge
}

// runs returns what is judged: 300 flushes and 200 random cuts on ext4, and
// something on btrfs, or as many random cuts as the soak wants.
func runs(t *testing.T) []run {
	s := os.Getenv(cutsEnv)
	if s == "" {
		return []run{
			{guestConfig{fs: "ext4", seed: 1, steps: 75}, 300, 200, false},
			{guestConfig{fs: "btrfs", seed: 2, steps: 25}, 150, 50, false},
			{guestConfig{fs: "ext4", seed: 3, steps: 15, bug: &unkept}, 60, 30, false},
		}
	}
	cuts, err := strconv.Atoi(s)
	if err != nil || cuts < 1 {
		t.Fatalf("%s=%q", cutsEnv, s)
	}
	const guests = 6
	kinds := []string{"ext4", "btrfs", "ext4-writeback"}
	var out []run
	for i := range guests {
		out = append(out, run{guestConfig{fs: kinds[i%len(kinds)], seed: uint64(i + 1), steps: 50}, 200, (cuts + guests - 1) / guests, true})
	}
	return out
}

// unkept is no bug: a build that keeps no note in the journal, as where there is no
// room for it, and has to sync it as a file.
var unkept = plant{"internal/records/journal.go", "kept := j.keep()", "kept := false"}

// TestPowerCut: whenever the power goes away, what was acknowledged holds,
// files are old or new, and every name can be used at once. Of a guest's log
// every flush is judged, and moments between flushes with a random part of the
// writes since the last one dropped or torn.
func TestPowerCut(t *testing.T) {
	for _, r := range runs(t) {
		t.Run(fmt.Sprintf("%s seed %d", r.fs, r.seed), func(t *testing.T) { r.judge(t) })
	}
}

// judge records the guest and judges its cuts.
func (r run) judge(t *testing.T) {
	began := time.Now()
	rec := record(t, r.guestConfig)
	recorded := time.Since(began)
	flushes := writelog.FlushCuts(rec.log)
	if len(flushes) < r.flushes {
		t.Errorf("the log has %d flushes after writes, want %d", len(flushes), r.flushes)
	}
	findings, random := 0, writelog.RandomCuts(rec.log, r.random, r.seed)
	for what, cuts := range map[string][]writelog.Cut{"flush": flushes, "random": random} {
		bad, judged := judgeCuts(t, rec, job{FS: r.fs, Seed: r.seed, Steps: r.steps, Fsck: tool(t, "e2fsck"), All: r.all, Cuts: cuts})
		if judged != len(cuts) {
			t.Errorf("%d of %d %s cuts judged", judged, len(cuts), what)
		}
		for _, o := range bad[:min(len(bad), 10)] {
			t.Errorf("%s cut %+v, %d steps acknowledged: %q", what, o.Cut, o.Acked, o.Faults)
		}
		findings += len(bad)
	}
	t.Logf("%d entries in the log; recorded in %s, judged in %s", len(rec.log), recorded, time.Since(began)-recorded)
	t.Logf("soak: part=cuts fs=%s seed=%d steps=%d flushes=%d subsets=%d findings=%d seconds=%.0f",
		r.fs, r.seed, r.steps, len(flushes), len(random), findings, time.Since(began).Seconds())
}

// plants are builds with one sync left out. On ext4 nobody misses the syncs of
// the store's directories: the commit of the records that follows them commits
// all of ext4's journal. On btrfs it commits the records.
var plants = map[string]struct {
	fs    string
	steps int
	plant
}{
	"data of a file":    {"ext4", 8, plant{"internal/volumefs/temp.go", "return unix.SyncFileRange(t.fd(), 0, 0, writtenBack)", "return nil"}},
	"name of a file":    {"ext4", 8, plant{"internal/volumefs/dirs.go", "return unix.Fsync(fd)", "return nil"}},
	"note":              {"ext4", 40, plant{unkept.file, unkept.old, "kept := true"}},
	"name of a volume":  {"ext4", 40, plant{"internal/volstore/create.go", "named = begin(func() error { return syncDir(st.s.home.Volumes()) })", "named = begin()"}},
	"disk image":        {"ext4", 22, plant{"internal/volstore/create.go", "synced = begin(st.syncImage)", "synced = st.image.Close"}},
	"records":           {"ext4", 8, plant{"internal/records/open.go", "synchronous(FULL)", "synchronous(OFF)"}},
	"records' files":    {"ext4", 8, plant{"internal/records/vfs.go", "err := unix.Fdatasync(int(f.Fh))", "err := error(nil)"}},
	"store":             {"btrfs", 30, plant{"internal/volstore/files.go", "return errors.Join(f.Sync(), f.Close())", "return f.Close()"}},
	"file without name": {"btrfs", 30, plant{"internal/volumefs/temp.go", "t.fs.opts.NoUnnamedSync || unix.Fstatfs(t.fd(), &st) != nil", "unix.Fstatfs(t.fd(), &st) == nil {\n\t\treturn true\n\t}\n\tif true"}},
}

// TestPowerCutFindsAMissingSync: the test above fails for builds that lack one
// sync, or sync a file too early.
func TestPowerCutFindsAMissingSync(t *testing.T) {
	for name, bug := range plants {
		t.Run(name, func(t *testing.T) {
			c := guestConfig{fs: bug.fs, seed: 1, steps: bug.steps, bug: &bug.plant}
			r := record(t, c)
			bad, judged := judgeCuts(t, r, job{FS: c.fs, Seed: c.seed, Steps: c.steps, Fsck: tool(t, "e2fsck"), Stop: 1, Cuts: writelog.FlushCuts(r.log)})
			if len(bad) == 0 {
				t.Fatalf("%d cuts judged, nothing found", judged)
			}
			t.Logf("found at the first of %d cuts judged: %q", judged, bad[0].Faults)
		})
	}
}
