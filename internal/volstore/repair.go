package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// FindingKind says what is odd about a home. The texts are stable.
type FindingKind string

// What can be found. The first group is mended by the next mutating command
// anyway; the second needs a decision.
const (
	FoundStaging   FindingKind = "unfinished-creation"
	FoundTombstone FindingKind = "unfinished-removal"
	FoundMove      FindingKind = "unfinished-rename"
	FoundTrash     FindingKind = "trash"
	FoundState     FindingKind = "missing-state"
	FoundResize    FindingKind = "unfinished-resize" // an image is longer than its record says

	FoundStranger FindingKind = "stranger"     // a directory that belongs to no volume
	FoundMissing  FindingKind = "missing-data" // a volume without its directory
	FoundForeign  FindingKind = "foreign-data" // a volume whose directory was replaced
	FoundOrphan   FindingKind = "orphan-state" // bookkeeping of a volume without a record
	FoundImage    FindingKind = "bad-image"    // a disk volume whose image is missing, cut off, or no file
	FoundRecord   FindingKind = "bad-record"   // a record that somebody has edited, without a copy
)

// Finding is one thing found. Action says what was done about it, Detail what
// can be done.
type Finding struct {
	Kind   FindingKind `json:"kind"`
	Name   string      `json:"name,omitempty"`
	ID     string      `json:"id,omitempty"`
	Path   string      `json:"path,omitempty"`
	Detail string      `json:"detail,omitempty"`
	Action string      `json:"action,omitempty"`

	err error // why nothing could be done about what is ours to mend
}

// Check looks at the whole home and changes nothing.
func (s *Store) Check(ctx context.Context) ([]Finding, error) {
	db, done, err := s.records(ctx, false)
	if err != nil {
		return nil, err
	}
	defer done()
	all, damaged, err := listAll(ctx, db)
	if err != nil {
		return nil, err
	}
	tombs, err := db.Tombstones(ctx)
	if err != nil {
		return nil, err
	}
	out, err := s.checkStrangers(all, damaged, tombs)
	if err != nil {
		return nil, s.wrap("check", "", err)
	}
	known := map[string]bool{}
	for _, r := range all {
		known[r.ID] = true
		out = append(out, s.checkVolume(r)...)
	}
	for _, t := range tombs {
		known[t.ID] = true
	}
	for _, r := range damaged {
		known[r.ID] = true
		out = append(out, s.damagedFinding(r))
	}
	more, err := s.checkBookkeeping(known)
	return append(out, more...), s.wrap("check", "", err)
}

// listAll is ListVolumes with the damaged records apart.
func listAll(ctx context.Context, db *records.DB) (all []*records.Volume, damaged records.DamagedRows, err error) {
	all, err = db.ListVolumes(ctx)
	if errors.As(err, &damaged) {
		err = nil
	}
	return all, damaged, err
}

func (s *Store) damagedFinding(r records.DamagedRow) Finding {
	f := Finding{Kind: FoundRecord, Name: r.Name, ID: r.ID, Path: s.home.Volume(r.Name), Detail: "its record is damaged (" + r.Err.Error() + "): "}
	if _, err := s.copyOf(r); err != nil {
		f.Detail += fmt.Sprintf("there is no copy of it (%v); put a copy of %s back", err, s.home.DB())
	} else {
		f.Detail += "msb volume repair restores it from its copy"
	}
	return f
}

// copyOf reads the copy of a damaged record.
func (s *Store) copyOf(r records.DamagedRow) (*records.Volume, error) {
	v, err := readNote(filepath.Join(s.home.State(r.ID), noteName))
	if err == nil && v.ID != r.ID {
		err = fmt.Errorf("%s is that of volume %s", noteName, v.ID)
	}
	return v, err
}

// restoreRecord replaces a damaged record by its copy.
func (s *Store) restoreRecord(ctx context.Context, db *records.DB, r records.DamagedRow) (*Finding, error) {
	lock, err := s.lockNames(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	if _, err := db.VolumeByID(ctx, r.ID); !errors.As(err, new(records.DamagedRows)) {
		return nil, nil // somebody was faster
	}
	v, err := s.copyOf(r)
	if err != nil {
		return nil, nil // Check says so
	}
	if err := db.RestoreVolume(ctx, v); err != nil {
		return nil, err
	}
	return &Finding{Kind: FoundRecord, Name: r.Name, ID: r.ID, Path: s.home.Volume(r.Name), Action: "restored its damaged record from the copy"}, nil
}

func (s *Store) checkVolume(r *records.Volume) (out []Finding) {
	f := Finding{Name: r.Name, ID: r.ID, Path: s.home.Volume(r.Name)}
	id, ok, err := identityAt(f.Path)
	switch {
	case r.MovingFrom != "":
		f.Kind = FoundMove
		out = append(out, f)
	case err != nil:
		f.Kind, f.Detail = FoundMissing, err.Error()
		out = append(out, f)
	case !ok:
		f.Kind, f.Detail = FoundMissing, missingHint(f.Path)
		out = append(out, f)
	case !id.Same(r.Identity):
		f.Kind, f.Detail = FoundForeign, "if it was restored from a backup: msb volume adopt "+r.Name
		out = append(out, f)
	case r.Kind == KindDisk:
		out = append(out, s.findImage(r)...)
	}
	if !exists(filepath.Join(s.home.State(r.ID), noteName)) {
		out = append(out, Finding{Kind: FoundState, Name: r.Name, ID: r.ID, Path: s.home.State(r.ID)})
	}
	return out
}

// findImage looks at the image of a disk volume whose directory is there.
func (s *Store) findImage(r *records.Volume) []Finding {
	v := s.volume(r)
	f := Finding{Kind: FoundImage, Name: r.Name, ID: r.ID, Path: v.DiskPath}
	length, wrong := imageLength(v)
	switch {
	case wrong != nil:
		f.Detail = wrong.Error() + ": " + wrong.Hint
		return []Finding{f}
	case length > r.CapacityBytes:
		if holders, err := s.Holders(context.Background(), r.ID); err == nil && len(holders) > 0 {
			return nil // being resized
		}
		f.Kind = FoundResize
		return []Finding{f}
	}
	return nil
}

func (s *Store) checkStrangers(all []*records.Volume, damaged records.DamagedRows, tombs []records.Tombstone) (out []Finding, err error) {
	ours := map[string]bool{}
	for _, r := range damaged {
		ours[r.Name] = true
	}
	for _, r := range all {
		ours[r.Name] = true
		ours[r.MovingFrom] = true
	}
	staged, err := s.stagedNames()
	if err != nil {
		return nil, err
	}
	names, err := listNames(s.home.Volumes())
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		if strings.HasPrefix(name, ".") || ours[name] {
			continue
		}
		f := Finding{Kind: FoundStranger, Name: name, Path: s.home.Volume(name)}
		f.Detail = strangerHint(name, f.Path)
		if id, ok, err := identityAt(f.Path); err == nil && ok && id.Same(staged[name]) {
			continue // found among the stagings
		}
		if t := s.removedAt(name, tombs); t != nil {
			f.Kind, f.ID, f.Detail = FoundTombstone, t.ID, ""
		}
		out = append(out, f)
	}
	return out, nil
}

// stagedNames returns the identities of data that has its name already but no
// record yet.
func (s *Store) stagedNames() (map[string]records.Identity, error) {
	ids, err := listNames(s.home.Staging())
	if err != nil {
		return nil, err
	}
	out := map[string]records.Identity{}
	for _, id := range ids {
		path := filepath.Join(s.home.Staging(), id)
		if r, err := readNote(filepath.Join(path, noteName)); err == nil && !exists(filepath.Join(path, dataName)) {
			out[r.Name] = r.Identity
		}
	}
	return out, nil
}

// removedAt returns the tombstone of what lies at a name. Removed data that
// somebody has moved to another name is a stranger's by now.
func (s *Store) removedAt(name string, tombs []records.Tombstone) *records.Tombstone {
	id, ok, err := identityAt(s.home.Volume(name))
	for i := range tombs {
		if err == nil && ok && tombs[i].Name == name && id.Same(tombs[i].Identity) {
			return &tombs[i]
		}
	}
	return nil
}

// checkBookkeeping looks for remainders in the hidden directories. Staging that
// is locked belongs to a living maker.
func (s *Store) checkBookkeeping(known map[string]bool) (out []Finding, err error) {
	for _, in := range []struct {
		dir  string
		kind FindingKind
	}{{s.home.Staging(), FoundStaging}, {s.home.Trash(), FoundTrash}, {s.home.States(), FoundOrphan}} {
		dir, kind := in.dir, in.kind
		ids, err := listNames(dir)
		if err != nil {
			return nil, err
		}
		slices.Sort(ids)
		for _, id := range ids {
			f := Finding{Kind: kind, ID: id, Path: filepath.Join(dir, id)}
			switch _, grows := isGrowMark(id); {
			case kind == FoundOrphan && known[id], kind == FoundStaging && grows, kind != FoundOrphan && busy(f.Path):
				continue
			case kind == FoundStaging && !isDir(f.Path):
				f.ID, f.Detail = "", "it belongs to nothing: delete it"
			case kind == FoundOrphan:
				f.Detail = orphanHint(f.Path)
			}
			if r, err := readNote(filepath.Join(f.Path, noteName)); err == nil {
				f.Name = r.Name
			}
			out = append(out, f)
		}
	}
	return out, nil
}

// busy reports whether somebody holds the lock of a staging or trash directory,
// or it is gone.
func busy(path string) bool {
	f, err := lockDir(path)
	if f != nil {
		unlock(f)
	}
	return err == nil && f == nil && (isDir(path) || !exists(path))
}

func isDir(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.IsDir()
}

// Repair does at once, for all names, what mutating commands do by and by, and
// looks at everything afterwards. Nothing is deleted that is not ours. The
// result holds what was done (Action) and what is left to decide (Detail).
func (s *Store) Repair(ctx context.Context) ([]Finding, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, err
	}
	defer done()
	lock := &nameLock{s: s} // no name of its own: every free one is settled
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return nil, s.wrap("repair", "", err)
	}
	if wait := begin(found.forgettable(s)); wait() == nil {
		if err := db.DropTombstones(ctx, found.tombstones...); err != nil {
			return nil, err
		}
	}
	all, damaged, err := listAll(ctx, db)
	if err != nil {
		return nil, err
	}
	var errs []error
	note := func(name string, f *Finding, err error) {
		if err != nil {
			errs = append(errs, s.wrap("repair", name, err))
		} else if f != nil {
			found.add(*f)
		}
	}
	for _, r := range damaged {
		f, err := s.restoreRecord(ctx, db, r)
		note(r.Name, f, err)
	}
	if len(damaged) > 0 {
		if all, _, err = listAll(ctx, db); err != nil {
			return nil, err
		}
	}
	for _, r := range all {
		f, err := s.mendLength(ctx, r)
		note(r.Name, f, err)
		note(r.Name, nil, s.mendState(ctx, db, r, found))
	}
	left, err := s.Check(ctx)
	for _, f := range found.findings {
		errs = append(errs, f.err)
	}
	return append(found.findings, withoutSeen(left, found.findings)...), errors.Join(append(errs, err)...)
}

// mendState has the state directory of a volume made anew where it is missing.
func (s *Store) mendState(ctx context.Context, db *records.DB, r *records.Volume, found *settled) error {
	if exists(filepath.Join(s.home.State(r.ID), noteName)) {
		return nil
	}
	lock, _, more, err := s.lockVolume(ctx, db, r)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		return nil
	}
	if err == nil {
		lock.unlock()
		found.findings = append(found.findings, more.findings...)
	}
	return err
}

// withoutSeen leaves out what was reported with what was done about it.
func withoutSeen(left, seen []Finding) []Finding {
	return slices.DeleteFunc(left, func(f Finding) bool {
		return slices.ContainsFunc(seen, func(s Finding) bool { return s.Kind == f.Kind && s.Path == f.Path })
	})
}
