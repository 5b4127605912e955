package volstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// TestMeasure: what a walk finds is what the charge rule says.
func TestMeasure(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	used := func() uint64 {
		t.Helper()
		found, err := s.Measure(t.Context(), v)
		if err != nil {
			t.Fatal(err)
		}
		return uint64(found.Charges.Bytes)
	}
	if n := used(); n != 0 {
		t.Errorf("empty: %d", n)
	}
	at := func(name string) string { return filepath.Join(v.Path, name) }
	steps := []struct {
		what string
		do   func() error
		more uint64
	}{
		{"empty file", func() error { return os.WriteFile(at("e"), nil, 0o600) }, 0},
		{"one byte", func() error { return os.WriteFile(at("one"), []byte("1"), 0o600) }, 4096},
		{"4097 bytes", func() error { return os.WriteFile(at("two"), make([]byte, 4097), 0o600) }, 8192},
		{"hard link", func() error { return os.Link(at("two"), at("three")) }, 0},
		{"hole", func() error { return errors.Join(os.WriteFile(at("h"), nil, 0o600), os.Truncate(at("h"), 1<<20)) }, 1 << 20},
		{"short symlink", func() error { return os.Symlink("/etc/passwd", at("l")) }, 0},
		{"long symlink", func() error { return os.Symlink(strings.Repeat("x", 60), at("m")) }, 4096},
		{"symlink to a directory outside", func() error { return os.Symlink("/usr", at("out")) }, 0},
		{"directory", func() error { return os.Mkdir(at("d"), 0o700) }, dirSize(t)},
	}
	total := uint64(0)
	for _, st := range steps {
		if err := st.do(); err != nil {
			t.Fatal(err)
		}
		total += st.more
		if n := used(); n != total {
			t.Errorf("%s: %d, want %d", st.what, n, total)
			total = n
		}
	}
}

// dirSize is what an empty directory is charged on the file system of the test.
func dirSize(t *testing.T) uint64 {
	fi, err := os.Stat(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return uint64(ledger.Rules{DirSizes: true}.Dir(fi.Size()))
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(dir, "tree")
	deep := tree
	for range 3*maxDepth + 10 {
		deep = filepath.Join(deep, "deeper")
	}
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(outside, filepath.Join(deep, "l")), os.Symlink(dir, filepath.Join(tree, "up")), os.Chmod(deep, 0)); err != nil {
		t.Fatal(err)
	}
	calls := 0
	for ; ; calls++ {
		err := removeSome(tree, 500)
		if err == nil {
			break
		}
		if !errors.Is(err, errBudget) {
			t.Fatal(err)
		}
	}
	if calls < 4 {
		t.Errorf("removed 2200 entries in %d calls of 500", calls+1)
	}
	if _, err := os.Lstat(tree); !errors.Is(err, fs.ErrNotExist) {
		t.Error("tree is left")
	}
	if !exists(outside) {
		t.Error("a symlink was followed")
	}
	if err := removeTree(tree); err != nil {
		t.Errorf("removing nothing: %v", err)
	}
}

func TestLargeTreeIsReapedInTheBackground(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	for i := range 3 * reapAtOnce {
		if err := os.WriteFile(filepath.Join(v.Path, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	called := 0
	s.SetReaper(func(home.Dir) (func(), error) { called++; return func() {}, nil })
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if left, _ := listNames(h.Trash()); called != 1 || len(left) != 1 {
		t.Errorf("reaper called %d times, trash %v", called, left)
	}
	mustCreate(t, s, Spec{Name: "a"}) // the name is free at once
	if err := New(h).ReapTrash(t.Context()); err != nil {
		t.Error(err)
	}
	if left, _ := listNames(h.Trash()); len(left) != 0 {
		t.Errorf("trash %v", left)
	}
}

// TestDiskIsReapedInTheBackground: the reaper is started before the removal of a
// disk is committed, for the first one in a process, and begins when the volume
// is in the trash, or after a removal that failed. Where it cannot be started the
// disk is deleted at once.
func TestDiskIsReapedInTheBackground(t *testing.T) {
	needMkfs(t)
	s, h := newStore(t)
	for _, name := range []string{"a", "b", "c"} {
		mustCreate(t, s, Spec{Name: name, Kind: KindDisk, SizeMiB: 4})
	}
	mustCreate(t, s, Spec{Name: "dir"})
	var trash []string // when the reaper begins
	started, begun := 0, 0
	s.SetReaper(func(home.Dir) (func(), error) {
		started++
		return func() { begun++; trash, _ = listNames(h.Trash()) }, nil
	})
	if err := s.Remove(t.Context(), "dir"); err != nil || started != 0 {
		t.Fatalf("an empty directory: started %d, %v", started, err)
	}
	disarm := failpoint.Arm("volstore.remove.marked", func() error { return errors.New("refused") })
	err := s.Remove(t.Context(), "a")
	disarm()
	if err == nil || started != 1 || begun != 1 || len(trash) != 0 {
		t.Fatalf("a removal that fails: %v, started %d, begun %d, trash %v", err, started, begun, trash)
	}
	s.reaped.Store(false)
	if err := s.Remove(t.Context(), "a"); err != nil || started != 2 || begun != 2 || len(trash) != 1 {
		t.Fatalf("the first disk: %v, started %d, begun %d, trash %v", err, started, begun, trash)
	}
	if err := New(h).ReapTrash(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "b"); err != nil || started != 2 {
		t.Errorf("the second disk: %v, started %d", err, started)
	}
	if left, _ := listNames(h.Trash()); len(left) != 0 {
		t.Errorf("the second disk: trash %v", left)
	}
	s.reaped.Store(false)
	s.SetReaper(func(home.Dir) (func(), error) { return nil, unix.EAGAIN })
	if err := s.Remove(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	if left, _ := listNames(h.Trash()); len(left) != 0 {
		t.Errorf("no reaper: trash %v", left)
	}
}

// TestTombstonesThatCannotBeForgotten: where the removals cannot be made durable, a
// creation leaves their tombstones.
func TestTombstonesThatCannotBeForgotten(t *testing.T) {
	h := home.Dir(t.TempDir())
	s := New(h)
	t.Cleanup(func() { s.Close() })
	for range forgetAt {
		mustCreate(t, s, Spec{Name: "a"})
		if err := s.Remove(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(h.Trash()); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, Spec{Name: "b"})
	if found, err := s.Check(t.Context()); err != nil || len(found) != 0 {
		t.Errorf("Check = %+v, %v", found, err)
	}
}

// TestStagingWithAStranger: a directory that lies where a creation has had its data,
// and is another one, is deleted by nobody.
func TestStagingWithAStranger(t *testing.T) {
	h := home.Dir(t.TempDir())
	s := New(h)
	t.Cleanup(func() { s.Close() })
	elsewhere := home.Dir(t.TempDir())
	other := New(elsewhere)
	t.Cleanup(func() { other.Close() })
	v := mustCreate(t, other, Spec{Name: "other"}) // its note is of another directory
	staging := filepath.Join(h.Staging(), v.ID)
	note, err := os.ReadFile(filepath.Join(elsewhere.State(v.ID), noteName))
	if err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, Spec{Name: "warm"})
	if err := errors.Join(os.MkdirAll(filepath.Join(staging, dataName), 0o700), os.WriteFile(filepath.Join(staging, noteName), note, 0o600)); err != nil {
		t.Fatal(err)
	}
	writeMarker(t, filepath.Join(staging, dataName))
	mustCreate(t, s, Spec{Name: "next"})
	if _, err := os.Stat(filepath.Join(staging, dataName, marker)); err != nil {
		t.Error(err)
	}
}
