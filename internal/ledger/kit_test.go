package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// volume is a directory with a ledger beside it.
type volume struct {
	t     testing.TB
	base  string
	l     *Ledger
	rules Rules
}

func newVolume(t testing.TB, limits Limits) *volume {
	t.Helper()
	v := &volume{t: t, base: t.TempDir()}
	v.make(limits)
	return v
}

func (v *volume) make(limits Limits) {
	v.t.Helper()
	v.ok(os.Mkdir(v.dir(), 0o755))
	f, err := os.OpenFile(v.file(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	v.ok(err)
	v.t.Cleanup(func() { f.Close() })
	v.ok(Format(f, limits, true))
	v.l, err = Open(f)
	v.ok(err)
	v.rules, err = RulesOf(int(f.Fd()))
	v.ok(err)
}

func (v *volume) dir() string  { return filepath.Join(v.base, "vol") }
func (v *volume) file() string { return filepath.Join(v.base, "ledger") }

func (v *volume) ok(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

// writer joins with a file of its own. It is closed at the end.
func (v *volume) writer(o Options) *Writer {
	v.t.Helper()
	w, err := openWriter(v.base, o)
	v.ok(err)
	v.t.Cleanup(func() { w.Close() })
	return w
}

func openWriter(base string, o Options) (*Writer, error) {
	f, err := os.OpenFile(filepath.Join(base, "ledger"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	w, err := NewWriter(f, o)
	if err != nil {
		f.Close()
	}
	return w, err
}

func (v *volume) walk() Delta {
	v.t.Helper()
	d, err := walkDir(v.dir())
	v.ok(err)
	return d
}

func walkDir(path string) (Delta, error) {
	dir, err := os.Open(path)
	if err != nil {
		return Delta{}, err
	}
	defer dir.Close()
	found, err := Walk(context.Background(), dir, 0)
	return found.Charges, err
}

func (v *volume) state() State {
	v.t.Helper()
	s, err := v.l.State()
	v.ok(err)
	return s
}

// settle walks, after which the ledger must be right.
func (v *volume) settle() {
	v.t.Helper()
	w, err := v.l.Settle(context.Background(), func(context.Context) (Delta, error) { return walkDir(v.dir()) })
	if err != nil || !w.Exact {
		v.t.Fatalf("settle: %+v, %v", w, err)
	}
	v.exact()
}

// exact demands that the ledger says what is there.
func (v *volume) exact() {
	v.t.Helper()
	s := v.state()
	if want := v.walk().Plus(s.Orphans); s.Used != want || s.Unsettled {
		v.t.Errorf("the ledger says %+v, the walk %+v", s, want)
	}
}

// notBelow demands that the ledger says no less than there is, and at most over
// more.
func (v *volume) notBelow(over Delta) {
	v.t.Helper()
	s, found := v.state(), v.walk()
	if d := s.Used.Minus(found); d.Bytes < 0 || d.Inodes < 0 || d.Bytes > over.Bytes || d.Inodes > over.Inodes {
		v.t.Errorf("the ledger says %+v, the walk %+v", s, found)
	}
}

// visitor is what [Options].Orphans is given.
type visitor = func(ino uint64, measure func() (Delta, bool))

// nameless measures an inode that has no name.
func nameless(d Delta) func() (Delta, bool) { return func() (Delta, bool) { return d, true } }

// actor is a writer that changes files as a file server does: in place.
type actor struct {
	w     *Writer
	dir   string
	rules Rules
}

func (v *volume) actor(o Options) *actor { return &actor{v.writer(o), v.dir(), v.rules} }

func (a *actor) path(name string) string { return filepath.Join(a.dir, name) }

func inodeAt(path string) uint64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

func sizeAt(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Size
}

// create makes an empty file.
func (a *actor) create(name string) error {
	root := inodeAt(a.dir)
	op := a.w.Lock(root)
	before := a.rules.Root(sizeAt(a.dir))
	if err := op.Grow(Delta{4 * Block, 1}); err != nil {
		return errors.Join(err, op.Done(Delta{}))
	}
	f, err := os.OpenFile(a.path(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return errors.Join(err, op.Done(Delta{}))
	}
	f.Close()
	return op.Done(Delta{a.rules.Root(sizeAt(a.dir)) - before, 1})
}

// resize makes a file of so many bytes, longer or shorter.
func (a *actor) resize(name string, size int64) error {
	path := a.path(name)
	op := a.w.Lock(inodeAt(path))
	before := a.rules.File(sizeAt(path))
	looked := before
	if op.Late() {
		looked = 0
	}
	if err := op.Grow(Delta{Bytes: a.rules.File(size) - looked}); err != nil {
		return errors.Join(err, op.Done(Delta{}))
	}
	err := os.Truncate(path, size)
	return errors.Join(err, op.Done(Delta{Bytes: a.rules.File(sizeAt(path)) - before}))
}

// remove takes a file's only name; open says that this server has it open.
func (a *actor) remove(name string, open bool) error {
	path := a.path(name)
	ino := inodeAt(path)
	op := a.w.Lock(inodeAt(a.dir), ino)
	charge := Delta{a.rules.File(sizeAt(path)), 1}
	if err := os.Remove(path); err != nil {
		return errors.Join(err, op.Done(Delta{}))
	}
	op.Orphan(ino, charge, open)
	return op.Done(Delta{})
}

// within fails the test if fn takes longer than anybody should wait.
func (v *volume) within(what string, fn func()) {
	v.t.Helper()
	start := time.Now()
	fn()
	if d := time.Since(start); d > 5*time.Second {
		v.t.Errorf("%s took %v", what, d)
	}
}
