package volstore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// boundDir is a host directory that is mounted with a quota.
type boundDir struct {
	t    *testing.T
	s    *Store
	path string
}

func newBoundDir(t *testing.T, s *Store) *boundDir {
	t.Helper()
	d := &boundDir{t, s, filepath.Join(t.TempDir(), "shared")}
	if err := os.Mkdir(d.path, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// newUsedDir is newBoundDir with two blocks of before the first mount, and two of a
// guest that has gone.
func newUsedDir(t *testing.T, s *Store) *boundDir {
	t.Helper()
	d := newBoundDir(t, s)
	if err := d.write(nil, "before", 5000); err != nil {
		t.Fatal(err)
	}
	w := d.mount(1)
	if err := errors.Join(d.write(w, "new", 5000), w.Close()); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *boundDir) open(mib uint32) (*os.File, error) {
	d.t.Helper()
	dir, err := os.OpenFile(d.path, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer dir.Close()
	return d.s.OpenBindLedger(d.t.Context(), dir, mib)
}

// mount returns a file server's writer.
func (d *boundDir) mount(mib uint32) *ledger.Writer {
	d.t.Helper()
	f, err := d.open(mib)
	if err != nil {
		d.t.Fatal(err)
	}
	w, err := ledger.NewWriter(f, ledger.Options{Server: true})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = w.Close() })
	return w
}

// write makes a file, charged to w if there is one.
func (d *boundDir) write(w *ledger.Writer, name string, n int) error {
	d.t.Helper()
	if w == nil {
		return os.WriteFile(filepath.Join(d.path, name), make([]byte, n), 0o600)
	}
	charge := ledger.Delta{Bytes: ledger.Rules{}.File(int64(n)), Inodes: 1}
	op := w.Lock()
	if err := op.Grow(charge); err != nil {
		return errors.Join(err, op.Done(ledger.Delta{}))
	}
	return errors.Join(os.WriteFile(filepath.Join(d.path, name), make([]byte, n), 0o600), op.Done(charge))
}

func (d *boundDir) wantUsed(w *ledger.Writer, bytes, inodes int64) {
	d.t.Helper()
	if u, err := w.Usage(); err != nil || u.Used != (ledger.Delta{Bytes: bytes, Inodes: inodes}) {
		d.t.Errorf("used %+v, %v, want %d bytes, %d files", u, err, bytes, inodes)
	}
}

// files are those in binds, which must be one pair.
func (d *boundDir) files() (note, book string) {
	d.t.Helper()
	all, err := filepath.Glob(filepath.Join(d.s.home.Binds(), "*"))
	if err != nil || len(all) != 2 {
		d.t.Fatalf("%q, %v", all, err)
	}
	return all[0], all[1] // .json before .ledger
}

// TestBindLedgerIsShared: whoever mounts a directory is limited together with all
// others who do, by the quota of the latest; a directory in it has its own.
func TestBindLedgerIsShared(t *testing.T) {
	s, _ := newStore(t)
	d := newBoundDir(t, s)
	a, b := d.mount(1), d.mount(1)
	if err := errors.Join(d.write(a, "a", 600<<10), d.write(b, "b", 300<<10)); err != nil {
		t.Fatal(err)
	}
	for _, w := range []*ledger.Writer{a, b} {
		if err := d.write(w, "more", 200<<10); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("beyond the limit of both: %v", err)
		}
	}
	c := d.mount(2)
	if err := d.write(a, "more", 200<<10); err != nil {
		t.Errorf("within the newest limit: %v", err)
	}
	d.wantUsed(c, 1100<<10, 3)
	inside := &boundDir{t, s, filepath.Join(d.path, "inside")}
	if err := os.Mkdir(inside.path, 0o755); err != nil {
		t.Fatal(err)
	}
	w := inside.mount(1)
	if err := inside.write(w, "f", 1000<<10); err != nil {
		t.Errorf("in a directory with a limit of its own: %v", err)
	}
	inside.wantUsed(w, 1000<<10, 1)
	d.wantUsed(c, 1100<<10, 3)
}

// TestDamagedBindLedger: a ledger that makes no sense is made anew, and finds out
// what was added, when nobody mounts the directory.
func TestDamagedBindLedger(t *testing.T) {
	for name, damage := range damages {
		if name == "directory" {
			continue // which is for a person to remove
		}
		t.Run(name, func(t *testing.T) {
			s, _ := newStore(t)
			d := newUsedDir(t, s)
			_, book := d.files()
			if err := errors.Join(os.Remove(book), damage(book)); err != nil {
				prereq.Root(t, "make a device node")
				t.Fatal(err)
			}
			d.wantUsed(d.mount(1), 8192, 1)
		})
	}
	t.Run("in use", func(t *testing.T) {
		s, _ := newStore(t)
		d := newBoundDir(t, s)
		w := d.mount(1)
		_, book := d.files()
		if err := os.WriteFile(book, make([]byte, 8192), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.open(1); !errors.Is(err, ledger.ErrDamaged) || !strings.Contains(err.Error(), d.path) {
			t.Errorf("mounted elsewhere: %v", err)
		}
		_ = w.Close()
		d.wantUsed(d.mount(1), 0, 0)
	})
}

// TestBindLedgerOfANewDirectory: a directory that gets the inode number of one that
// is gone does not get its use.
func TestBindLedgerOfANewDirectory(t *testing.T) {
	s, _ := newStore(t)
	d := newBoundDir(t, s)
	w := d.mount(1)
	if err := errors.Join(d.write(w, "new", 5000), w.Close()); err != nil {
		t.Fatal(err)
	}
	note, _ := d.files()
	n, err := readBindNote(note)
	if err != nil || n.Identity.BirthNS == 0 {
		prereq.Missing(t, "a file system that knows birth times (%v)", err)
	}
	n.Identity.BirthNS--
	old := &bind{s: s, note: n}
	old.paths.note = note
	if err := old.save(); err != nil {
		t.Fatal(err)
	}
	d.wantUsed(d.mount(1), 0, 0)
}

// TestBindLedgerAfterABoot: the device of a directory may have another number after
// a boot; what was added is still known. A directory that is as like it as one in a
// copy of its file system has a ledger of its own.
func TestBindLedgerAfterABoot(t *testing.T) {
	rename := func(note, book, old string) error {
		return errors.Join(os.Rename(note, old+".json"), os.Rename(book, old+".ledger"))
	}
	tests := map[string]struct {
		change func(note, book, old string) error
		booted bool
		want   ledger.Delta
	}{
		"as it was":      {func(note, book, old string) error { return nil }, true, ledger.Delta{Bytes: 8192, Inodes: 1}},
		"another number": {rename, true, ledger.Delta{Bytes: 8192, Inodes: 1}},
		"half renamed":   {func(note, book, old string) error { return os.Rename(note, old+".json") }, true, ledger.Delta{Bytes: 8192, Inodes: 1}},
		"a copy":         {rename, false, ledger.Delta{}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s, h := newStore(t)
			d := newUsedDir(t, s)
			note, book := d.files()
			if n, err := readBindNote(note); err != nil || n.Identity.BirthNS == 0 {
				prereq.Missing(t, "a file system that knows birth times (%v)", err)
			}
			if tt.booted {
				age(t, book)
			}
			_, ino, _ := strings.Cut(strings.TrimSuffix(filepath.Base(note), ".json"), "-")
			old := filepath.Join(h.Binds(), "abc-"+ino)
			if err := tt.change(note, book, old); err != nil {
				t.Fatal(err)
			}
			d.wantUsed(d.mount(1), tt.want.Bytes, tt.want.Inodes)
			if !exists(note) || !exists(book) || exists(old+".json") == tt.booted {
				t.Errorf("the old note is there: %v", exists(old+".json"))
			}
		})
	}
}

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
		return serve(t, f, err)
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
