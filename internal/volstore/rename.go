package volstore

import (
	"context"
	"errors"
	"io/fs"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var (
	pointNoted    = failpoint.New("volstore.rename.recorded") // the record has the new name and remembers the old
	pointMoved    = failpoint.New("volstore.rename.moved")    // the data has the new name
	pointFinished = failpoint.New("volstore.rename.finished") // the record has forgotten the old name
)

// Rename gives a volume another name; its id, data and labels stay, and open
// Data goes on working. An attached volume is not renamed.
//
// After a crash it has one of the two names. Errors: InvalidConfig, also with the
// cause ErrVolumeInUse; VolumeNotFound; VolumeAlreadyExists; Cancelled; IO.
func (s *Store) Rename(ctx context.Context, from, to string) (*Volume, error) {
	return s.checkedRename(ctx, from, to, "")
}

// RenameID is Rename of the volume with this id and no successor of its name.
func (s *Store) RenameID(ctx context.Context, id, to string) (*Volume, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, err
	}
	return s.checkedRename(ctx, v.Name, to, id)
}

func (s *Store) checkedRename(ctx context.Context, from, to, id string) (*Volume, error) {
	if err := ValidateName(to); err != nil {
		return nil, err
	}
	if from == to {
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q has this name already", from)
	}
	v, err := s.rename(ctx, from, to, id)
	return v, s.wrap("rename", from, err)
}

// rename renames what is called from when both names are locked; id "" is any
// volume.
func (s *Store) rename(ctx context.Context, from, to, id string) (*Volume, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, err
	}
	defer done()
	lock, err := s.lockNames(ctx, from, to)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return nil, err
	}
	r := found.records[from]
	if r == nil || (id != "" && r.ID != id) {
		return nil, s.notFound(from, records.VolumeNotFound(from))
	}
	if err := s.nameIsFree(found, &staging{s: s, record: records.Volume{Name: to}}); err != nil {
		return nil, err
	}
	held, err := s.lockUnattachedNamed(ctx, r)
	if err != nil {
		return nil, err
	}
	defer unlock(held)
	if err := s.canMove(r); err != nil {
		return nil, err
	}
	ctx = context.WithoutCancel(ctx)
	if err := db.RenameVolume(ctx, r.ID, from, to); err != nil {
		return nil, err
	}
	r.Name, r.MovingFrom = to, from
	if err := pointNoted.Hit(); err != nil {
		return nil, err
	}
	if err := s.finishMove(ctx, db, r); err != nil {
		return nil, err
	}
	return s.volume(r), nil
}

// canMove refuses what could not be moved, or would leave the data behind.
func (s *Store) canMove(r *records.Volume) error {
	path := s.home.Volume(r.Name)
	if err := noMounts(r.Name, path); err != nil {
		return err
	}
	have, ok, err := identityAt(path)
	if err == nil && ok && !have.Same(r.Identity) {
		err = errdefs.New(errdefs.IO, "volume %q: %s is not the directory that it had", r.Name, path).
			WithHint("make it the volume's with: msb volume adopt %s", r.Name)
	}
	return err
}

// finishMove moves the data of a volume to its new name. Both names are locked.
// If that cannot be done, because a stranger has come to lie there meanwhile or for
// another reason, the volume gets its old name back; then r.MovingFrom is "".
func (s *Store) finishMove(ctx context.Context, db *records.DB, r *records.Volume) error {
	from, to := s.home.Volume(r.MovingFrom), s.home.Volume(r.Name)
	moved, err := moveOwn(from, to, r.Identity)
	if err != nil && !moved {
		name := r.Name
		if errors.Is(err, fs.ErrExist) {
			err = strangerAt(name, to)
		} else {
			err = immovable(r.MovingFrom, from, err)
		}
		if undo := db.RenameVolume(ctx, r.ID, "", r.MovingFrom); undo != nil {
			return errors.Join(err, undo)
		}
		r.Name, r.MovingFrom = r.MovingFrom, ""
		return err
	}
	if err != nil {
		return err
	}
	if err := syncDir(s.home.Volumes()); err != nil {
		return err
	}
	if err := pointMoved.Hit(); err != nil {
		return err
	}
	if err := db.FinishRename(ctx, r.ID, r.Name); err != nil {
		return err
	}
	r.MovingFrom = ""
	if err := pointFinished.Hit(); err != nil {
		return err
	}
	_, err = s.ensureState(r)
	return err
}
