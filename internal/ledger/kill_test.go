package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// childEnv makes this test binary run one script in a process of its own.
const childEnv = "LEDGER_TEST_CHILD"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		name, base, _ := strings.Cut(spec, ":")
		err := failpoint.ArmFromEnv()
		if err == nil {
			err = scripts[name](base)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// killSize is what a script lets the file grow to: more than a chunk and than a
// ceiling's step.
const killSize = 3 << 20

// scripts are what the killed process does. Together they reach every fail point.
// The file "open" is open in the test's own server.
var scripts = map[string]func(base string) error{
	"host":   func(base string) error { return childScript(base, Options{}) },
	"server": func(base string) error { return childScript(base, Options{Server: true, Orphans: holding(base)}) },
	"answer": answerScript,
	"settle": func(base string) error {
		f, err := os.OpenFile(filepath.Join(base, "ledger"), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		l, err := Open(f)
		if err != nil {
			return err
		}
		if err := l.SetLimits(Limits{Bytes: 1 << 30, Inodes: 5000}); err != nil {
			return err
		}
		_, err = l.Settle(context.Background(), func(context.Context) (Delta, error) { return walkDir(filepath.Join(base, "vol")) })
		if errors.Is(err, ErrBusy) {
			return nil
		}
		return err
	},
}

func childScript(base string, o Options) error {
	w, err := openWriter(base, o)
	if err != nil {
		return err
	}
	rules, err := RulesOf(int(w.l.f.Fd()))
	if err != nil {
		return err
	}
	a := &actor{w, filepath.Join(base, "vol"), rules}
	steps := []func() error{
		func() error { return a.create("new") },
		func() error { return a.resize("new", killSize) },
		func() error { return a.resize("shared", 8192) },
		func() error { return a.remove("open", false) },
		func() error { return a.remove("new", false) },
		func() error { return a.resize("shared", 4096) },
		w.Poll, // frees what the test's server has answered about
		func() error { return answeredByAll(w) },
		w.Poll,
		w.Close,
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// answeredByAll waits until the other servers have answered, at most a second:
// one may be gone.
func answeredByAll(w *Writer) error {
	for range 200 {
		s, err := w.Usage()
		if err != nil || s.Pending == (Delta{}) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

// holding says that the file "open", which there is now, is open here; so it is
// an orphan once it has lost its name.
func holding(base string) func(visitor) {
	path := filepath.Join(base, "vol", "open")
	ino := inodeAt(path)
	return func(visit visitor) {
		if inodeAt(path) != ino {
			visit(ino, nameless(Delta{Block, 1}))
		}
	}
}

// answerScript is a server that has "open" open while the test removes it.
func answerScript(base string) error {
	w, err := openWriter(base, Options{Server: true, Orphans: holding(base)})
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); len(w.orphans) == 0; time.Sleep(time.Millisecond) {
		if err := w.Poll(); err != nil || time.Now().After(deadline) {
			return errors.Join(err, errors.New("nobody asked"))
		}
	}
	w.Released(slices.Collect(maps.Keys(w.orphans))[0])
	return errors.Join(w.Poll(), answeredByAll(w), w.Close())
}

// victim is a volume with files, a living server that answers, and a child.
type victim struct {
	*volume
	live *actor
	cmd  *exec.Cmd
	asks bool // the test removes "open" once the child lives
}

func newVictim(t *testing.T, script, action string) *victim {
	v := &victim{volume: newVolume(t, Limits{Bytes: 1 << 30, Inodes: 100_000}), asks: script == "answer"}
	var open func(visitor)
	v.live = v.actor(Options{Server: true, Orphans: func(visit visitor) {
		if !v.asks {
			open(visit)
		}
	}})
	for _, name := range []string{"shared", "open", "mine", "other"} {
		v.ok(v.live.create(name))
		v.ok(v.live.resize(name, 4096))
	}
	open = holding(v.base)
	v.idle()
	v.exact()
	v.cmd = exec.Command("/proc/self/exe")
	v.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", childEnv+"="+script+":"+v.base, failpoint.EnvVar+"="+action)
	v.cmd.Stderr = os.Stderr
	return v
}

// idle polls until the living server has given its reserve back.
func (v *victim) idle() {
	v.t.Helper()
	for range 3 {
		v.ok(v.live.w.Poll())
	}
}

// pollUntil polls the living server until the child has ended or is stopped.
func (v *victim) pollUntil(stopped bool) (status syscall.WaitStatus) {
	v.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		flags := unix.WNOHANG
		if stopped {
			flags |= unix.WUNTRACED
		}
		pid, err := syscall.Wait4(v.cmd.Process.Pid, &status, flags, nil)
		v.ok(err)
		if pid != 0 {
			return status
		}
		if v.asks && v.state().Writers == 2 && inodeAt(v.live.path("open")) != 0 {
			v.ok(v.live.remove("open", false))
		}
		v.ok(v.live.w.Poll())
		time.Sleep(time.Millisecond)
	}
	v.t.Fatal("the child neither ends nor stops")
	return status
}

// goOn does with the living server what the child did with the same inodes: it
// must neither hang nor be refused.
func (v *victim) goOn() {
	v.t.Helper()
	v.within("going on", func() {
		v.ok(v.live.resize("mine", 2*Chunk))
		v.ok(v.live.resize("shared", 3*Block))
		v.ok(v.live.remove("mine", false))
		v.ok(v.live.create("mine"))
		v.ok(v.live.resize("other", 100))
	})
}

// most is what may be too much: what the child and the living server have in
// reserve, what the child charged for its operation, and what was deleted while
// it did not answer.
var most = Delta{2*Chunk + killSize + 16*Block, 2*chunkInodes + 8}

// unbounded is what may be too much while a server is stopped: it cannot say that
// it does not have open what others delete.
var unbounded = Delta{1 << 40, 1 << 40}

func points() (names []string) {
	for _, p := range failpoint.Names() {
		if strings.HasPrefix(p, "ledger.") {
			names = append(names, p)
		}
	}
	return names
}

// reachedBy is what TestKilledAtEveryPoint has found: pairs of a script and a
// point that it reaches. Empty where that test was not run.
var reachedBy = map[string]bool{}

// TestKilledAtEveryPoint kills a host program, a server and a walk between every
// two steps. Others go on at once, the ledger is never below what is there, over
// by at most a chunk and the killed operation, says so, and is exact after a walk.
func TestKilledAtEveryPoint(t *testing.T) {
	reached := map[string]bool{}
	for script := range scripts {
		for _, point := range points() {
			t.Run(script+"/"+point, func(t *testing.T) {
				v := newVictim(t, script, point+"=kill")
				v.ok(v.cmd.Start())
				status := v.pollUntil(false)
				if !status.Signaled() && status.ExitStatus() != 0 {
					t.Fatalf("the child failed: %v", status)
				}
				if status.Signaled() {
					reached[point] = true
					reachedBy[script+"/"+point] = true
				}
				v.notBelow(most)
				v.goOn()
				v.notBelow(most)
				v.idle()
				if s := v.state(); s.Used != v.walk().Plus(s.Orphans) && !s.Unsettled {
					t.Errorf("not exact, and no walk is asked for: %+v, %+v", s, v.walk())
				}
				v.settle()
				v.goOn()
				v.idle()
				v.exact()
			})
		}
	}
	for _, p := range points() {
		if !reached[p] {
			t.Errorf("%s is never reached", p)
		}
	}
}

// TestStoppedAtEveryPoint stops it there instead: nobody waits for it, the ledger
// is never below what is there; when it goes on, a walk is right again.
func TestStoppedAtEveryPoint(t *testing.T) {
	for script := range scripts {
		for _, point := range points() {
			if len(reachedBy) > 0 && !reachedBy[script+"/"+point] {
				continue
			}
			t.Run(script+"/"+point, func(t *testing.T) {
				t.Parallel()
				v := newVictim(t, script, point+"=stop")
				v.ok(v.cmd.Start())
				status := v.pollUntil(true)
				if !status.Stopped() {
					return // not reached
				}
				v.notBelow(unbounded)
				v.goOn()
				v.notBelow(unbounded)
				for {
					v.ok(v.cmd.Process.Signal(syscall.SIGCONT))
					if status = v.pollUntil(true); !status.Stopped() {
						break
					}
					v.notBelow(unbounded)
				}
				if status.ExitStatus() != 0 {
					t.Errorf("the child failed: %v", status)
				}
				v.notBelow(unbounded)
				v.idle()
				v.settle()
				v.goOn()
				v.idle()
				v.exact()
			})
		}
	}
}
