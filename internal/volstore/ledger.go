package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

const (
	ledgerName = "ledger" // of a directory volume: what it holds, over all writers
	limitsName = "limits" // of a directory volume: a limit of inodes of its own
)

var pointLedger = failpoint.New("volstore.ledger.made") // a volume without one has got its ledger

// countAtOnce is how many files a caller counts itself; more are left to the
// background.
const countAtOnce = 4096

// countPatience is how long a caller waits for the volume to be quiet, and for the
// walk.
const countPatience = 50 * time.Millisecond

// makeLedger makes the ledger of a new, empty directory volume.
func (st *staging) makeLedger(sp *Spec) error {
	if st.record.Kind != KindDir {
		return nil
	}
	f, err := openFile(filepath.Join(st.path, ledgerName), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	return errors.Join(ledger.Format(f, limitsOf(sp.QuotaMiB, sp.Inodes), true), f.Close())
}

// limitsOf joins the limits of a volume; inodes 0 means the default.
func limitsOf(quotaMiB uint32, inodes int64) ledger.Limits {
	l := ledger.Limits{Bytes: int64(quotaMiB) * mib, Inodes: inodes}
	if inodes == 0 {
		l.Inodes = ledger.DefaultInodes(l.Bytes)
	}
	return l
}

func (s *Store) ledgerPath(id string) string { return filepath.Join(s.home.State(id), ledgerName) }

// OpenLedger opens the ledger of a directory volume for a writer: it is of this
// boot and has the limits that the record says. A volume from before there were
// ledgers gets one. What is to be counted is counted in the background; nothing
// here waits for it.
//
// The file is for one writer. A process that is started with it must be its only
// holder: the caller closes its own once the process has it.
//
// Errors: VolumeNotFound, InvalidConfig for a disk volume, Filesystem.
func (s *Store) OpenLedger(ctx context.Context, id string) (*os.File, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, err
	}
	f, err := s.openLedger(v)
	return f, s.wrap("open the ledger of", v.Name, err)
}

func (s *Store) openLedger(v *Volume) (*os.File, error) {
	if v.Kind != KindDir {
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q is a disk volume: its size is its limit", v.Name)
	}
	f, l, err := s.findLedger(v)
	if err != nil {
		return nil, err
	}
	if err := s.prepareLedger(v, l); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// findLedger opens the ledger, makes it if there is none, and makes it anew if it
// is damaged and nobody has it.
func (s *Store) findLedger(v *Volume) (*os.File, *ledger.Ledger, error) {
	f, l, err := s.ledgerFile(v, os.O_RDWR)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = s.newLedger(v, false)
		if errors.Is(err, fs.ErrNotExist) { // no state directory: a power cut
			if err = s.settleByID(context.Background(), &v.Volume); err == nil {
				err = s.newLedger(v, false)
			}
		}
	case errors.Is(err, ledger.ErrDamaged):
		err = s.replaceLedger(v)
	default:
		return f, l, err
	}
	if err == nil {
		f, l, err = s.ledgerFile(v, os.O_RDWR)
	}
	return f, l, err
}

// replaceLedger makes a damaged ledger anew, if nobody has it open to write: a
// power cut soon after a volume was made may leave one of zeros. Where there is
// something else in its place, nobody may have the volume attached.
func (s *Store) replaceLedger(v *Volume) error {
	f, free, err := lockLedger(s.ledgerPath(v.ID))
	if f == nil {
		f, err = s.lockUnattached(context.Background(), &v.Volume)
	} else if !free {
		err = held("a sandbox or program has it open")
	}
	if f != nil {
		defer unlock(f)
	}
	if err != nil {
		return s.damaged(v, fmt.Errorf("%w, and %w", ledger.ErrDamaged, err))
	}
	if again, _, err := s.ledgerFile(v, os.O_RDONLY); err == nil {
		return again.Close() // somebody was faster
	}
	return s.newLedger(v, true)
}

// lockLedger opens what should be a ledger, and keeps writers out as long as it is
// open, if there is none: each has a byte of it locked. f is nil if it is no file.
func lockLedger(path string) (f *os.File, free bool, err error) {
	if f, err = openFile(path, unix.O_RDWR); err != nil {
		return nil, false, err
	}
	all := unix.Flock_t{Type: unix.F_WRLCK}
	return f, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &all) == nil, nil
}

// ledgerFile opens a ledger of a volume. Errors: fs.ErrNotExist, that of damaged.
func (s *Store) ledgerFile(v *Volume, flags int) (*os.File, *ledger.Ledger, error) {
	f, err := openFile(s.ledgerPath(v.ID), flags)
	if err != nil {
		return nil, nil, s.damaged(v, err)
	}
	l, err := ledger.Open(f)
	if err != nil {
		_ = f.Close()
		return nil, nil, s.damaged(v, err)
	}
	return f, l, nil
}

// damaged tells of a ledger that makes no sense, or is no file, which volume's it
// is and what helps; other errors pass.
func (s *Store) damaged(v *Volume, err error) error {
	if !isDamage(err) {
		return err
	}
	d := errdefs.Wrap(errdefs.Filesystem, ledger.ErrDamaged, "volume %q", v.Name)
	if errors.Is(err, errdefs.ErrVolumeInUse) {
		d.Cause = err
		return d.WithHint("stop what uses it first; then msb volume usage %s --rescan counts it anew", v.Name)
	}
	return d.WithHint("msb volume usage %s --rescan counts it anew", v.Name)
}

// isDamage tells a file that is no ledger, or no file at all, from one that cannot
// be read.
func isDamage(err error) bool {
	for _, e := range []error{ledger.ErrDamaged, home.ErrNotRegular, unix.ELOOP, unix.EISDIR, unix.ESPIPE, unix.ENXIO, unix.ENODEV} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// newLedger makes a ledger that does not know yet what is there, and gives it its
// name when it is complete.
func (s *Store) newLedger(v *Volume, replace bool) error {
	limits, err := s.limits(v)
	if err != nil {
		return err
	}
	dir := s.home.State(v.ID)
	sweepUnfinished(dir, ledgerName+".new-")
	f, err := os.CreateTemp(dir, ledgerName+".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := ledger.Format(f, limits, false); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if replace {
		if err = unix.Rmdir(s.ledgerPath(v.ID)); err == unix.ENOTEMPTY {
			return fmt.Errorf("%s is a directory that is not empty: move it away", s.ledgerPath(v.ID))
		}
		err = os.Rename(f.Name(), s.ledgerPath(v.ID))
	} else if err = renameNew(f.Name(), s.ledgerPath(v.ID)); errors.Is(err, fs.ErrExist) {
		return nil // somebody was faster
	}
	if err != nil {
		return err
	}
	return errors.Join(syncDir(dir), pointLedger.Hit())
}

// sweepUnfinished removes files that killed processes were writing: each is given
// its name, or removed, within moments.
func sweepUnfinished(dir, prefix string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && strings.HasPrefix(e.Name(), prefix) && time.Since(fi.ModTime()) > time.Hour {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// prepareLedger makes a ledger ready for a writer.
func (s *Store) prepareLedger(v *Volume, l *ledger.Ledger) error {
	if err := l.Recover(); err != nil {
		return err
	}
	limits, err := s.limits(v)
	if err != nil {
		return err
	}
	state, err := l.State()
	if err != nil {
		return err
	}
	if state.Limits != limits {
		if err := l.SetLimits(limits); err != nil {
			return err
		}
	}
	if state.Unsettled {
		s.countSoon(v, l)
	}
	return nil
}

// countSoon counts a small volume that is quiet at once, and any other in the
// background. It fails silently: the next opening tries again.
func (s *Store) countSoon(v *Volume, l *ledger.Ledger) {
	ctx, cancel := context.WithTimeout(context.Background(), countPatience)
	defer cancel()
	_, err := s.count(ctx, v, l, countAtOnce)
	if !errors.Is(err, ledger.ErrBudget) && !errors.Is(err, context.DeadlineExceeded) {
		return
	}
	if s.countElsewhere != nil && s.countElsewhere(s.home, v.ID) == nil {
		return
	}
	s.background.Go(func() { _, _ = s.Recount(context.Background(), v.ID) })
}

// countUnsettled counts a volume if a writer of it was killed. Its ledger is left
// alone otherwise, and where there is none.
func (s *Store) countUnsettled(v *Volume) {
	if state, _, err := s.Used(v); err != nil || !state.Unsettled || state.Foreign {
		return
	}
	f, l, err := s.ledgerFile(v, os.O_RDWR)
	if err != nil {
		return
	}
	defer f.Close()
	s.countSoon(v, l)
}

// count settles a ledger by a walk of at most budget files; 0 means all.
func (s *Store) count(ctx context.Context, v *Volume, l *ledger.Ledger, budget int) (Counted, error) {
	dir, err := s.openOwn(v)
	if err != nil {
		return Counted{}, err
	}
	defer dir.Close()
	var found ledger.Found
	w, err := l.Settle(ctx, func(ctx context.Context) (ledger.Delta, error) {
		found, err = walk(ctx, v, dir, budget)
		return found.Charges, err
	})
	c := Counted{State: w.Before, Found: w.Found, Allocated: found.Allocated, Exact: w.Exact}
	if err == nil {
		c.State, err = l.State()
	}
	return c, err
}

// walk is ledger.Walk with errors that say which volume it was.
func walk(ctx context.Context, v *Volume, dir *os.File, budget int) (ledger.Found, error) {
	found, err := ledger.Walk(ctx, dir, budget)
	if err == nil || ctx.Err() != nil || errors.Is(err, ledger.ErrBudget) {
		return found, err
	}
	e := errdefs.Wrap(errdefs.Filesystem, err, "count what is in volume %q", v.Name)
	if errors.Is(err, fs.ErrPermission) {
		_ = e.WithHint("whoever counts must be able to list all of its directories")
	}
	return found, e
}

// Counted is what a walk of a volume found.
type Counted struct {
	State     ledger.State // what the ledger says; after Recount, because of it
	Found     ledger.Delta // the sum of charges of all files
	Allocated int64        // bytes that they take on the host
	Exact     bool         // nothing changed meanwhile
	Damaged   bool         // there is a ledger, and it cannot be understood
}

// Recount walks a directory volume and makes its ledger say what is there.
// Errors: VolumeNotFound, InvalidConfig for a disk volume; Filesystem with the
// cause ledger.ErrBusy while the volume is being changed; Cancelled.
func (s *Store) Recount(ctx context.Context, id string) (Counted, error) {
	v, f, l, err := s.ledgerOf(ctx, id)
	if err != nil {
		return Counted{}, err
	}
	defer f.Close()
	c, err := s.count(ctx, v, l, 0)
	if err == nil {
		dir, openErr := s.openOwn(v)
		if openErr == nil {
			_ = l.LowerCeiling(int(dir.Fd())) // a high ceiling does harm only after a power cut
			_ = dir.Close()
		}
	}
	return c, s.wrap("count", v.Name, err)
}

func (s *Store) ledgerOf(ctx context.Context, id string) (*Volume, *os.File, *ledger.Ledger, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, nil, nil, err
	}
	if v.Kind != KindDir {
		return nil, nil, nil, errdefs.New(errdefs.InvalidConfig, "volume %q is a disk volume: it has nothing to count", v.Name)
	}
	f, l, err := s.findLedger(v)
	if err == nil {
		err = l.Recover()
	}
	return v, f, l, s.wrap("count", v.Name, err)
}

// SetCounter sets what starts the counting of a large volume in a process of its
// own; nil, and a failing one, mean a goroutine of this one.
func (s *Store) SetCounter(fn func(h home.Dir, id string) error) { s.countElsewhere = fn }

// NewWriter returns a writer of a directory volume, for a program of the host.
// Closing it closes its file. Errors: those of OpenLedger.
func (s *Store) NewWriter(ctx context.Context, id string) (*ledger.Writer, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, err
	}
	f, err := s.openLedger(v)
	if err != nil {
		return nil, s.wrap("open the ledger of", v.Name, err)
	}
	w, err := ledger.NewWriter(f, ledger.Options{})
	if err == nil {
		return w, nil
	}
	_ = f.Close()
	var full *errdefs.Error
	if errors.Is(err, unix.EBUSY) && errors.As(err, &full) {
		_ = full.WithHint("end some of the sandboxes and programs that write to the volume: msb volume inspect %s", v.Name)
	}
	return nil, err
}
