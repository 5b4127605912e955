package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var (
	pointMarked   = failpoint.New("volstore.remove.marked")   // open handles look for the record
	pointRecorded = failpoint.New("volstore.remove.recorded") // the record is a tombstone
	pointUnlisted = failpoint.New("volstore.remove.unlisted") // the state is in the trash
	pointTrashed  = failpoint.New("volstore.remove.trashed")  // the name is free
)

// Remove deletes the volume that has this name when the call begins, and its
// data. The name can be used again when Remove returns; a large tree, and a disk
// where there is a reaper, are deleted in the background.
//
// After a crash the volume is there or gone. Errors: VolumeNotFound,
// InvalidConfig with the cause ErrVolumeInUse while it is attached, Cancelled, IO.
func (s *Store) Remove(ctx context.Context, name string) error {
	return s.wrap("remove", name, s.remove(ctx, name))
}

func (s *Store) remove(ctx context.Context, name string) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	if done, err := s.removeAtOnce(ctx, db, name); done {
		return err
	}
	r, err := db.VolumeByName(ctx, name)
	if err == nil {
		return s.removeID(ctx, db, r)
	}
	if !errdefs.Is(err, errdefs.VolumeNotFound) || ValidateName(name) != nil {
		return err
	}
	return s.removeRecovered(ctx, db, name, err)
}

// removeAtOnce removes the volume if nobody has its name locked, which saves a
// look at what it was before the lock was waited for. done is false if the
// volume has to be looked for.
func (s *Store) removeAtOnce(ctx context.Context, db *records.DB, name string) (done bool, err error) {
	lock, ok := s.tryName(name, nil)
	if !ok {
		return false, nil
	}
	defer lock.unlock()
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return true, err
	}
	r := found.records[name]
	if r == nil || r.MovingFrom != "" || slices.Contains(found.recovered, r.ID) {
		return false, nil
	}
	return true, s.removeLocked(ctx, db, r, found)
}

// removeRecovered removes a volume that has no record yet because its creator
// was killed before the commit. One that somebody else made meanwhile is not
// the caller's to remove.
func (s *Store) removeRecovered(ctx context.Context, db *records.DB, name string, notFound error) error {
	lock, err := s.lockNames(ctx, name)
	if err != nil {
		return err
	}
	defer lock.unlock()
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return err
	}
	r := found.records[name]
	if r == nil || !slices.Contains(found.recovered, r.ID) {
		return s.notFound(name, notFound)
	}
	return s.removeLocked(ctx, db, r, found)
}

// notFound adds to a VolumeNotFound error that a stranger has the name.
func (s *Store) notFound(name string, err error) error {
	var e *errdefs.Error
	if errors.As(err, &e) && exists(s.home.Volume(name)) {
		return e.WithHint("%s belongs to no volume; %s", s.home.Volume(name), strangerHint(name, s.home.Volume(name)))
	}
	return err
}

// RemoveID deletes the volume with this id, whatever its name is by now, and no
// other. Errors as Remove.
func (s *Store) RemoveID(ctx context.Context, id string) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return s.wrap("remove", id, err)
	}
	defer done()
	r, err := db.VolumeByID(ctx, id)
	if err != nil {
		return s.wrap("remove", id, err)
	}
	return s.wrap("remove", r.Name, s.removeID(ctx, db, r))
}

func (s *Store) removeID(ctx context.Context, db *records.DB, r *records.Volume) error {
	return s.removeIf(ctx, db, r, func(*records.Volume) bool { return true })
}

// removeIf removes a volume if wanted says so of its record as it is once the
// name is locked. Otherwise it returns errUnwanted.
func (s *Store) removeIf(ctx context.Context, db *records.DB, r *records.Volume, wanted func(*records.Volume) bool) error {
	lock, r, found, err := s.lockVolume(ctx, db, r)
	if err != nil {
		return err
	}
	defer lock.unlock()
	if !wanted(r) {
		return errUnwanted
	}
	return s.removeLocked(ctx, db, r, found)
}

// lockVolume locks the name of a volume, settles it and reads the record again,
// following renames that happened meanwhile. Errors: VolumeNotFound.
func (s *Store) lockVolume(ctx context.Context, db *records.DB, r *records.Volume) (*nameLock, *records.Volume, *settled, error) {
	for {
		names := []string{r.Name}
		if r.MovingFrom != "" {
			names = append(names, r.MovingFrom)
		}
		lock, err := s.lockNames(ctx, names...)
		if err != nil {
			return nil, nil, nil, err
		}
		found, err := s.settle(ctx, db, lock)
		var now *records.Volume
		if err == nil {
			if now = found.records[r.Name]; now == nil || now.ID != r.ID {
				now, err = db.VolumeByID(ctx, r.ID) // renamed or removed meanwhile
			}
		}
		if errdefs.Is(err, errdefs.VolumeNotFound) {
			err = records.VolumeNotFound(r.Name)
		}
		if err == nil && now.Name == r.Name && now.MovingFrom == "" {
			return lock, now, found, nil
		}
		lock.unlock()
		if err != nil {
			return nil, nil, nil, err
		}
		r = now
	}
}

// removeLocked removes a volume whose name is locked and settled.
func (s *Store) removeLocked(ctx context.Context, db *records.DB, r *records.Volume, found *settled) error {
	if err := noMounts(r.Name, s.home.Volume(r.Name)); err != nil {
		return err
	}
	held, err := s.lockUnattachedNamed(ctx, r)
	if err != nil {
		return err
	}
	defer unlock(held)
	reap, release := s.readyReaper(r)
	defer release()
	alive := filepath.Join(s.home.State(r.ID), aliveName)
	if err := os.Remove(alive); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err = pointMarked.Hit()
	if err == nil {
		err = s.deleteRecord(ctx, db, r, found)
	}
	if err != nil {
		return errors.Join(err, makeAlive(s.home.State(r.ID)))
	}
	// The volume is gone, unless its directory cannot be moved. What else fails from
	// here on is left to the next command.
	if err := pointRecorded.Hit(); err != nil {
		return err
	}
	if _, err := s.clearName(r.ID, r.Name, r.Identity); err != nil {
		return errors.Join(immovable(r.Name, s.home.Volume(r.Name), err), s.undelete(context.WithoutCancel(ctx), db, r))
	}
	if err := pointTrashed.Hit(); err != nil {
		return err
	}
	reap()
	return nil
}

// undelete gives a volume its record back whose data is still at its name.
func (s *Store) undelete(ctx context.Context, db *records.DB, r *records.Volume) error {
	have, ok, err := identityAt(s.home.Volume(r.Name))
	if err != nil || !ok || !have.Same(r.Identity) {
		return err
	}
	err = renameNew(filepath.Join(s.home.Trash(), r.ID), s.home.State(r.ID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := db.InsertVolume(ctx, r, r.ID); err != nil {
		return err
	}
	if _, err := s.ensureState(r); err != nil {
		return err
	}
	return makeAlive(s.home.State(r.ID))
}

// deleteRecord replaces the record by a tombstone, and forgets those of earlier
// removals if these can be made durable: for want of space, perhaps not.
func (s *Store) deleteRecord(ctx context.Context, db *records.DB, r *records.Volume, found *settled) error {
	if len(found.tombstones) == 0 {
		return db.DeleteVolume(ctx, r)
	}
	ready := begin(found.forgettable(s))
	err := db.DeleteVolumeWhen(ctx, records.Condition{Synced: ready}, r, found.tombstones...)
	if ready() != nil {
		return db.DeleteVolume(ctx, r)
	}
	return err
}

// lockUnattached takes the attach lock exclusively. An attachment in the making
// or a removal that is about to give up is waited for, but not long.
func (s *Store) lockUnattached(ctx context.Context, r *records.Volume) (*os.File, error) {
	f, err := s.openAttach(ctx, s.volume(r))
	if err != nil {
		return nil, err
	}
	return s.lockOpened(ctx, f, r)
}

// lockUnattachedNamed is lockUnattached for who has the name locked. Where nobody
// has ever attached the volume there is no attach file, and nobody can make one
// without the lock on the name: then the result is nil.
func (s *Store) lockUnattachedNamed(ctx context.Context, r *records.Volume) (*os.File, error) {
	f, err := openFile(filepath.Join(s.home.State(r.ID), attachName), unix.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) {
		return s.lockOpened(ctx, nil, r)
	}
	if err != nil {
		return nil, err
	}
	return s.lockOpened(ctx, f, r)
}

// lockOpened takes the lock of an open attach file, nil for none, or closes it.
func (s *Store) lockOpened(ctx context.Context, f *os.File, r *records.Volume) (_ *os.File, err error) {
	if f != nil {
		err = s.tryAttachLock(ctx, f, unix.LOCK_EX, r.Name)
	}
	if err == nil && r.Kind == KindDisk {
		err = s.imageIsFree(ctx, f, r)
	}
	if err != nil && f != nil {
		_ = f.Close()
		f = nil
	}
	return f, err
}

// imageIsFree asks for QEMU's image locks: a host tool may work on the image
// without having the volume attached. Whatever else is wrong with the image does
// not matter here.
func (s *Store) imageIsFree(ctx context.Context, lock *os.File, r *records.Volume) error {
	f, err := openImage(ctx, lock, filepath.Join(s.home.Volume(r.Name), home.DiskFile), false)
	if errors.Is(err, errdefs.ErrVolumeInUse) {
		e := &errdefs.Error{Kind: errdefs.InvalidConfig, Cause: held(fmt.Sprintf("volume %q: its disk image is open in another program", r.Name))}
		return e.WithHint("end the program that has %s open", filepath.Join(s.home.Volume(r.Name), home.DiskFile))
	}
	if err == nil {
		_ = f.Close()
	}
	return nil
}

// clearName moves the state and the data of a removed volume to the trash. What
// lies at the name with another identity is a stranger's and stays. moved tells
// whether data was moved. The name is locked.
func (s *Store) clearName(id, name string, data records.Identity) (moved bool, err error) {
	trash := filepath.Join(s.home.Trash(), id)
	err = renameNew(s.home.State(id), trash)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		if !noRoom(err) {
			return false, err
		}
		_ = removeTree(s.home.State(id))
	}
	if err := pointUnlisted.Hit(); err != nil {
		return false, err
	}
	path := s.home.Volume(name)
	have, ok, err := identityAt(path)
	if err != nil || !ok || !have.Same(data) {
		return false, err
	}
	if err := os.Mkdir(trash, 0o700); err != nil && !errors.Is(err, fs.ErrExist) && !noRoom(err) {
		return false, err
	}
	moved, err = moveOwn(path, filepath.Join(trash, dataName), data)
	if errors.Is(err, unix.EACCES) && makeMovable(path) {
		moved, err = moveOwn(path, filepath.Join(trash, dataName), data)
	}
	if err != nil && (noRoom(err) || errors.Is(err, fs.ErrNotExist)) {
		return true, removeTree(path) // no room for a name in the trash: delete in place
	}
	return moved, err
}

// noRoom tells whether something failed for want of space.
func noRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
