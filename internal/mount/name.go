package mount

import (
	"errors"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// checkVolumeName applies the rules of volume names.
func checkVolumeName(s *Spec) error {
	if err := volstore.ValidateName(s.Source); err != nil {
		return at(s, err)
	}
	return nil
}

// checkVolumeSpec lets volstore judge a volume that may be made, so that names,
// sizes and labels have one set of rules. A disk volume may be without a size:
// with ensure-exists it may be there.
func checkVolumeSpec(s *Spec) error {
	v := s.volumeSpec()
	if v.Kind == VolumeDisk && v.SizeMiB == 0 {
		v.SizeMiB = diskimg.MinSizeMiB
	}
	if err := v.Validate(); err != nil {
		return at(s, err)
	}
	return nil
}

// volumeSpec is the volume that the mount may make.
func (s *Spec) volumeSpec() volstore.Spec {
	return volstore.Spec{
		Name:     s.Source,
		Kind:     normalVolumeKind(s.Named.Kind),
		QuotaMiB: s.Named.QuotaMiB,
		SizeMiB:  s.Named.SizeMiB,
		Labels:   s.Named.Labels,
	}
}

// at says which mount an error belongs to. Kind and hint stay.
func at(s *Spec, err error) error {
	var e *errdefs.Error
	if !errors.As(err, &e) {
		return errdefs.Wrap(errdefs.IO, err, "%s", s)
	}
	outer := errdefs.Wrap(e.Kind, err, "%s", s)
	outer.Hint = e.Hint
	return outer
}
