package records

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestCommitSyncs: a commit waits for the disk three times, by fdatasync, in the
// order that makes a rollback journal safe. A journal that the commit makes is
// synced with its directory, and so is one that is made when a home is opened.
func TestCommitSyncs(t *testing.T) {
	strace := prereq.Program(t, "strace", "strace")
	for name, c := range map[string]struct {
		lost bool // the journal
		late bool // when the home is open
		want []string
	}{
		"journal there":     {false, false, []string{"fdatasync msb.db-journal", "fdatasync msb.db", "fdatasync msb.db-journal"}},
		"journal lost":      {true, false, []string{"fsync msb.db-journal", "fsync home", "fdatasync msb.db-journal", "fdatasync msb.db", "fdatasync msb.db-journal"}},
		"journal lost late": {false, true, []string{"fsync msb.db-journal", "fsync home", "fsync msb.db-journal", "fdatasync msb.db", "fsync msb.db-journal"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := home.Dir(filepath.Join(t.TempDir(), "home"))
			if err := mustOpen(t, h).Close(); err != nil {
				t.Fatal(err)
			}
			if c.lost {
				if err := os.Remove(h.DB() + "-journal"); err != nil {
					t.Fatal(err)
				}
			}
			log := filepath.Join(t.TempDir(), "log")
			cmd := childCommand(h, "")
			if c.late {
				cmd.Env = append(cmd.Env, loseVar+"=1")
			}
			cmd.Path, cmd.Args = strace, append([]string{strace, "-f", "-y", "-qq", "-o", log, "-e", "trace=fsync,fdatasync,sync_file_range,syncfs,msync"}, testProgram(t))
			if out, err := cmd.CombinedOutput(); err != nil {
				prereq.Missing(t, "tracing system calls: %v: %s", err, out)
			}
			text, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range regexp.MustCompile(`(?m)^\d+ +(\w+)\(\d+<([^>]*)>`).FindAllStringSubmatch(string(text), -1) {
				got = append(got, m[1]+" "+filepath.Base(m[2]))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("syncs %q, want %q\n%s", got, c.want, text)
			}
		})
	}
}

func testProgram(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCommitWaitsUntilReady: while a change waits for its condition all of it is
// on the disk, and whoever finds the files so (the process is killed, the power
// goes) finds it undone.
func TestCommitWaitsUntilReady(t *testing.T) {
	h, killed := home.Dir(t.TempDir()), home.Dir(t.TempDir())
	d := mustOpen(t, h)
	if err := d.InsertVolume(t.Context(), testVolume("before")); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, killed).Close(); err != nil {
		t.Fatal(err)
	}
	asked := 0
	ready := func() error {
		asked++
		for _, suffix := range []string{"", "-journal"} { // by another process's eyes: closing a descriptor here would drop SQLite's locks
			if out, err := exec.Command("cp", h.DB()+suffix, killed.DB()+suffix).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
		return nil
	}
	if err := d.InsertVolumeWhen(t.Context(), Condition{Synced: ready}, testVolume("a")); err != nil {
		t.Fatal(err)
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
	if _, err := d.VolumeByName(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	db, err := os.ReadFile(killed.DB())
	if err != nil || !regexp.MustCompile(`id-a`).Match(db) {
		t.Errorf("the change was not on its way to the disk: %v", err)
	}
	k := mustOpen(t, killed)
	if _, err := k.VolumeByName(t.Context(), "a"); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("after a kill: %v, want VolumeNotFound", err)
	}
	if _, err := k.VolumeByName(t.Context(), "before"); err != nil {
		t.Errorf("after a kill: %v", err)
	}
}

// TestNotReady: a change whose condition fails is undone and gets that error;
// others that were to be committed with it are.
func TestNotReady(t *testing.T) {
	d := mustOpen(t, home.Dir(t.TempDir()))
	refusal := errors.New("not yet")
	if err := d.InsertVolumeWhen(t.Context(), Condition{Synced: func() error { return refusal }}, testVolume("alone")); !errors.Is(err, refusal) {
		t.Errorf("alone: %v", err)
	}
	const callers = 7
	var errs [callers]error
	var asked [callers]int
	<-d.turn // so that all of them queue up
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			errs[i] = d.InsertVolumeWhen(context.Background(), Condition{Synced: func() error {
				asked[i]++
				if i%3 == 1 {
					return fmt.Errorf("%d: %w", i, refusal)
				}
				return nil
			}}, testVolume(fmt.Sprint("v", i)))
		})
	}
	waitForQueue(t, d, callers)
	d.give()
	wg.Wait()
	for i, err := range errs {
		_, found := d.VolumeByName(t.Context(), fmt.Sprint("v", i))
		if refused := i%3 == 1; errors.Is(err, refusal) != refused || (err == nil) == refused || (found == nil) == refused || asked[i] != 1 {
			t.Errorf("caller %d: %v, asked %d times, then %v", i, err, asked[i], found)
		}
	}
	if _, err := d.VolumeByName(t.Context(), "alone"); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Error(err)
	}
}

// TestRefusedAmongOthers: nobody waits for the condition of a change that was
// refused, though others are committed with it; one that needs the reserve to be
// filled first is asked once, like any.
func TestRefusedAmongOthers(t *testing.T) {
	d := mustOpen(t, home.Dir(t.TempDir()))
	asked := map[string]int{}
	insert := func(name string) error {
		return d.InsertVolumeWhen(context.Background(), Condition{Synced: func() error { asked[name]++; return nil }}, testVolume(name))
	}
	const rounds, callers = 100, 4 // enough to use up the reserve
	for round := range rounds {
		var errs [callers]error
		<-d.turn
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() { errs[i] = insert(fmt.Sprint("v", round, "-", i/2)) })
		}
		waitForQueue(t, d, callers)
		d.give()
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
				t.Fatal(err)
			}
		}
		if won != callers/2 {
			t.Fatalf("round %d: %d winners", round, won)
		}
	}
	for name, n := range asked {
		if n != 1 {
			t.Errorf("%s was asked for %d times", name, n)
		}
	}
	if len(asked) != rounds*callers/2 {
		t.Errorf("%d names were asked for, want %d", len(asked), rounds*callers/2)
	}
}

// TestJournalKeepsItsOwner: what root does in somebody's home leaves a journal
// that its owner can write, also one that root makes.
func TestJournalKeepsItsOwner(t *testing.T) {
	prereq.Root(t, "give a home to somebody")
	const owner = 4242
	for _, lost := range []bool{false, true} {
		h := home.Dir(t.TempDir())
		if err := mustOpen(t, h).Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(h.DB(), owner, owner); err != nil {
			t.Fatal(err)
		}
		if lost {
			if err := os.Remove(h.DB() + "-journal"); err != nil {
				t.Fatal(err)
			}
		}
		if err := mustOpen(t, h).InsertVolume(t.Context(), testVolume("a")); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Stat(h.DB()+"-journal", &st); err != nil || st.Uid != owner || st.Gid != owner {
			t.Errorf("lost %t: the journal is %d:%d's, %v", lost, st.Uid, st.Gid, err)
		}
	}
}
