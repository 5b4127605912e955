package volstore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestDataFollowsItsVolumeOnly(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	v := mustCreate(t, s, Spec{Name: "a"})
	d, err := s.OpenData(ctx, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Alive(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rename(ctx, "a", "b"); err != nil {
		t.Fatal(err)
	}
	if err := d.Alive(); err != nil {
		t.Errorf("after rename: %v", err)
	}
	if err := s.Remove(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	w := mustCreate(t, s, Spec{Name: "b"})
	if err := d.Alive(); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("after removal: %v", err)
	}
	if _, err := s.OpenData(ctx, v.ID); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("OpenData after removal: %v", err)
	}
	if err := s.RemoveID(ctx, v.ID); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("RemoveID of the old id: %v", err)
	}
	if got, err := s.Get(ctx, "b"); err != nil || got.ID != w.ID {
		t.Errorf("the successor: %+v, %v", got, err)
	}
}

// TestAliveDuringAFailedRemoval: a removal that fails must leave open data alive.
func TestAliveDuringAFailedRemoval(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	d, err := s.OpenData(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	withPoint(t, "volstore.remove.marked", func() error {
		if err := d.Alive(); err != nil {
			t.Errorf("before the commit: %v", err)
		}
		return errors.New("stop")
	}, func() {
		if err := s.Remove(t.Context(), "a"); err == nil {
			t.Error("removed")
		}
	})
	for range 2 {
		if err := d.Alive(); err != nil {
			t.Errorf("after the failed removal: %v", err)
		}
	}
	withPoint(t, "volstore.remove.recorded", func() error {
		if err := d.Alive(); !errdefs.Is(err, errdefs.VolumeNotFound) {
			t.Errorf("right after the commit: %v", err)
		}
		return nil
	}, func() {
		if err := s.Remove(t.Context(), "a"); err != nil {
			t.Error(err)
		}
	})
}

// TestAliveAfterANewNote: alive is another name of the note, until that is
// replaced, or of attach, in volumes of before: handles from before and after
// know that the volume is there, by a look at alone, and when it is gone.
func TestAliveAfterANewNote(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, s *Store, v *Volume, state string){
		"new note": func(t *testing.T, s *Store, v *Volume, _ string) {
			if _, err := s.SetLabels(t.Context(), v.ID, map[string]string{"k": "v"}); err != nil {
				t.Fatal(err)
			}
		},
		"of before": func(t *testing.T, _ *Store, _ *Volume, state string) {
			alive, attach := filepath.Join(state, aliveName), filepath.Join(state, attachName)
			if err := errors.Join(touch(attach), os.Remove(alive), os.Link(attach, alive)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, h := newStore(t)
			v := mustCreate(t, s, Spec{Name: "a"})
			open := func() *Data {
				d, err := s.OpenData(t.Context(), v.ID)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { d.Close() })
				return d
			}
			handles := []*Data{open()}
			change(t, s, v, h.State(v.ID))
			handles = append(handles, open())
			for i, d := range handles {
				if err := d.Alive(); err != nil {
					t.Errorf("handle %d, before the removal: %v", i, err)
				}
				if f := d.alive.Load(); f == nil || linkCount(f.File) != f.names {
					t.Errorf("handle %d has to ask the records", i)
				}
			}
			if err := s.Remove(t.Context(), "a"); err != nil {
				t.Fatal(err)
			}
			for i, d := range handles {
				if err := d.Alive(); !errdefs.Is(err, errdefs.VolumeNotFound) {
					t.Errorf("handle %d, after the removal: %v", i, err)
				}
			}
		})
	}
}

func TestRename(t *testing.T) {
	s, h := newStore(t)
	ctx := t.Context()
	v := mustCreate(t, s, Spec{Name: "a", Labels: map[string]string{"k": "v"}})
	if err := os.WriteFile(filepath.Join(v.Path, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := s.Rename(ctx, "a", "b")
	if err != nil || w.ID != v.ID || w.Name != "b" || w.Path != h.Volume("b") || w.MovingFrom != "" {
		t.Fatalf("rename: %+v, %v", w, err)
	}
	if b, err := os.ReadFile(filepath.Join(w.Path, "f")); string(b) != "x" {
		t.Errorf("content: %q, %v", b, err)
	}
	if n, err := readNote(filepath.Join(h.State(v.ID), noteName)); err != nil || n.Name != "b" {
		t.Errorf("note: %+v, %v", n, err)
	}
	mustCreate(t, s, Spec{Name: "a"})
	if err := os.Mkdir(h.Volume("stranger"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		from, to string
		want     errdefs.Kind
	}{
		"to a volume": {"a", "b", errdefs.VolumeAlreadyExists}, "to a stranger": {"a", "stranger", errdefs.VolumeAlreadyExists},
		"of nothing": {"none", "c", errdefs.VolumeNotFound}, "to itself": {"a", "a", errdefs.InvalidConfig}, "to a bad name": {"a", "/", errdefs.InvalidConfig},
	} {
		if _, err := s.Rename(ctx, tt.from, tt.to); !errdefs.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSetLabels(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a", Labels: map[string]string{"old": "1"}})
	w, err := s.SetLabels(t.Context(), v.ID, map[string]string{"new": "2"})
	if err != nil || !cmp.Equal(w.Labels, map[string]string{"new": "2"}) {
		t.Errorf("%+v, %v", w, err)
	}
	if n, err := readNote(filepath.Join(h.State(v.ID), noteName)); err != nil || n.Labels["new"] != "2" {
		t.Errorf("note: %+v, %v", n, err)
	}
	if _, err := s.SetLabels(t.Context(), "nobody", nil); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("unknown id: %v", err)
	}
}

func TestPrune(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	ctx := t.Context()
	tmp := map[string]string{"tmp": "yes"}
	mustCreate(t, s, Spec{Name: "plain"})
	old := mustCreate(t, s, Spec{Name: "old", Labels: tmp})
	mustCreate(t, s, Spec{Name: "disk", Kind: KindDisk, SizeMiB: 4, Labels: tmp})
	mustCreate(t, s, Spec{Name: "kept", Labels: map[string]string{"tmp": "yes", ProtectLabel: ""}})
	mustCreate(t, s, Spec{Name: "held", Labels: tmp})
	a, err := s.Attach(ctx, "held", Shared, Holder{Sandbox: "box"})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	prune := func(f PruneFilter) string {
		t.Helper()
		got, err := s.Prune(ctx, f)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, p := range got {
			if (p.Err != nil) != (p.Kept == KeptInUse) {
				t.Errorf("%s: %v", p.Volume.Name, p.Err)
			}
			out = append(out, strings.TrimSuffix(p.Volume.Name+":"+p.Kept, ":"))
		}
		return strings.Join(out, " ")
	}
	want := "held:in use kept:protected disk old"
	if got := prune(PruneFilter{Filter: Filter{Labels: tmp}, DryRun: true}); got != want {
		t.Errorf("dry run: %q", got)
	}
	if got := prune(PruneFilter{Filter: Filter{Labels: tmp}, Kind: KindDisk, DryRun: true}); got != "disk" {
		t.Errorf("disks: %q", got)
	}
	if got := prune(PruneFilter{Before: old.CreatedAt.Add(time.Nanosecond), DryRun: true}); got != "old plain" {
		t.Errorf("before: %q", got)
	}
	if got := prune(PruneFilter{Filter: Filter{Labels: tmp}}); got != want {
		t.Errorf("prune: %q", got)
	}
	if got := prune(PruneFilter{DryRun: true}); got != "held:in use kept:protected plain" {
		t.Errorf("left: %q", got)
	}
}

func TestCancelledCreateLeavesNothing(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "other"})
	for _, point := range []string{"volstore.create.made", "volstore.create.staged", "volstore.create.locked"} {
		ctx, cancel := context.WithCancel(t.Context())
		withPoint(t, point, func() error { cancel(); return nil }, func() {
			if _, err := s.Create(ctx, Spec{Name: "a"}); !errdefs.Is(err, errdefs.Cancelled) {
				t.Errorf("%s: %v", point, err)
			}
		})
		if left, _ := listNames(h.Staging()); len(left) != 0 || exists(h.Volume("a")) {
			t.Errorf("%s: left %v", point, left)
		}
	}
}

func TestLockIsCancelled(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "x"})
	for name, other := range map[string]*Store{"in process": s, "between stores": New(h)} {
		lock, err := other.lockNames(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		if _, err := s.Create(ctx, Spec{Name: "a"}); !errdefs.Is(err, errdefs.Cancelled) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		lock.unlock()
		if len(s.names) != 0 {
			t.Errorf("%s: mutexes left: %v", name, s.names)
		}
	}
}

// TestRemoveNeverTakesASuccessor: a removal that waited for the lock acts on the
// volume it was called for.
func TestRemoveNeverTakesASuccessor(t *testing.T) {
	s, h := newStore(t)
	old := mustCreate(t, s, Spec{Name: "a"})
	other := New(h)
	defer other.Close()
	lock, err := other.lockNames(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var removed error
	wg.Go(func() { removed = s.Remove(t.Context(), "a") })
	for { // until the removal has read its record and waits
		s.mu.Lock()
		waiting := s.names["a"] != nil
		s.mu.Unlock()
		if waiting {
			break
		}
		time.Sleep(time.Millisecond)
	}
	db, done, err := other.records(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.removeLocked(t.Context(), db, &old.Volume, &settled{}); err != nil {
		t.Fatal(err)
	}
	done()
	st, err := other.stage(t.Context(), Spec{Name: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.publish(t.Context(), db, lock, st); err != nil {
		t.Fatal(err)
	}
	st.drop()
	lock.unlock()
	wg.Wait()
	if !errdefs.Is(removed, errdefs.VolumeNotFound) {
		t.Errorf("the removal that waited: %v", removed)
	}
	if v, err := s.Get(t.Context(), "a"); err != nil || v.ID == old.ID {
		t.Errorf("the successor: %+v, %v", v, err)
	}
}
