package home

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// TestUnusableHasAWayOut: a home that cannot be made says what to do.
func TestUnusableHasAWayOut(t *testing.T) {
	d := Dir(t.TempDir())
	if err := os.WriteFile(d.Volumes(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"file in the way": d.Ensure(), "read-only": &os.PathError{Op: "mkdir", Err: unix.EROFS},
		"not ours": os.ErrPermission, "full": unix.ENOSPC,
	} {
		var e *errdefs.Error
		if got := d.Unusable(err); err == nil || !errors.As(got, &e) || e.Hint == "" || !errors.Is(got, err) {
			t.Errorf("%s: %v", name, got)
		}
	}
	typed := errdefs.New(errdefs.InvalidConfig, "foreign").WithHint("hint")
	if got := d.Unusable(typed); got != error(typed) {
		t.Errorf("a typed error became %v", got)
	}
}
