package volstore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

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

// TestUndoneRename: a power cut may undo the rename that gave a volume's data
// its name, though the record stands. The data is found where it was made, also
// by who may not write, and every changing call puts it back.
func TestUndoneRename(t *testing.T) {
	ctx := context.Background()
	id := func(t *testing.T, s *Store) string {
		t.Helper()
		v, err := s.Get(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		return v.ID
	}
	for name, call := range map[string]func(t *testing.T, s *Store) error{
		"open": func(t *testing.T, s *Store) error {
			d, err := s.OpenData(ctx, id(t, s))
			if err == nil {
				defer d.Close()
				err = unix.Faccessat(int(d.Dir.Fd()), marker, unix.R_OK, 0)
			}
			return err
		},
		"attach": func(t *testing.T, s *Store) error {
			a, err := s.Attach(ctx, "a", Shared, Holder{})
			if err == nil {
				_, err = os.Stat(filepath.Join(a.Volume.Path, marker))
				err = errors.Join(err, a.Close())
			}
			return err
		},
		"check": func(t *testing.T, s *Store) error {
			found, err := s.Check(ctx)
			if len(found) != 2 || found[0].Kind != FoundState || found[1].Kind != FoundStaging {
				t.Errorf("Check = %+v", found)
			}
			return err
		},
		"remove": func(_ *testing.T, s *Store) error { return s.Remove(ctx, "a") },
		"rename": func(_ *testing.T, s *Store) error { _, err := s.Rename(ctx, "a", "b"); return err },
		"create": func(_ *testing.T, s *Store) error {
			_, err := s.Create(ctx, Spec{Name: "a"})
			return ignore(err, errdefs.VolumeAlreadyExists)
		},
		"create other": func(_ *testing.T, s *Store) error { _, err := s.Create(ctx, Spec{Name: "b"}); return err },
		"repair":       func(_ *testing.T, s *Store) error { _, err := s.Repair(ctx); return err },
	} {
		for _, where := range []string{"staging", "state"} {
			if name == "check" && where == "state" {
				continue // nothing is odd but the place
			}
			t.Run(name+", in "+where, func(t *testing.T) {
				h := home.Dir(t.TempDir())
				s := New(h)
				t.Cleanup(func() { s.Close() })
				v := mustCreate(t, s, Spec{Name: "a"})
				writeMarker(t, v.Path)
				undoRename(t, s, h, "a")
				if where == "state" {
					if err := os.Rename(filepath.Join(h.Staging(), v.ID), h.State(v.ID)); err != nil {
						t.Fatal(err)
					}
				}
				if err := call(t, s); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Create(ctx, Spec{Name: "next"}); err != nil {
					t.Fatal(err)
				}
				if now, err := s.GetByID(ctx, v.ID); err == nil {
					if _, err := s.SetLabels(ctx, v.ID, map[string]string{"k": "v"}); err != nil {
						t.Error(err)
					}
					if _, err := os.Stat(filepath.Join(now.Path, marker)); err != nil {
						t.Error(err)
					}
				} else if name != "remove" {
					t.Error(err)
				}
				if found, err := s.Check(ctx); err != nil || len(found) != 0 {
					t.Errorf("Check = %+v, %v", found, err)
				}
			})
		}
	}
}
