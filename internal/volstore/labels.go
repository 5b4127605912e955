package volstore

import (
	"context"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var pointLabelled = failpoint.New("volstore.labels.recorded") // the record has the new labels

// SetLabels replaces the labels of the volume with this id; attached volumes too.
// Errors: VolumeNotFound, InvalidConfig, Cancelled, IO.
func (s *Store) SetLabels(ctx context.Context, id string, labels map[string]string) (*Volume, error) {
	if err := validateLabels(id, labels); err != nil {
		return nil, err
	}
	v, err := s.setLabels(ctx, id, labels)
	return v, s.wrap("label", id, err)
}

func (s *Store) setLabels(ctx context.Context, id string, labels map[string]string) (*Volume, error) {
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
