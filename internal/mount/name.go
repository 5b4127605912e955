package mount

import (
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func checkVolumeName(s *Spec) error {
	if s.Source == "" || strings.ContainsAny(s.Source, "/ ") {
		return errdefs.New(errdefs.InvalidConfig, "%s: volume name %q", s, s.Source)
	}
	return nil
}

func checkLabels(*Spec) error { return nil }
