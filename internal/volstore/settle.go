package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

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
	tombstones []string  // ids of removals that are complete and durable; for the next commit to forget
	recovered  []string  // ids of volumes whose creation was completed
	findings   []Finding // for repair

	records map[string]*records.Volume // of the locked names that are taken
}

// settle finishes or undoes what killed processes left, for the names in lock
// and for all whose lock is free. Trouble with other names is not an error: a
// later command meets it again.
func (s *Store) settle(ctx context.Context, db *records.DB, lock *nameLock) (*settled, error) {
	ctx = context.WithoutCancel(ctx)
	out := &settled{records: map[string]*records.Volume{}}
	if err := s.settleStagings(ctx, db, lock, out); err != nil {
		return nil, err
	}
	tombstones, moving, err := db.Unsettled(ctx)
	if err != nil {
		return nil, err
	}
	if tombstones > 0 {
		if err := s.settleTombstones(ctx, db, lock, out); err != nil {
			return nil, err
		}
	}
	if moving > 0 {
		if err := s.settleMoves(ctx, db, lock, out); err != nil {
			return nil, err
		}
	}
	for _, name := range lock.names {
		if err := s.settleState(ctx, db, name, out); err != nil {
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
	r, err := readNote(filepath.Join(path, noteName))
	if err != nil || r.ID != id || exists(filepath.Join(path, dataName)) {
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

// settleRenamed deals with a staging directory whose data was renamed, or was
// never in it (adopt). Its name is locked.
func (s *Store) settleRenamed(ctx context.Context, db *records.DB, st *staging, out *settled) error {
	r := &st.record
	_, err := db.VolumeByID(ctx, r.ID)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		id, ok, err := identityAt(s.home.Volume(r.Name))
		removed := false
		if err == nil {
			removed, err = wasRemoved(ctx, db, r.ID)
		}
		if err != nil {
			st.done = true
			return err
		}
		ours := ok && id.Same(r.Identity) && !removed
		if ours {
			err = db.InsertVolume(ctx, r)
			ours = !errdefs.Is(err, errdefs.VolumeAlreadyExists)
		}
		if !ours {
			out.add(Finding{Kind: FoundStaging, ID: r.ID, Name: r.Name, Path: st.path, Action: "dropped an undone creation"})
			return nil
		}
		if err != nil {
			st.done = true
			return err
		}
		if err := pointRecovered.Hit(); err != nil {
			st.done = true
			return err
		}
		out.recovered = append(out.recovered, r.ID)
		out.add(Finding{Kind: FoundStaging, ID: r.ID, Name: r.Name, Path: st.path, Action: "completed an interrupted creation"})
	} else if err != nil {
		st.done = true
		return err
	}
	st.done = true
	if err := renameNew(st.path, s.home.State(r.ID)); errors.Is(err, fs.ErrExist) {
		st.done = false // published before: this is a remainder
	}
	return nil
}

// wasRemoved reports whether a volume without a record had one. Its staging
// directory may have come back: after a power cut the commit of its removal may
// stand without the rename that ended its creation, which nobody synced.
func wasRemoved(ctx context.Context, db *records.DB, id string) (bool, error) {
	tombs, err := db.Tombstones(ctx)
	return slices.ContainsFunc(tombs, func(t records.Tombstone) bool { return t.ID == id }), err
}

// settleTombstones finishes removals: whatever still lies at the name or in
// .state goes to the trash.
func (s *Store) settleTombstones(ctx context.Context, db *records.DB, lock *nameLock, out *settled) error {
	tombs, err := db.Tombstones(ctx)
	if err != nil || len(tombs) == 0 {
		return err
	}
	for _, t := range tombs {
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
	wait := begin(func() error { return syncDir(s.home.Trash()) })
	if err := errors.Join(syncDir(s.home.Volumes()), wait()); err != nil {
		out.tombstones = nil // they stay until the removal is durable
	}
	return pointCleared.Hit()
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
			to := r.Name
			err = s.finishMove(ctx, db, r)
			releaseFrom()
			if errdefs.Is(err, errdefs.VolumeAlreadyExists) {
				releaseTo()
				out.add(Finding{Kind: FoundMove, ID: r.ID, Name: r.Name, Path: s.home.Volume(r.Name), Action: "gave up an interrupted rename to " + to + ", where a stranger is"})
				continue
			}
		}
		releaseTo()
		if err != nil && (slices.Contains(lock.names, r.Name) || slices.Contains(lock.names, r.MovingFrom)) {
			return err
		}
		if ok && err == nil {
			out.add(Finding{Kind: FoundMove, ID: r.ID, Name: r.Name, Path: s.home.Volume(r.Name), Action: "completed an interrupted rename from " + r.MovingFrom})
		}
	}
	return nil
}

// settleState writes a missing state directory of the volume with a locked name
// anew (a power cut may have taken it), and brings its note up to date.
func (s *Store) settleState(ctx context.Context, db *records.DB, name string, out *settled) error {
	r, err := db.VolumeByName(ctx, name)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	out.records[name] = r
	mended, err := s.ensureState(r)
	if mended {
		out.add(Finding{Kind: FoundState, ID: r.ID, Name: r.Name, Path: s.home.State(r.ID), Action: "wrote the state directory anew"})
	}
	return err
}

// ensureState makes what is missing of a state directory. The name is locked.
func (s *Store) ensureState(r *records.Volume) (mended bool, err error) {
	dir := s.home.State(r.ID)
	if err := os.Mkdir(dir, 0o700); err == nil {
		mended = true
	} else if !errors.Is(err, fs.ErrExist) {
		return false, err
	}
	for _, name := range []string{attachName, aliveName} {
		if path := filepath.Join(dir, name); !exists(path) {
			mended = true
			if err := touch(path); err != nil {
				return mended, err
			}
		}
	}
	want := encodeNote(r)
	have, stale := os.ReadFile(filepath.Join(dir, noteName))
	if stale == nil && string(have) == string(want) {
		return mended, nil
	}
	if err := s.writeNote(r); err != nil {
		if stale == nil && noRoom(err) {
			return mended, nil // an old note keeps nobody from anything; a later command writes it
		}
		return true, err
	}
	return true, nil
}

// writeNote replaces volume.json of a published volume.
func (s *Store) writeNote(r *records.Volume) error {
	path := filepath.Join(s.home.State(r.ID), noteName)
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := writeNew(tmp, encodeNote(r), true)
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
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}
