package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Used reads the ledger of a directory volume: nothing below the volume is looked
// at, nothing is written. ok is false where there is no ledger that knows: the
// volume is from before there were ledgers, and nobody has written to it since.
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
	return state, err == nil && !state.Uncounted, s.wrap("measure", v.Name, err)
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
	if state, ok, err := s.Used(v); ok && err == nil {
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
	if err := unix.Fstatat(int(dir.Fd()), "disk.raw", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, s.wrap("measure", v.Name, err)
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
	found, err := ledger.Walk(ctx, dir, 0)
	if err != nil && ctx.Err() == nil {
		err = errdefs.Wrap(errdefs.Filesystem, err, "measure volume %q", v.Name)
	}
	return found, s.wrap("measure", v.Name, err)
}

// Verify walks a directory volume and compares it with its ledger, which stays as
// it is. Errors as Recount.
func (s *Store) Verify(ctx context.Context, v *Volume) (Counted, error) {
	f, err := os.OpenFile(s.ledgerPath(v.ID), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		found, err := s.Measure(ctx, v)
		return Counted{Before: ledger.State{Unsettled: true, Uncounted: true}, Found: found.Charges, Allocated: found.Allocated}, err
	}
	if err != nil {
		return Counted{}, s.wrap("verify", v.Name, err)
	}
	defer f.Close()
	l, err := ledger.Open(f)
	if err != nil {
		return Counted{}, s.wrap("verify", v.Name, err)
	}
	var found ledger.Found
	w, err := l.Compare(ctx, func(ctx context.Context) (ledger.Delta, error) {
		found, err = s.Measure(ctx, v)
		return found.Charges, err
	})
	return Counted{Before: w.Before, Found: w.Found, Allocated: found.Allocated, Exact: w.Exact}, s.wrap("verify", v.Name, err)
}
