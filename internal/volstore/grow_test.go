package volstore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// sizes are the three places that know how large a disk volume is, in MiB.
func sizes(t *testing.T, s *Store, name string) [3]int64 {
	t.Helper()
	v, err := s.Get(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(v.DiskPath)
	if err != nil {
		t.Fatal(err)
	}
	n, err := readNote(filepath.Join(s.home.State(v.ID), noteName))
	if err != nil {
		t.Fatal(err)
	}
	return [3]int64{v.CapacityBytes / mib, fi.Size() / mib, n.CapacityBytes / mib}
}

func TestGrow(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	ctx := t.Context()
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	mustCreate(t, s, Spec{Name: "dir"})
	before, err := os.ReadFile(v.DiskPath)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		volume string
		size   uint32
		want   errdefs.Kind
	}{
		"directory": {"dir", 8, errdefs.InvalidConfig}, "smaller": {"d", 3, errdefs.InvalidConfig},
		"nobody": {"x", 8, errdefs.VolumeNotFound}, "more than inode numbers": {"d", 17 << 20, errdefs.InvalidConfig},
	} {
		if _, err := s.Grow(ctx, tt.volume, tt.size); !errdefs.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v, err := s.Grow(ctx, "d", 4); err != nil || v.CapacityBytes != 4*mib {
		t.Errorf("to the present size: %+v, %v", v, err)
	}
	if got := sizes(t, s, "d"); got != [3]int64{4, 4, 4} {
		t.Errorf("sizes %v", got)
	}
	if v, err := s.Grow(ctx, "d", 8); err != nil || v.CapacityBytes != 8*mib {
		t.Errorf("grow: %+v, %v", v, err)
	}
	if got := sizes(t, s, "d"); got != [3]int64{8, 8, 8} {
		t.Errorf("grown: sizes %v", got)
	}
	after, err := os.ReadFile(v.DiskPath)
	if err != nil || !bytes.Equal(after[:len(before)], before) || len(bytes.TrimLeft(after[len(before):], "\x00")) > 0 {
		t.Errorf("the image changed beyond its length: %v", err)
	}
	if !exists(s.cleanMark(&v.Volume)) {
		t.Error("growing took the clean mark away")
	}
}

// TestGrowAttached: the space of an attached volume stays as it is, and the
// error says who has it.
func TestGrowAttached(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	for _, h := range []Holder{{Sandbox: "box", PID: os.Getpid()}, {Sandbox: "box", PID: os.Getpid(), Readonly: true}} {
		a, err := s.Attach(t.Context(), "d", Shared, h)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Grow(t.Context(), "d", 8)
		if !errors.Is(err, errdefs.ErrVolumeInUse) || !errdefs.Is(err, errdefs.InvalidConfig) || !strings.Contains(err.Error(), `sandbox "box"`) {
			t.Errorf("attached by %s: %v", h, err)
		}
		if err := errors.Join(a.MarkClean(), a.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if got := sizes(t, s, "d"); got != [3]int64{4, 4, 4} {
		t.Errorf("sizes %v", got)
	}
}

// TestGrowFails: an error between the two steps leaves the volume as it was.
func TestGrowFails(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	disarm := failpoint.Arm("volstore.grow.lengthened", func() error { return errors.New("no") })
	_, err := s.Grow(t.Context(), "d", 8)
	disarm()
	if err == nil {
		t.Error("no error")
	}
	if got := sizes(t, s, "d"); got != [3]int64{4, 4, 4} {
		t.Errorf("after a failure: sizes %v", got)
	}
	// Cancelled after the first step it is carried out.
	ctx, cancel := context.WithCancel(t.Context())
	disarm = failpoint.Arm("volstore.grow.lengthened", func() error { cancel(); return nil })
	v, err := s.Grow(ctx, "d", 8)
	disarm()
	if err != nil || v.CapacityBytes != 8*mib {
		t.Errorf("cancelled: %+v, %v", v, err)
	}
}

// TestLongerImageIsRecorded: who attaches an image that a killed Grow, or
// somebody, made longer first records its length, a reader too.
func TestLongerImageIsRecorded(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	for i, readonly := range []bool{true, false} {
		size := int64(8 << i)
		if err := os.Truncate(v.DiskPath, size*mib); err != nil {
			t.Fatal(err)
		}
		a, err := s.Attach(t.Context(), "d", Exclusive, Holder{PID: os.Getpid(), Readonly: readonly})
		if err != nil {
			t.Fatal(err)
		}
		if a.Volume.CapacityBytes != size*mib {
			t.Errorf("readonly %t: attached %d", readonly, a.Volume.CapacityBytes)
		}
		if err := errors.Join(a.MarkClean(), a.Close()); err != nil {
			t.Fatal(err)
		}
		if got := sizes(t, s, "d"); got[0] != size {
			t.Errorf("readonly %t: sizes %v", readonly, got)
		}
	}
	// A killed Grow to 8 of what is 16 now.
	if _, err := s.Grow(t.Context(), "d", 8); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("smaller: %v", err)
	}
}
