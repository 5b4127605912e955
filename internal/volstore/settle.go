package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var (
	pointRecovered = failpoint.New("volstore.settle.recorded") // a killed creation is committed
	pointCleared   = failpoint.New("volstore.settle.cleared")  // a killed removal has left its name
)

// settled is what settle found and did.
type settled struct {
	tombstones []string  // ids of removals that are complete, for the next commit to forget; see forgettable
	recovered  []string  // ids of volumes whose creation was completed
	findings   []Finding // for repair
	forRepair  bool      // nobody else reads findings: who is at it costs half of a removal to ask

	records map[string]*records.Volume // of the locked names that are taken
}

// settle finishes or undoes what killed processes left, for the names in lock
// and for all whose lock is free. Trouble with other names is not an error: a
// later command meets it again.
func (s *Store) settle(ctx context.Context, db *records.DB, lock *nameLock) (*settled, error) {
	ctx = context.WithoutCancel(ctx)
	out := &settled{records: map[string]*records.Volume{}, forRepair: len(lock.names) == 0}
	if err := s.settleStagings(ctx, db, lock, out); err != nil {
		return nil, err
	}
	var first string
	if len(lock.names) > 0 {
		first = lock.names[0]
	}
	look, err := db.Look(ctx, first)
	if err != nil {
		return nil, err
	}
	if len(look.Tombstones) > 0 {
		if err := s.settleTombstones(look.Tombstones, lock, out); err != nil {
			return nil, err
		}
	}
	if look.Moving > 0 {
		if err := s.settleMoves(ctx, db, lock, out); err != nil {
			return nil, err
		}
	}
	for _, name := range lock.names {
		r := look.Volume
		if name != first || look.Moving > 0 {
			if r, err = db.VolumeByName(ctx, name); err != nil && !errdefs.Is(err, errdefs.VolumeNotFound) {
				return nil, err
			}
		}
		if err := s.settleState(r, out); err != nil {
			return nil, err
		}
	}
	s.reapLeftovers(out)
	return out, nil
}

func (s *Store) settleStagings(ctx context.Context, db *records.DB, lock *nameLock, out *settled) error {
	ids, err := listNames(s.home.Staging())
	if err != nil {
		return err
	}
	for _, id := range ids {
		if volume, ok := isGrowMark(id); ok {
			s.settleGrow(ctx, db, volume, out)
			continue
		}
		if s.isMaking(id) {
			continue
		}
		own, err := s.settleStaging(ctx, db, lock, id, out)
		if err != nil && own {
			return err
		}
	}
	return nil
}

// settleStaging deals with one staging directory; own tells whether it was
// about a name in lock.
func (s *Store) settleStaging(ctx context.Context, db *records.DB, lock *nameLock, id string, out *settled) (own bool, err error) {
	path := filepath.Join(s.home.Staging(), id)
	f, err := lockDir(path)
	if err != nil || f == nil {
		return false, err // its maker lives
	}
	st := &staging{s: s, path: path, file: f}
	defer st.drop()
	r, err := s.stagedRecord(ctx, db, id)
	if err != nil {
		st.done = true
		return false, err
	}
	if r == nil {
		out.add(Finding{Kind: FoundStaging, ID: id, Path: path, Action: "dropped an unfinished creation"})
		return false, nil
	}
	release, ok := lock.also(r.Name)
	if !ok {
		st.done = true // for the next command
		return false, nil
	}
	defer release()
	st.record = *r
	return slices.Contains(lock.names, r.Name), s.settleRenamed(ctx, db, st, out)
}

// stagedRecord returns the record of a staging directory that is committed, or
// whose data was renamed, or was never in it (adopt); nil if its volume was
// never visible.
func (s *Store) stagedRecord(ctx context.Context, db *records.DB, id string) (*records.Volume, error) {
	r, err := db.VolumeByID(ctx, id)
	if !errdefs.Is(err, errdefs.VolumeNotFound) {
		return r, err
	}
	path := filepath.Join(s.home.Staging(), id)
	r, err = readNote(filepath.Join(path, noteName))
	if err != nil || r.ID != id || exists(filepath.Join(path, dataName)) {
		return nil, nil
	}
	return r, nil
}

// settleRenamed deals with a staging directory that stagedRecord knows. Its name
// is locked.
func (s *Store) settleRenamed(ctx context.Context, db *records.DB, st *staging, out *settled) error {
	r := &st.record
	now, err := db.VolumeByID(ctx, r.ID)
	switch {
	case err == nil && now.Name != r.Name:
		st.done = true // renamed meanwhile: for the next command
		return nil
	case err == nil:
	case errdefs.Is(err, errdefs.VolumeNotFound):
		ours, err := s.recoverRecord(ctx, db, st)
		if err != nil {
			st.done = true
			return err
		}
		if !ours {
			out.add(Finding{Kind: FoundStaging, ID: r.ID, Name: r.Name, Path: st.path, Action: "dropped an undone creation"})
			return nil
		}
		out.recovered = append(out.recovered, r.ID)
		out.add(Finding{Kind: FoundStaging, ID: r.ID, Name: r.Name, Path: st.path, Action: "completed an interrupted creation"})
	default:
		st.done = true
		return err
	}
	st.done = true
	if err := renameNew(st.path, s.home.State(r.ID)); errors.Is(err, fs.ErrExist) && !exists(filepath.Join(st.path, dataName)) {
		st.done = false // published before: this is a remainder
	}
	return nil
}

// recoverRecord commits the record of a volume whose data has its name; ours is
// false if there is no such data any more, or another volume has the name.
func (s *Store) recoverRecord(ctx context.Context, db *records.DB, st *staging) (ours bool, err error) {
	r := &st.record
	if exists(filepath.Join(st.path, dataName)) {
		return false, nil // removed meanwhile
	}
	id, ok, err := identityAt(s.home.Volume(r.Name))
	if err != nil {
		return false, err
	}
	removed, err := wasRemoved(ctx, db, r.ID)
	if err != nil || removed || !ok || !id.Same(r.Identity) {
		return false, err
	}
	if err := errors.Join(st.syncNote(), syncDir(s.home.Volumes())); err != nil { // its maker may not have come to that
		return false, err
	}
	err = db.InsertVolume(ctx, r)
	if errdefs.Is(err, errdefs.VolumeAlreadyExists) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, pointRecovered.Hit()
}

// wasRemoved reports whether a volume without a record had one. Its staging
// directory may have come back: after a power cut the commit of its removal may
// stand without the rename that ended its creation, which nobody synced.
func wasRemoved(ctx context.Context, db *records.DB, id string) (bool, error) {
	tombs, err := db.Tombstones(ctx)
	return slices.ContainsFunc(tombs, func(t records.Tombstone) bool { return t.ID == id }), err
}

// forgetAt is how many tombstones of complete removals stay until they are
// forgotten together: that waits for the disk.
const forgetAt = 4

// settleTombstones finishes removals: whatever still lies at the name or in
// .state goes to the trash.
func (s *Store) settleTombstones(tombs []records.Tombstone, lock *nameLock, out *settled) error {
	soon := len(tombs) >= forgetAt || len(lock.names) == 0
	for _, t := range tombs {
		// Without a time of birth, its identity may be another directory's any time.
		soon = soon || t.Identity.BirthNS == 0
		if !exists(s.home.Volume(t.Name)) && !exists(s.home.State(t.ID)) {
			out.tombstones = append(out.tombstones, t.ID)
			continue
		}
		release, ok := lock.also(t.Name)
		if !ok {
			continue
		}
		moved, err := s.clearName(t.ID, t.Name, t.Identity)
		release()
		if err == nil {
			if moved {
				out.add(Finding{Kind: FoundTombstone, ID: t.ID, Name: t.Name, Path: s.home.Volume(t.Name), Action: "completed an interrupted removal"})
			}
			out.tombstones = append(out.tombstones, t.ID)
		} else if slices.Contains(lock.names, t.Name) {
			return err
		}
	}
	if !soon {
		out.tombstones = nil
	}
	return pointCleared.Hit()
}

// forgettable returns what makes the removals durable whose tombstones a commit
// is to forget; nil if there are none.
func (o *settled) forgettable(s *Store) func() error {
	if len(o.tombstones) == 0 {
		return nil
	}
	return func() error {
		wait := begin(func() error { return syncDir(s.home.Trash()) })
		return errors.Join(syncDir(s.home.Volumes()), wait())
	}
}

// settleMoves finishes renames of volumes.
func (s *Store) settleMoves(ctx context.Context, db *records.DB, lock *nameLock, out *settled) error {
	moving, err := db.MovingVolumes(ctx)
	if err != nil {
		return err
	}
	for _, r := range moving {
		releaseTo, ok := lock.also(r.Name)
		if !ok {
			continue
		}
		releaseFrom, ok := lock.also(r.MovingFrom)
		if ok {
			from, to := r.MovingFrom, r.Name
			err = s.finishMove(ctx, db, r)
			releaseFrom()
			action := "completed an interrupted rename from " + from
			if err != nil && r.Name == from { // undone
				err, action = nil, "gave up an interrupted rename to "+to+": "+err.Error()
			}
			if err == nil {
				out.add(Finding{Kind: FoundMove, ID: r.ID, Name: r.Name, Path: s.home.Volume(r.Name), Action: action})
			}
		}
		releaseTo()
		if err != nil && (slices.Contains(lock.names, r.Name) || slices.Contains(lock.names, r.MovingFrom)) {
			return err
		}
	}
	return nil
}

// settleState writes a missing state directory of a volume whose name is locked
// anew (a power cut may have taken it), and brings its note up to date. nil is
// no volume.
func (s *Store) settleState(r *records.Volume, out *settled) error {
	if r == nil {
		return nil
	}
	out.records[r.Name] = r
	mended, err := s.ensureState(r)
	if mended {
		out.add(Finding{Kind: FoundState, ID: r.ID, Name: r.Name, Path: s.home.State(r.ID), Action: "wrote the state directory anew"})
	}
	return err
}

// ensureState makes what is missing of a state directory. The name is locked.
func (s *Store) ensureState(r *records.Volume) (mended bool, err error) {
	dir := s.home.State(r.ID)
	if !exists(dir) {
		if err := os.Mkdir(dir, 0o700); err == nil {
			mended = true
		} else if !errors.Is(err, fs.ErrExist) {
			return false, err
		}
	}
	want := encodeNote(r)
	have, stale := readFile(filepath.Join(dir, noteName))
	if stale != nil || string(have) != string(want) {
		err := s.writeNote(r)
		if err != nil && (stale != nil || !noRoom(err)) {
			return true, err
		}
		mended = mended || err == nil // an old note keeps nobody from anything; a later command writes it
	}
	if exists(filepath.Join(dir, aliveName)) {
		return mended, nil
	}
	return true, makeAlive(dir)
}

// writeNote replaces volume.json of a published volume.
func (s *Store) writeNote(r *records.Volume) error {
	path := filepath.Join(s.home.State(r.ID), noteName)
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := createFile(tmp, encodeNote(r))
	if err == nil {
		err = errors.Join(f.Sync(), f.Close())
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

func (o *settled) add(f Finding) { o.findings = append(o.findings, f) }

// listNames lists a bookkeeping directory; one that is missing is empty.
func listNames(path string) ([]string, error) {
	f, err := openFile(path, unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
