package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
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
	slices.Sort(ids)
	large := false
	for _, id := range ids {
		f := Finding{Kind: FoundTrash, ID: id, Path: filepath.Join(s.home.Trash(), id)}
		if !large {
			err = s.reapTree(id, reapAtOnce)
		}
		switch {
		case errors.Is(err, errBudget): // the rest, too
			large = true
			f.Action = "deleting in the background"
		case errors.Is(err, errReaping) && !out.forRepair:
			continue
		case errors.Is(err, errReaping):
			f.Action = "being deleted by " + reaperOf(f.Path)
			if !exists(f.Path) {
				continue
			}
		case errors.Is(err, fs.ErrNotExist):
			continue // somebody else has deleted it
		case err != nil:
			f.Detail = "see what keeps it from being deleted (owner, attributes, a mount), then repair again"
			f.err = errdefs.Wrap(errdefs.IO, err, "%s cannot be deleted", f.Path)
		default:
			f.Action = "deleted"
		}
		out.add(f)
	}
	if large {
		s.reapInBackground()
	}
}

// errReaping says that somebody is deleting a removed volume already.
var errReaping = errors.New("somebody else is deleting it")

// reapTree deletes what has a name in the trash, whatever it is. Errors: errBudget;
// errReaping; fs.ErrNotExist if it is gone.
func (s *Store) reapTree(id string, budget int) error {
	path := filepath.Join(s.home.Trash(), id)
	f, err := lockDir(path)
	if err != nil {
		return err
	}
	if f != nil {
		return reapLocked(f, path, budget)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if fi.IsDir() {
		return errReaping
	}
	return removeSome(path, budget)
}

// reaperOf names who has a directory locked, as far as the kernel tells.
func reaperOf(path string) string {
	const unknown = "another process"
	var st unix.Stat_t
	locks, err := os.ReadFile("/proc/locks")
	if err != nil || unix.Lstat(path, &st) != nil {
		return unknown
	}
	on := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(locks)) {
		// "1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF"; who waits has "->" after the number.
		f := strings.Fields(line)
		if len(f) < 6 || f[1] != "FLOCK" || f[5] != on {
			continue
		}
		switch pid, err := strconv.Atoi(f[4]); {
		case err != nil || pid <= 0: // of another PID namespace
		case pid == os.Getpid():
			return "this process"
		default:
			return fmt.Sprintf("process %d", pid)
		}
	}
	return unknown
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
		err := s.reapTree(id, unlimited)
		if err != nil && !errors.Is(err, errReaping) && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, s.wrap("reap", id, err))
		}
	}
	return errors.Join(errs...)
}
