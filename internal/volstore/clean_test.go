package volstore

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// TestUncleanImageIsChecked: the check runs before the first attachment for
// writing after every end that was not marked clean, and only then.
func TestUncleanImageIsChecked(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	ctx := t.Context()
	checks, broken := 0, error(nil)
	checker := func(_ context.Context, got *Volume, image *os.File) error {
		checks++
		if got.ID != v.ID || image == nil {
			t.Errorf("checked %+v, %v", got, image)
		}
		return broken
	}
	attach := func(readonly bool) (*Attachment, error) {
		return s.Attach(ctx, "d", Exclusive, Holder{PID: os.Getpid(), Readonly: readonly})
	}
	use := func(readonly, clean bool, wantChecks int) {
		t.Helper()
		checks = 0
		a, err := attach(readonly)
		if err != nil {
			t.Fatal(err)
		}
		if clean {
			err = a.MarkClean()
		}
		if err := errors.Join(err, a.Close()); err != nil {
			t.Fatal(err)
		}
		if checks != wantChecks {
			t.Errorf("%d checks, want %d", checks, wantChecks)
		}
	}
	use(true, false, 0)  // new, and a reader does no harm
	use(false, false, 0) // new
	use(true, true, 0)   // a reader neither checks nor makes clean
	if _, err := attach(false); !errdefs.Is(err, errdefs.UnsupportedOperation) {
		t.Errorf("without a checker: %v", err)
	}
	s.SetChecker(checker)
	broken = errdefs.New(errdefs.Filesystem, "damaged")
	if _, err := attach(false); !errdefs.Is(err, errdefs.Filesystem) || checks != 1 {
		t.Errorf("damaged: %v, %d checks", err, checks)
	}
	broken = nil
	use(false, false, 1)
	use(false, true, 1)
	use(false, true, 0)
	use(false, false, 0)
	use(false, false, 1)
	if found, err := s.Check(ctx); err != nil || len(found) != 0 {
		t.Errorf("%+v, %v", found, err)
	}
}
