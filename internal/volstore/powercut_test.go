package volstore

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestRemovedStaysRemoved: the rename that ends a creation is not synced, so a
// power cut may undo it after the removal of that volume was committed. The
// volume does not come back.
func TestRemovedStaysRemoved(t *testing.T) {
	ctx, h := context.Background(), home.Dir(t.TempDir())
	s := New(h)
	t.Cleanup(func() { s.Close() })
	v, err := s.Create(ctx, Spec{Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	disarm := failpoint.Arm("volstore.remove.recorded", func() error { return errors.New("power cut") })
	err = s.Remove(ctx, "a")
	disarm()
	if err == nil {
		t.Fatal("the removal was not interrupted")
	}
	if err := os.Rename(h.State(v.ID), h.Staging()+"/"+v.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(ctx, Spec{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, "a"); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("Get = %v, want VolumeNotFound", err)
	}
	if _, err := s.Create(ctx, Spec{Name: "a"}); err != nil {
		t.Errorf("create it again: %v", err)
	}
	if found, err := s.Check(ctx); err != nil || len(found) != 0 {
		t.Errorf("Check = %+v, %v", found, err)
	}
}
