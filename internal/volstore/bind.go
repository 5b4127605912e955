package volstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// bindNote is the content of binds/DEV-INO.json: which directory the ledger
// binds/DEV-INO.ledger is of, and what it held apart from what guests added.
type bindNote struct {
	Version  int              `json:"version"` // 1
	Path     string           `json:"path"`    // when it was first mounted; for people
	Identity records.Identity `json:"identity"`
	Counted  bool             `json:"counted"` // the rest is known
	Bytes    int64            `json:"bytes"`   // charges of what was there
	Inodes   int64            `json:"inodes"`
}

// bind is a host directory that is mounted with a quota.
type bind struct {
	s     *Store
	dir   *os.File
	paths struct{ note, ledger string }
	note  bindNote
}

// OpenBindLedger opens the ledger of a host directory that is mounted with a
// quota: it counts what guests add beyond what is there when the directory is
// first mounted so, less what they delete, and goes on counting at each later
// mount, whatever its path by then. The file is for one writer, as of OpenLedger.
//
// What is there is counted in the background, for a directory of few files at
// once; it is needed only to find out after a killed writer what was added.
//
// It is one ledger with one limit for all who mount the directory: the quota of the
// latest mount. What is mounted of it by another path, a directory in it for
// instance, is not charged to it.
//
// Errors: Filesystem, IO, Cancelled.
func (s *Store) OpenBindLedger(ctx context.Context, dir *os.File, quotaMiB uint32) (*os.File, error) {
	f, err := s.openBindLedger(ctx, dir, limitsOf(quotaMiB, 0))
	return f, s.wrap("open the ledger of", dir.Name(), err)
}

func (s *Store) openBindLedger(ctx context.Context, dir *os.File, limits ledger.Limits) (*os.File, error) {
	if err := s.home.Ensure(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.home.Binds(), 0o700); err != nil {
		return nil, err
	}
	b, err := s.findBind(ctx, dir, limits)
	if err != nil {
		return nil, err
	}
	f, l, err := b.open()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(l.Recover(), l.SetLimits(limits)); err != nil {
		_ = f.Close()
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, countPatience)
	defer cancel()
	if err := b.count(ctx, l, countAtOnce); errors.Is(err, ledger.ErrBudget) || errors.Is(err, context.DeadlineExceeded) {
		b.countInBackground()
	}
	return f, nil
}

// findBind returns the ledger of a directory, and makes it if there is none, or
// one of a directory that had the same number before.
func (s *Store) findBind(ctx context.Context, dir *os.File, limits ledger.Limits) (*bind, error) {
	id, err := identityOf(dir)
	if err != nil {
		return nil, err
	}
	b := &bind{s: s, dir: dir}
	base := filepath.Join(s.home.Binds(), fmt.Sprintf("%x-%x", id.Dev, id.Ino))
	b.paths.note, b.paths.ledger = base+".json", base+".ledger"
	lock, err := openDir(s.home.Binds(), 0)
	if err != nil {
		return nil, err
	}
	defer unlock(lock)
	if err := waitFlock(ctx, lock); err != nil {
		return nil, err
	}
	if b.note, err = readBindNote(b.paths.note); err != nil || !b.note.Identity.Same(id) {
		if err := b.fetch(id); err != nil {
			return nil, err
		}
	}
	if b.note.Identity.Same(id) && exists(b.paths.ledger) {
		return b, b.mend(limits)
	}
	sweepUnfinished(s.home.Binds(), "new-")
	b.note = bindNote{Version: 1, Path: dir.Name(), Identity: id}
	return b, errors.Join(b.make(limits, true), b.save())
}

// fetch looks for the ledger of a directory whose device had another number
// before the machine has booted, and gives it its new name. One that was used since
// then is of another directory: that of a copy of the file system, for instance.
func (b *bind) fetch(id records.Identity) error {
	binds := b.s.home.Binds()
	entries, err := os.ReadDir(binds)
	if err != nil {
		return err
	}
	for _, e := range entries {
		base, ok := strings.CutSuffix(e.Name(), fmt.Sprintf("-%x.json", id.Ino))
		if !ok || id.BirthNS == 0 {
			continue
		}
		old := filepath.Join(binds, fmt.Sprintf("%s-%x", base, id.Ino))
		note, err := readBindNote(old + ".json")
		if err != nil || !note.Identity.Same(id) || !isForeign(old+".ledger") && !isForeign(b.paths.ledger) {
			continue
		}
		// The note goes last: what a power cut leaves is fetched again.
		if err := os.Rename(old+".ledger", b.paths.ledger); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		b.note = note
		b.note.Identity = id
		return errors.Join(b.save(), os.Remove(old+".json"))
	}
	return nil
}

// isForeign tells a ledger that was last used before the machine has booted.
func isForeign(path string) bool {
	f, err := openFile(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if err != nil {
		return false
	}
	defer f.Close()
	state, err := ledger.ReadState(int(f.Fd()))
	return err == nil && state.Foreign
}

// mend makes a damaged ledger anew, if nobody has it: what was added is found
// again by a walk, where it is known what was there before.
func (b *bind) mend(limits ledger.Limits) error {
	f, _, err := b.open()
	if err == nil {
		return f.Close()
	}
	if !isDamage(err) {
		return err
	}
	f, free, _ := lockLedger(b.paths.ledger)
	if f != nil {
		defer f.Close()
	}
	if f != nil && !free {
		return errdefs.Wrap(errdefs.Filesystem, ledger.ErrDamaged, "directory %q", b.dir.Name()).WithHint("stop the sandboxes that mount it")
	}
	return b.make(limits, !b.note.Counted)
}

// open opens the ledger for reading and writing.
func (b *bind) open() (*os.File, *ledger.Ledger, error) {
	f, err := os.OpenFile(b.paths.ledger, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	l, err := ledger.Open(f)
	if err != nil {
		_ = f.Close()
	}
	return f, l, err
}

func readBindNote(path string) (n bindNote, err error) {
	text, err := readSmall(path)
	if err != nil {
		return n, err
	}
	if err := json.Unmarshal(text, &n); err != nil || n.Version != 1 {
		return n, fmt.Errorf("%s: version %d: %w", path, n.Version, err)
	}
	return n, nil
}

// make makes a new ledger, in which nothing is used, or, with empty false, nobody
// knows yet what is.
func (b *bind) make(limits ledger.Limits, empty bool) error {
	f, err := os.CreateTemp(b.s.home.Binds(), "new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = ledger.Format(f, limits, empty)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), b.paths.ledger)
}

// save writes the note, durably.
func (b *bind) save() error {
	text, err := json.Marshal(b.note)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(b.s.home.Binds(), "new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(f.Name(), b.paths.note), syncDir(b.s.home.Binds()))
}

// count finds out what was there, once, and what was added, after a writer was
// killed.
func (b *bind) count(ctx context.Context, l *ledger.Ledger, budget int) error {
	walk := func(ctx context.Context) (ledger.Delta, error) {
		found, err := ledger.Walk(ctx, b.dir, budget)
		return found.Charges, err
	}
	if !b.note.Counted {
		w, err := l.Compare(ctx, walk)
		if err != nil || !w.Exact {
			return err
		}
		d := w.Found.Plus(w.Before.Orphans).Minus(w.Before.Used)
		b.note.Counted, b.note.Bytes, b.note.Inodes = true, d.Bytes, d.Inodes
		return b.save()
	}
	if state, err := l.State(); err != nil || !state.Unsettled {
		return err
	}
	_, err := l.Settle(ctx, func(ctx context.Context) (ledger.Delta, error) {
		found, err := walk(ctx)
		return found.Minus(ledger.Delta{Bytes: b.note.Bytes, Inodes: b.note.Inodes}), err
	})
	return err
}

// countInBackground counts with descriptors of its own. It fails silently: the
// next mount tries again.
func (b *bind) countInBackground() {
	fd, err := unix.FcntlInt(b.dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return
	}
	dir := os.NewFile(uintptr(fd), b.dir.Name())
	b.s.background.Go(func() {
		defer dir.Close()
		f, l, err := b.open()
		if err != nil {
			return
		}
		defer f.Close()
		own := *b
		own.dir = dir
		_ = own.count(context.Background(), l, 0)
	})
}
