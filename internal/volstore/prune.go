package volstore

import (
	"context"
	"errors"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// ProtectLabel is the label key that keeps a volume from being pruned.
const ProtectLabel = "protect"

// PruneFilter selects what Prune removes: all conditions that are set must
// hold. The zero value selects every volume.
type PruneFilter struct {
	Labels map[string]string // all must be present with equal values
	Kind   string            // KindDir or KindDisk; "" is both
	Before time.Time         // created before; zero is any time
	DryRun bool              // say what would happen, remove nothing
}

// Pruned is what Prune did with one volume that its filter selected.
type Pruned struct {
	Volume *Volume
	// Kept says why the volume was not removed: "protected", "in use"; "" when it
	// was removed, or would be.
	Kept string
	Err  error // removal failed otherwise
}

// Prune removes the volumes that f selects, but never one that is attached or
// has a label ProtectLabel. It goes on after a failure. Errors: Cancelled and
// what List returns; those of single volumes are in the result.
func (s *Store) Prune(ctx context.Context, f PruneFilter) ([]Pruned, error) {
	all, err := s.List(ctx, Filter{Labels: f.Labels})
	if err != nil {
		return nil, err
	}
	var out []Pruned
	for _, v := range all {
		if (f.Kind != "" && v.Kind != f.Kind) || (!f.Before.IsZero() && !v.CreatedAt.Before(f.Before)) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return out, s.wrap("prune", v.Name, err)
		}
		p, gone := s.pruneOne(ctx, v, f.DryRun)
		if !gone {
			out = append(out, p)
		}
	}
	return out, nil
}

// pruneOne removes one volume; gone tells that somebody else was faster.
func (s *Store) pruneOne(ctx context.Context, v *Volume, dryRun bool) (p Pruned, gone bool) {
	p.Volume = v
	if _, ok := v.Labels[ProtectLabel]; ok {
		p.Kept = "protected"
		return p, false
	}
	if dryRun {
		if holders, err := s.Holders(ctx, v.ID); err == nil && len(holders) > 0 {
			p.Kept = "in use"
		}
		return p, false
	}
	err := s.RemoveID(ctx, v.ID)
	switch {
	case errdefs.Is(err, errdefs.VolumeNotFound):
		return p, true
	case errors.Is(err, errdefs.ErrVolumeInUse):
		p.Kept = "in use"
	default:
		p.Err = err
	}
	return p, false
}
