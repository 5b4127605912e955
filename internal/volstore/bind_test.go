package volstore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// TestBindLedger: a host directory has a ledger of what is added, which outlives
// mounts, finds out after a kill, and is not another directory's.
func TestBindLedger(t *testing.T) {
	s, h := newStore(t)
	parent := t.TempDir()
	path := filepath.Join(parent, "shared")
	write := func(name string, n int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(path, name), make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	write("before", 50_000)
	open := func(path string) (*ledger.Writer, *os.File) {
		t.Helper()
		dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		f, err := s.OpenBindLedger(t.Context(), dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		w, err := ledger.NewWriter(f, ledger.Options{Server: true})
		if err != nil {
			t.Fatal(err)
		}
		return w, f
	}
	add := func(w *ledger.Writer, d ledger.Delta) error {
		op := w.Lock()
		return errors.Join(op.Grow(d), op.Done(d))
	}
	used := func(w *ledger.Writer) ledger.State {
		t.Helper()
		u, err := w.Usage()
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	w, _ := open(path)
	if u := used(w); u.Used != (ledger.Delta{}) || u.Limits != (ledger.Limits{Bytes: 1 << 20, Inodes: 1024}) || u.Unsettled {
		t.Errorf("first: %+v", u)
	}
	d := ledger.Delta{Bytes: 8192, Inodes: 1}
	write("new", 5000)
	if err := errors.Join(add(w, d), w.Close()); err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(parent, "moved")
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	w, f := open(moved)
	if u := used(w); u.Used != d {
		t.Errorf("mounted again: %+v", u)
	}
	op := w.Lock()
	if err := errors.Join(op.Grow(ledger.Delta{Bytes: 1 << 19}), f.Close()); err != nil { // as a kill does
		t.Fatal(err)
	}
	w, _ = open(moved)
	if u := used(w); u.Used != d || u.Unsettled {
		t.Errorf("after a kill: %+v", u)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	w, _ = open(path)
	if u := used(w); u.Used != (ledger.Delta{}) {
		t.Errorf("another directory: %+v", u)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(h.Binds())
	if err != nil || len(left) != 4 {
		t.Errorf("%v, %v", left, err)
	}
}
