package volstore

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestFullDiskNamesVolume: whoever runs out of space, the error says what was to
// be done with which volume.
func TestFullDiskNamesVolume(t *testing.T) {
	s := New(home.Dir("/h"))
	for name, err := range map[string]error{
		"plain":   unix.ENOSPC,
		"mkfs":    errdefs.Wrap(errdefs.IO, unix.ENOSPC, "format the disk image"),
		"records": errdefs.Wrap(errdefs.IO, unix.ENOSPC, "change the record"),
	} {
		got := s.wrap("create", "data", err)
		if !strings.HasPrefix(got.Error(), `create volume "data": no space left in /h`) || !errors.Is(got, unix.ENOSPC) || !errdefs.Is(got, errdefs.IO) {
			t.Errorf("%s: %v", name, got)
		}
	}
	if got := s.wrap("create", "data", errdefs.New(errdefs.InvalidConfig, "no")); got.Error() != "no" {
		t.Errorf("another error became %v", got)
	}
}
