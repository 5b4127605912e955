package volstore

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var pointReaped = failpoint.New("volstore.remove.reaped") // the tree is deleted

// reapAtOnce is the number of files that a removal deletes itself; more are
// left to the background.
const reapAtOnce = 512

// reapOne deletes one removed volume from the trash, in the background if it is
// large, or empty, which leaves some bookkeeping: nobody waits for its space. A
// process with a reaper ends soon, and does that at once. A removal is complete
// without it.
func (s *Store) reapOne(id string) {
	path := filepath.Join(s.home.Trash(), id)
	lock, err := lockDir(path)
	if err != nil || lock == nil {
		return // for the next command, or another is at it
	}
	if s.reapElsewhere == nil && unix.Rmdir(filepath.Join(path, dataName)) == nil {
		s.background.Go(func() { _ = reapLocked(lock, path, reapAtOnce) })
	} else if err := reapLocked(lock, path, reapAtOnce); errors.Is(err, errBudget) {
		s.reapInBackground()
	}
}

// readyReaper starts the reaper while the removal of a disk volume waits for its
// commit: a file system frees the extents of an image one by one, and one that
// was in use may have any number of them. reap deletes the volume, once that is
// in the trash, or leaves it to the reaper, which begins with release. In one
// process this is for the first disk only: who removes many does not start a
// process for each.
func (s *Store) readyReaper(r *records.Volume) (reap, release func()) {
	inTurn := func() { s.reapOne(r.ID) }
	if r.Kind != KindDisk || s.reapElsewhere == nil || s.reaped.Swap(true) {
		return inTurn, func() {}
	}
	var letGo func()
	started := begin(func() (err error) {
		letGo, err = s.reapElsewhere(s.home)
		return err
	})
	reap = func() {
		if started() != nil {
			inTurn()
		}
	}
	release = func() {
		if started() == nil {
			letGo()
		}
	}
	return reap, release
}

// reapLeftovers deletes what earlier processes left in the trash.
func (s *Store) reapLeftovers(out *settled) {
	ids, err := listNames(s.home.Trash())
	if err != nil {
		return
	}
	for _, id := range ids {
		path := filepath.Join(s.home.Trash(), id)
		err := s.reapTree(id, reapAtOnce)
		switch {
		case errors.Is(err, errBudget):
			s.reapInBackground()
			out.add(Finding{Kind: FoundTrash, ID: id, Path: path, Action: "deleting in the background"})
			return
		case err != nil:
			out.add(Finding{Kind: FoundTrash, ID: id, Path: path, Detail: err.Error(), Action: "could not be deleted"})
		default:
			out.add(Finding{Kind: FoundTrash, ID: id, Path: path, Action: "deleted"})
		}
	}
}

// reapTree deletes one directory of the trash; one that another process is
// deleting is left to it.
func (s *Store) reapTree(id string, budget int) error {
	path := filepath.Join(s.home.Trash(), id)
	f, err := lockDir(path)
	if err != nil || f == nil {
		return err
	}
	return reapLocked(f, path, budget)
}

// reapLocked deletes a directory of the trash and releases its lock.
func reapLocked(lock *os.File, path string, budget int) error {
	defer unlock(lock)
	if err := removeSome(path, budget); err != nil {
		return err
	}
	return pointReaped.Hit()
}

func (s *Store) reapInBackground() {
	if s.reapElsewhere != nil {
		if begin, err := s.reapElsewhere(s.home); err == nil {
			begin()
			return
		}
	}
	s.background.Go(func() { _ = s.ReapTrash(context.Background()) })
}

// ReapTrash deletes everything in the trash that nobody else is deleting. It is
// what a background process runs. ctx is looked at between volumes.
func (s *Store) ReapTrash(ctx context.Context) error {
	ids, err := listNames(s.home.Trash())
	if err != nil {
		return s.wrap("reap", "trash", err)
	}
	var errs []error
	for _, id := range ids {
		if ctx.Err() != nil {
			return s.wrap("reap", id, ctx.Err())
		}
		if err := s.reapTree(id, unlimited); err != nil {
			errs = append(errs, s.wrap("reap", id, err))
		}
	}
	return errors.Join(errs...)
}
