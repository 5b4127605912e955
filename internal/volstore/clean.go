package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// A disk volume's state directory holds the file clean as long as nobody can
// have written to the image since its file system was last whole. Attaching for
// writing takes it away, durably, and only the end of a sandbox whose guest
// unmounted everything puts it back. Without it the image is checked first.

var (
	pointChecked = failpoint.New("volstore.attach.checked") // the image is whole, nobody has it yet
	pointDirtied = failpoint.New("volstore.attach.dirtied") // the clean mark is gone
)

// Checker makes the file system of an unmounted image whole again, or says why
// it cannot. It may be killed at any time and is then run again.
type Checker func(ctx context.Context, v *Volume, image *os.File) error

// SetChecker says how images are checked before they are attached for writing
// after a sandbox that did not end cleanly. Without one such an attachment is
// refused. Call it before the store is used.
func (s *Store) SetChecker(fn Checker) { s.check = fn }

func (s *Store) cleanMark(r *records.Volume) string {
	return filepath.Join(s.home.State(r.ID), cleanName)
}

// prepareImage checks an image if need be and takes its clean mark away.
func (s *Store) prepareImage(ctx context.Context, a *Attachment) error {
	mark := s.cleanMark(&a.Volume.Volume)
	if !exists(mark) {
		if err := s.checkImage(ctx, a); err != nil {
			return err
		}
	}
	if err := pointChecked.Hit(); err != nil {
		return err
	}
	switch err := os.Remove(mark); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		// Were the mark to come back after a power cut, a torn image would go
		// unchecked.
		if err := syncDir(filepath.Dir(mark)); err != nil {
			return err
		}
	}
	a.clean = mark
	return pointDirtied.Hit()
}

func (s *Store) checkImage(ctx context.Context, a *Attachment) error {
	if a.Volume.DiskFstype != "ext4" { // adopted with something else in it
		return nil
	}
	if s.check == nil {
		return errdefs.New(errdefs.UnsupportedOperation, "volume %q was not detached cleanly and has to be checked first", a.Volume.Name).
			WithHint("attach it to a sandbox, which checks it")
	}
	return s.check(ctx, &a.Volume, a.Disk)
}

// MarkClean says that nobody will write to the image any more and that its file
// system was unmounted: the next attachment does without a check. It is for who
// knows, and does nothing for directories and readers.
func (a *Attachment) MarkClean() error {
	if a.clean == "" || a.Disk == nil {
		return nil
	}
	if err := a.Disk.Sync(); err != nil { // never a mark without the data
		return err
	}
	return touch(a.clean)
}
