package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Used reads the ledger of a directory volume: nothing below the volume is looked
// at, nothing is written. ok is false where there is no ledger that knows: the
// volume was adopted, or is from before there were ledgers, and nobody has written
// to it since. Errors: Filesystem with the cause ledger.ErrDamaged.
func (s *Store) Used(v *Volume) (state ledger.State, ok bool, err error) {
	// Not by package os, which costs twice as much: a list asks for thousands.
	fd, err := unix.Open(s.ledgerPath(v.ID), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return state, false, nil
	}
	if err == nil {
		state, err = ledger.ReadState(fd)
		_ = unix.Close(fd)
	}
	return state, err == nil && !state.Uncounted, s.wrap("measure", v.Name, s.damaged(v, err))
}

// UsedNow is Used, but counts a small volume that nobody has written to since the
// machine has booted: only an upper bound is known of it. A larger one is left to
// its next writer.
func (s *Store) UsedNow(ctx context.Context, v *Volume) (state ledger.State, ok bool, err error) {
	state, ok, err = s.Used(v)
	if err != nil || !state.Foreign {
		return state, ok, err
	}
	ctx, cancel := context.WithTimeout(ctx, countPatience)
	defer cancel()
	if c, err := s.settleUse(ctx, v, countAtOnce); err == nil {
		return c.State, true, nil
	}
	return state, ok, nil
}

// settleUse makes a ledger say what a walk of at most budget files finds.
func (s *Store) settleUse(ctx context.Context, v *Volume, budget int) (Counted, error) {
	f, l, err := s.ledgerFile(v, os.O_RDWR)
	if err != nil {
		return Counted{}, err
	}
	defer f.Close()
	if err := l.Recover(); err != nil {
		return Counted{}, err
	}
	return s.count(ctx, v, l, budget)
}

// UsedBytes returns what a volume holds. For a directory volume it is the sum of
// charges (see package ledger) as its ledger says; without one it is found by a
// walk, in which ctx is looked at. For a disk volume it is the space that the
// image takes on the host.
//
// Errors: VolumeNotFound, Filesystem, Cancelled.
func (s *Store) UsedBytes(ctx context.Context, v *Volume) (uint64, error) {
	if v.Kind == KindDisk {
		return s.imageBytes(v)
	}
	if state, ok, err := s.UsedNow(ctx, v); ok && err == nil {
		return uint64(state.Used.Bytes), nil
	}
	found, err := s.Measure(ctx, v)
	return uint64(found.Charges.Bytes), err
}

func (s *Store) imageBytes(v *Volume) (uint64, error) {
	dir, err := s.openOwn(v)
	if err != nil {
		return 0, s.wrap("measure", v.Name, err)
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), home.DiskFile, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, s.wrap("measure", v.Name, &os.PathError{Op: "stat", Path: filepath.Join(v.Path, home.DiskFile), Err: err})
	}
	return uint64(st.Blocks) * 512, nil
}

// Measure walks a directory volume and changes nothing. Errors: VolumeNotFound,
// Filesystem, Cancelled.
func (s *Store) Measure(ctx context.Context, v *Volume) (ledger.Found, error) {
	dir, err := s.openOwn(v)
	if err != nil {
		return ledger.Found{}, s.wrap("measure", v.Name, err)
	}
	defer dir.Close()
	found, err := walk(ctx, v, dir, 0)
	return found, s.wrap("measure", v.Name, err)
}

// Survey walks a directory volume. Where its ledger knows no more than a bound,
// because a writer was killed or the machine has booted, and nobody writes, it
// says from then on what was found; else it stays as it is. Errors as Verify.
func (s *Store) Survey(ctx context.Context, v *Volume) (Counted, error) {
	if state, _, err := s.Used(v); err == nil && state.Unsettled && state.Writers == 0 {
		c, err := s.settleUse(ctx, v, 0)
		if err == nil || ctx.Err() != nil {
			return c, s.wrap("count", v.Name, err)
		}
	}
	return s.Verify(ctx, v)
}

// Verify walks a directory volume and compares it with its ledger, which stays as
// it is. State is Uncounted, and has the limits only, where there is no ledger or
// a damaged one. Errors: VolumeNotFound, Filesystem, Cancelled.
func (s *Store) Verify(ctx context.Context, v *Volume) (Counted, error) {
	f, l, err := s.ledgerFile(v, os.O_RDONLY)
	if damaged := errors.Is(err, ledger.ErrDamaged); damaged || errors.Is(err, fs.ErrNotExist) {
		return s.measureUncounted(ctx, v, damaged)
	}
	if err != nil {
		return Counted{}, s.wrap("verify", v.Name, err)
	}
	defer f.Close()
	var found ledger.Found
	w, err := l.Compare(ctx, func(ctx context.Context) (ledger.Delta, error) {
		found, err = s.Measure(ctx, v)
		return found.Charges, err
	})
	return Counted{State: w.Before, Found: w.Found, Allocated: found.Allocated, Exact: w.Exact}, s.wrap("verify", v.Name, err)
}

// measureUncounted measures a volume that has no ledger.
func (s *Store) measureUncounted(ctx context.Context, v *Volume, damaged bool) (Counted, error) {
	limits, err := s.limits(v)
	if err != nil {
		return Counted{}, s.wrap("verify", v.Name, err)
	}
	found, err := s.Measure(ctx, v)
	state := ledger.State{Limits: limits, Unsettled: true, Uncounted: true}
	return Counted{State: state, Found: found.Charges, Allocated: found.Allocated, Damaged: damaged}, err
}
