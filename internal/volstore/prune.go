package volstore

import (
	"context"
	"errors"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// ProtectLabel is the label key that keeps a volume from being pruned.
const ProtectLabel = "protect"

// PruneFilter selects what Prune removes: all conditions that are set must
// hold. The zero value selects every volume.
type PruneFilter struct {
	Filter
	Kind   string    // KindDir or KindDisk; "" is both
	Before time.Time // created before; zero is any time
	DryRun bool      // say what would happen, remove nothing
}

// Pruned is what Prune did with one volume that its filter selected.
type Pruned struct {
	Volume *Volume
	// Kept says why the volume stays; "" when it was removed, or would be, or
	// when the removal failed.
	Kept string
	// Err names the holders of a volume in use; without Kept it is why the
	// removal failed.
	Err error
}

// Reasons of Pruned.Kept.
const (
	KeptProtected = "protected"
	KeptInUse     = "in use"
)

// errUnwanted says that a volume no longer is what a filter selects.
var errUnwanted = errors.New("not selected any more")

// matches tells whether a record is selected, whatever its protection.
func (f *PruneFilter) matches(r *records.Volume) bool {
	return f.Filter.matches(r) && (f.Kind == "" || r.Kind == f.Kind) &&
		(f.Before.IsZero() || r.CreatedAt.Before(f.Before))
}

func protected(r *records.Volume) bool {
	_, ok := r.Labels[ProtectLabel]
	return ok
}

// Prune removes the volumes that f selects, but never one that is attached or
// has a label ProtectLabel when it is looked at under its lock. It goes on after
// a failure. Errors: Cancelled and what List returns; those of single volumes
// are in the result.
func (s *Store) Prune(ctx context.Context, f PruneFilter) ([]Pruned, error) {
	all, err := s.List(ctx, f.Filter)
	if err != nil {
		return nil, err
	}
	var out []Pruned
	for _, v := range all {
		if !f.matches(&v.Volume) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return out, s.wrap("prune", v.Name, err)
		}
		p, gone := s.pruneOne(ctx, v, &f)
		if !gone {
			out = append(out, p)
		}
	}
	return out, nil
}

// pruneOne removes one volume; gone tells that somebody else was faster, or
// changed it so that it is not selected any more.
func (s *Store) pruneOne(ctx context.Context, v *Volume, f *PruneFilter) (p Pruned, gone bool) {
	p.Volume = v
	if protected(&v.Volume) {
		p.Kept = KeptProtected
		return p, false
	}
	if f.DryRun {
		if holders, err := s.Holders(ctx, v.ID); err == nil && len(holders) > 0 {
			p.Kept, p.Err = KeptInUse, inUse(v.Name, holders)
		}
		return p, false
	}
	err := s.pruneNow(ctx, v, f)
	switch {
	case errdefs.Is(err, errdefs.VolumeNotFound), errors.Is(err, errUnwanted):
		return p, true
	case errors.Is(err, errdefs.ErrVolumeInUse):
		p.Kept, p.Err = KeptInUse, err
	default:
		p.Err = err
	}
	return p, false
}

func (s *Store) pruneNow(ctx context.Context, v *Volume, f *PruneFilter) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return s.wrap("prune", v.Name, err)
	}
	defer done()
	wanted := func(r *records.Volume) bool { return f.matches(r) && !protected(r) }
	return s.wrap("prune", v.Name, s.removeIf(ctx, db, &v.Volume, wanted))
}
