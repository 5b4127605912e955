package volumefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// childEnv makes this test binary run one function in a process of its own.
const childEnv = "VOLUMEFS_TEST_CHILD"

func TestMain(m *testing.M) {
	if child := os.Getenv(childEnv); child != "" {
		os.Exit(runChild(child))
	}
	os.Exit(m.Run())
}

func runChild(spec string) int {
	if err := failpoint.ArmFromEnv(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	name, arg, _ := strings.Cut(spec, ":")
	children := map[string]func(arg string) error{"write": crashChild, "tmpfs": fullTmpfs, "ext4": fullExt4}
	if err := children[name](arg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// changes are the ways in which a file gets its content. Each makes "new" of
// the file "d/f".
var changes = map[string]func(f *FS) error{
	"write": func(f *FS) error { return f.Write(ctx, "d/f", []byte("new"), WriteOptions{Durable: true}) },
	"stream": func(f *FS) error {
		w, err := f.OpenWrite(ctx, "d/f", WriteOptions{})
		if err != nil {
			return err
		}
		if _, err := w.Write([]byte("new")); err != nil {
			return err
		}
		return w.Close()
	},
	"copy": func(f *FS) error { return f.Copy(ctx, "source", "d/f", WriteOptions{}) },
	"move": func(f *FS) error {
		if err := f.Write(ctx, "new/parents/big", make([]byte, crashSize), WriteOptions{}); err != nil {
			return err
		}
		if err := f.Copy(ctx, "source", "new/parents/f", WriteOptions{}); err != nil {
			return err
		}
		if err := f.Rename(ctx, "new/parents/f", "d/f", WriteOptions{}); err != nil {
			return err
		}
		return f.RemoveAll(ctx, "new")
	},
}

// crashSize is more than a ceiling is above the use.
const crashSize = 2 << 20

// openPair opens base/vol with base/scratch and, if there is one, base/ledger.
func openPair(base string, o Options) (*FS, func(), error) {
	root, err := os.OpenFile(filepath.Join(base, "vol"), unix.O_PATH, 0)
	if err != nil {
		return nil, nil, err
	}
	if o.Scratch, err = os.Open(filepath.Join(base, "scratch")); err != nil {
		return nil, nil, err
	}
	if book, err := os.OpenFile(filepath.Join(base, "ledger"), os.O_RDWR, 0); err == nil {
		o.Ledger = func() (*ledger.Writer, error) { return ledger.NewWriter(book, ledger.Options{}) }
	}
	f, err := New(root, o)
	return f, func() { f.Close(); root.Close(); o.Scratch.Close() }, err
}

func crashChild(arg string) error {
	change, base, _ := strings.Cut(arg, ":")
	f, done, err := openPair(base, Options{NoUnnamedSync: change == "stream"})
	if err != nil {
		return err
	}
	defer done()
	return changes[change](f)
}

// child runs spec in a process of its own and returns how it ended.
func child(t *testing.T, spec string, attr *syscall.SysProcAttr, env ...string) (*os.ProcessState, string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, childEnv+"="+spec)...)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		prereq.Missing(t, "a process in namespaces of its own: %v", err)
	}
	return cmd.ProcessState, string(out)
}

// TestCrash: a writer is killed at every fail point. The file is old or new,
// never anything else; nothing half made has a name in the volume; what has one
// outside is gone after the next opening; the ledger says no less than there is,
// at most what the operation charged more, and after a walk just that; and the same change then
// succeeds and is counted right.
func TestCrash(t *testing.T) {
	reached := map[string]bool{}
	var points []string
	for _, p := range failpoint.Names() {
		if strings.HasPrefix(p, "volumefs.") || slices.Contains(writerPoints, p) {
			points = append(points, p)
		}
	}
	for _, point := range points {
		for change := range changes {
			for _, old := range []string{"", "old"} {
				t.Run(point+"/"+change+"/"+old, func(t *testing.T) {
					if crashOnce(t, point, change, old) {
						reached[point] = true
					}
				})
			}
		}
	}
	for _, p := range points {
		if !reached[p] {
			t.Errorf("%s is never reached", p)
		}
	}
}

func crashOnce(t *testing.T, point, change, old string) (killed bool) {
	base := t.TempDir()
	v := &volume{t: t, dir: filepath.Join(base, "vol")}
	v.mkdir(v.dir)
	v.mkdir(filepath.Join(base, "scratch"))
	v.put("source", "new")
	if old != "" {
		v.put("d/f", old)
	}
	book := newBook(t, base)
	state, out := child(t, "write:"+change+":"+base, nil, failpoint.EnvVar+"="+point+"=kill")
	killed = state.Sys().(syscall.WaitStatus).Signaled()
	if !killed && !state.Success() {
		t.Fatalf("the writer failed: %s", out)
	}
	b, err := os.ReadFile(v.path("d/f"))
	if got := string(b); got != "new" && (got != old || err != nil && old != "") {
		t.Errorf("the file is %q, %v", got, err)
	}
	v.checkLitter()
	book.checkAfterKill(t)
	book.settle(t)
	f, done, err := openPair(base, Options{ScratchAge: 1})
	noErr(t, err)
	defer done()
	if left := listTree(t, filepath.Join(base, "scratch")); len(left) != 0 {
		t.Errorf("left outside: %q", left)
	}
	noErr(t, changes[change](f))
	if got := v.content("d/f"); got != "new" {
		t.Errorf("after trying again the file is %q", got)
	}
	book.check(t)
	return killed
}
