package volstore

import (
	"context"
	"maps"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var pointLabelled = failpoint.New("volstore.labels.recorded") // the record has the new labels

// SetLabels replaces the labels of the volume with this id; attached volumes too.
// Errors: VolumeNotFound, InvalidConfig, Cancelled, IO.
func (s *Store) SetLabels(ctx context.Context, id string, labels map[string]string) (*Volume, error) {
	if err := validateLabels(id, labels); err != nil {
		return nil, err
	}
	v, err := s.setLabels(ctx, id, func(map[string]string) map[string]string { return labels })
	return v, s.wrap("label", id, err)
}

// EditLabels sets some labels of the volume with this id and removes the keys in
// remove, in one step: editors of different keys do not undo each other.
// Errors as SetLabels.
func (s *Store) EditLabels(ctx context.Context, id string, set map[string]string, remove []string) (*Volume, error) {
	if err := validateLabels(id, set); err != nil {
		return nil, err
	}
	v, err := s.setLabels(ctx, id, func(old map[string]string) map[string]string {
		labels := map[string]string{}
		maps.Copy(labels, old)
		for _, key := range remove {
			delete(labels, key)
		}
		maps.Copy(labels, set)
		return labels
	})
	return v, s.wrap("label", id, err)
}

func (s *Store) setLabels(ctx context.Context, id string, edit func(old map[string]string) map[string]string) (*Volume, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := db.VolumeByID(ctx, id)
	if err != nil {
		return nil, err
	}
	lock, r, _, err := s.lockVolume(ctx, db, r)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	labels := edit(r.Labels)
	if err := db.SetVolumeLabels(ctx, id, r.Name, labels); err != nil {
		return nil, err
	}
	if err := pointLabelled.Hit(); err != nil {
		return nil, err
	}
	r.Labels = labels
	_, _ = s.ensureState(r) // the next command does it otherwise
	return s.volume(r), nil
}
