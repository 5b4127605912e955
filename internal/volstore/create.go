package volstore

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var (
	pointMade      = failpoint.New("volstore.create.made")      // staging directory is locked, empty
	pointLocked    = failpoint.New("volstore.create.locked")    // name is locked and settled
	pointStaged    = failpoint.New("volstore.create.staged")    // staging is complete, its note durable
	pointRenamed   = failpoint.New("volstore.create.renamed")   // data has its name
	pointCommitted = failpoint.New("volstore.create.committed") // record is durable
)

// Create makes a volume. A directory volume may have a quota; a disk volume
// must have a size and gets an ext4 image of exactly that size, allocated
// sparsely.
//
// The volume is durable when Create returns. After a crash it is absent or
// complete; when ctx ends early, or Create fails, nothing is left behind but, where
// there is a reaper, the image of a disk in the trash.
//
// Errors: InvalidConfig, VolumeAlreadyExists (also for a stranger's directory,
// with the way to adopt it), UnsupportedOperation without mkfs.ext4, Cancelled, IO.
func (s *Store) Create(ctx context.Context, sp Spec) (*Volume, error) {
	if err := sp.Validate(); err != nil {
		return nil, err
	}
	v, err := s.create(ctx, sp)
	return v, s.wrap("create", sp.Name, err)
}

func (s *Store) create(ctx context.Context, sp Spec) (*Volume, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, err
	}
	defer done()
	lock, err := s.holdNames(ctx, sp.Name) // callers of this process build one at a time
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	if sp.Kind == KindDisk || exists(s.home.Volume(sp.Name)) {
		if _, err := db.VolumeByName(ctx, sp.Name); err == nil {
			return nil, s.refuse(ctx, db, lock, sp.Name) // before anything is built
		}
	}
	st, err := s.stage(ctx, sp)
	if err != nil {
		return nil, err
	}
	defer st.drop()
	if err := lock.lockSlots(ctx); err != nil {
		return nil, err
	}
	return s.publish(ctx, db, lock, st)
}

// refuse is the end of a creation whose name is taken. Like every mutating call
// it settles first, whatever was left behind.
func (s *Store) refuse(ctx context.Context, db *records.DB, lock *nameLock, name string) error {
	if err := lock.lockSlots(ctx); err != nil {
		return err
	}
	if _, err := s.settle(ctx, db, lock); err != nil {
		return err
	}
	return alreadyExists(name)
}

// staging is a volume being made. It is locked while file is open.
type staging struct {
	s      *Store
	path   string
	file   *os.File
	record records.Volume
	image  *os.File     // of a disk volume, open until it is synced
	adopt  bool         // the data is at its place already
	sealed func() error // waits for what seal has begun; nil before
	placed bool         // the data has its name
	ended  func() error // of a new volume, that its maker has been told to stop
	done   bool         // published: nothing to drop
}

// stage makes the staging directory of a new volume with its data, and begins
// what else goes there.
func (s *Store) stage(ctx context.Context, sp Spec) (_ *staging, err error) {
	st, err := s.newStaging(sp)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			st.drop()
		}
	}()
	st.ended = ctx.Err
	if err := pointMade.Hit(); err != nil {
		return nil, err
	}
	if err := st.makeData(ctx); err != nil {
		return nil, err
	}
	st.seal(&sp)
	return st, nil
}

// newStaging makes and locks an empty staging directory with a new id.
func (s *Store) newStaging(sp Spec) (*staging, error) {
	now := time.Now()
	id, err := ulid.New(ulid.Timestamp(now), rand.Reader)
	if sp.ID != "" {
		id, err = ulid.ParseStrict(sp.ID)
	}
	if err != nil {
		return nil, err
	}
	st := &staging{s: s, path: filepath.Join(s.home.Staging(), id.String())}
	st.record = records.Volume{
		ID: id.String(), Name: sp.Name, Kind: KindDir, QuotaMiB: sp.QuotaMiB, Labels: sp.Labels, CreatedAt: now.UTC(),
	}
	if sp.Kind == KindDisk {
		st.record.Kind, st.record.CapacityBytes = KindDisk, int64(sp.SizeMiB)*mib
		st.record.DiskFormat, st.record.DiskFstype = "raw", "ext4"
	}
	s.setMaking(id.String(), true)
	if err := st.lock(); err != nil {
		s.setMaking(id.String(), false)
		return nil, err
	}
	return st, nil
}

// lock makes and locks the directory.
func (st *staging) lock() error {
	// Between making and locking it another process may take it for a leftover.
	for {
		err := os.Mkdir(st.path, 0o700)
		if errors.Is(err, fs.ErrNotExist) {
			if err = st.s.home.Ensure(); err == nil {
				err = os.Mkdir(st.path, 0o700)
			}
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if st.file, err = lockDir(st.path); err != nil || st.file != nil {
			return err
		}
	}
}

// isMaking reports whether a staging directory belongs to a creation of this
// store that goes on: there is no need to try its lock.
func (s *Store) isMaking(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.making[id]
}

func (s *Store) setMaking(id string, making bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if making {
		s.making[id] = true
	} else {
		delete(s.making, id)
	}
}

// makeData makes the data directory and, for a disk volume, the image.
func (st *staging) makeData(ctx context.Context) (err error) {
	data := filepath.Join(st.path, dataName)
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if st.record.Kind == KindDisk {
		image := filepath.Join(data, home.DiskFile)
		options := diskimg.FormatOptions{Templates: st.s.home.Templates()}
		if st.image, err = diskimg.CreateExt4(ctx, image, st.record.CapacityBytes, options); err != nil {
			return err
		}
		if err := touch(filepath.Join(st.path, cleanName)); err != nil {
			return err
		}
	}
	st.record.Identity, _, err = identityAt(data)
	return err
}

// syncImage makes the image of a disk volume durable.
func (st *staging) syncImage() error {
	image := st.image
	st.image = nil
	synced := begin(func() error { return diskimg.Sync(image) })
	return errors.Join(syncDir(filepath.Join(st.path, dataName)), synced())
}

// seal begins to furnish the staging directory: it may take as long as the record
// takes to its journal. Only the image of a disk and a limit need be durable. The
// note is in the journal, and another file that is lost is made again when it is
// missed. sp is of a new volume.
func (st *staging) seal(sp *Spec) {
	st.sealed = begin(func() error {
		synced := begin()
		if st.image != nil { // an empty directory has nothing of its own to sync
			synced = begin(st.syncImage)
		}
		err := st.furnish(sp)
		return errors.Join(synced(), err)
	})
}

func (st *staging) furnish(sp *Spec) error {
	if sp != nil && sp.Inodes != 0 {
		if err := writeLimits(st.path, sp.Inodes); err != nil {
			return err
		}
	}
	note, err := createFile(filepath.Join(st.path, noteName), encodeNote(&st.record))
	if err != nil {
		return err
	}
	if err := errors.Join(note.Close(), makeAlive(st.path)); err != nil || sp == nil {
		return err
	}
	if err := st.makeLedger(sp); err != nil || sp.Inodes == 0 {
		return err
	}
	return st.syncNote()
}

// syncNote makes the note durable, and with it the staging directory.
func (st *staging) syncNote() error {
	note, err := openFile(filepath.Join(st.path, noteName), unix.O_RDWR)
	if err != nil {
		return err
	}
	syncs := []func() error{func() error { return errors.Join(note.Sync(), note.Close()) }}
	if st.record.Identity.BirthNS == 0 || !syncsParents(note) {
		syncs = append(syncs, st.file.Sync, func() error { return syncDir(st.s.home.Staging()) })
	}
	return begin(syncs...)()
}

// drop removes what publish did not take, and unlocks. The note goes first: a
// half-dropped staging directory must not look like one whose data was renamed.
func (st *staging) drop() {
	if st.sealed != nil {
		_ = st.sealed()
	}
	if st.image != nil {
		_ = st.image.Close()
	}
	left := false
	if !st.done && !st.holdsStranger() {
		_ = os.Remove(filepath.Join(st.path, noteName))
		if left = st.leave(); !left {
			_ = removeTree(st.path)
		}
	}
	unlock(st.file)
	if left {
		st.s.reapInBackground()
	}
	st.s.setMaking(filepath.Base(st.path), false)
}

// holdsStranger reports whether the data is, or may be, another directory than was
// made: one that was taken for it when its name was taken back, and could not be put
// back in its turn. It is deleted by nobody.
func (st *staging) holdsStranger() bool {
	own := st.record.Identity
	if own == (records.Identity{}) {
		r, err := readNote(filepath.Join(st.path, noteName))
		if err != nil {
			return false // it was never moved
		}
		own = r.Identity
	}
	id, ok, err := identityAt(filepath.Join(st.path, dataName))
	return err != nil || ok && !id.Same(own)
}

// leave moves what was made of a disk to the trash if its maker has been told to
// stop and there is a reaper: deleting an image of terabytes may take longer than
// making it.
func (st *staging) leave() bool {
	return st.ended != nil && st.ended() != nil && st.record.Kind == KindDisk && st.s.reapElsewhere != nil &&
		renameNew(st.path, filepath.Join(st.s.home.Trash(), st.record.ID)) == nil
}

// publish gives a staged volume its name. The name is locked. From the rename
// on it is not cancelled.
func (s *Store) publish(ctx context.Context, db *records.DB, lock *nameLock, st *staging) (*Volume, error) {
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return nil, err
	}
	if err := pointLocked.Hit(); err != nil {
		return nil, err
	}
	if err := s.nameIsFree(found, st); err != nil {
		return nil, err
	}
	asked := ctx
	ctx = context.WithoutCancel(ctx)
	forgotten := begin(found.forgettable(s))
	err = db.InsertVolumeWhen(ctx, st.condition(asked, forgotten), &st.record, found.tombstones...)
	if err != nil && forgotten() != nil { // then they stay
		err = db.InsertVolumeWhen(ctx, st.condition(asked, begin()), &st.record)
	}
	if err != nil {
		// A failed commit may have been one: only the database knows.
		if _, err2 := db.VolumeByID(ctx, st.record.ID); !errdefs.Is(err2, errdefs.VolumeNotFound) {
			st.done = true
			return nil, err
		}
		return nil, errors.Join(err, st.unrename(ctx, db))
	}
	st.done = true // the record stands, whatever happens from here on
	if err := pointCommitted.Hit(); err != nil {
		return nil, err
	}
	// Without this rename the next command does it; it need not be durable.
	_ = renameNew(st.path, s.home.State(st.record.ID))
	return s.volume(&st.record), nil
}

// condition is what the record waits for: the data gets its name once the note is
// on the disk, in the journal or as a file, and has it, durably, before the record
// is committed, as what also waits for.
func (st *staging) condition(ctx context.Context, also func() error) records.Condition {
	named := begin()
	return records.Condition{
		Keep: st.kept(),
		Journaled: func(kept bool) error {
			err := st.sealed()
			if err == nil && !kept {
				err = st.syncNote()
			}
			if err != nil {
				return err
			}
			if !st.placed {
				if err := st.place(ctx); err != nil {
					return err
				}
			}
			named = begin(func() error { return syncDir(st.s.home.Volumes()) })
			return nil
		},
		Synced: func() error { return errors.Join(named(), also()) },
	}
}

// kept is the note as the records' journal keeps it.
func (st *staging) kept() records.KeptFile {
	return records.KeptFile{Path: filepath.Join(st.path, noteName), Content: encodeNote(&st.record)}
}

// nameIsFree looks for a record and a stranger. The name is locked and settled.
func (s *Store) nameIsFree(found *settled, st *staging) error {
	name := st.record.Name
	if found.records[name] != nil {
		return alreadyExists(name)
	}
	if path := s.home.Volume(name); !st.adopt && exists(path) {
		return strangerAt(name, path)
	}
	return nil
}

// place gives the data its name.
func (st *staging) place(ctx context.Context) error {
	if err := pointStaged.Hit(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if st.placed = st.adopt; st.placed {
		return nil
	}
	to := st.s.home.Volume(st.record.Name)
	if err := renameNew(filepath.Join(st.path, dataName), to); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return strangerAt(st.record.Name, to)
		}
		return err
	}
	st.placed = true
	return pointRenamed.Hit()
}

// unrename takes the name back, if the data has it, after a failed commit. A stranger
// that has come to lie there stays. Where the name cannot be taken back the staging
// directory stays, too, and the next command completes the creation or undoes it.
func (st *staging) unrename(ctx context.Context, db *records.DB) error {
	if !st.placed {
		return nil
	}
	if !st.adopt {
		_, err := moveOwn(st.s.home.Volume(st.record.Name), filepath.Join(st.path, dataName), st.record.Identity)
		if err == nil || errors.Is(err, unix.ENOENT) {
			err = syncDir(st.s.home.Volumes()) // before the note goes
		}
		if err != nil {
			st.done = true
			return err
		}
	}
	return db.Forget(ctx, st.kept())
}
