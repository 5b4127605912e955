package microsandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// hold attaches a volume as the supervisor of sandbox "box" does.
func hold(t testing.TB, homeDir, name string) (release func()) {
	t.Helper()
	s := volstore.New(home.Dir(homeDir))
	a, err := s.Attach(t.Context(), name, volstore.Shared, volstore.Holder{Sandbox: "box", PID: os.Getpid()})
	check(t, err)
	return func() { check(t, errors.Join(a.Close(), s.Close())) }
}

// TestRenameVolume: a handle follows its volume, and never another one.
func TestRenameVolume(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "old", WithVolumeLabels(map[string]string{"a": "1"}))
	check(t, err)
	check(t, v.FS().WriteString(ctx, "f", "text"))
	h, err := GetVolume(ctx, "old")
	check(t, err)
	moved, err := h.Rename(ctx, "new")
	check(t, err)
	if got, err := moved.FS().ReadString(ctx, "f"); got != "text" || err != nil || moved.Labels()["a"] != "1" || moved.Local().ID != h.Local().ID {
		t.Errorf("renamed volume: %q, %v, %v", got, err, moved.Labels())
	}
	if got, err := v.FS().ReadString(ctx, "f"); got != "text" || err != nil {
		t.Errorf("handle from before: %q, %v", got, err)
	}
	_, err = CreateVolume(ctx, "old")
	check(t, err)
	again, err := h.Rename(ctx, "newer")
	check(t, err)
	if again.Local().ID != h.Local().ID {
		t.Error("the handle renamed a successor of the name")
	}
	_, err = RenameVolume(ctx, "old", "newer")
	wantErrKind(t, err, ErrVolumeAlreadyExists)
	_, err = RenameVolume(ctx, "none", "x")
	wantErrKind(t, err, ErrVolumeNotFound)
	check(t, again.Remove(ctx))
	_, err = h.Rename(ctx, "last")
	wantErrKind(t, err, ErrVolumeNotFound)
}

func TestUpdateLabels(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	_, err := CreateVolume(ctx, "v", WithVolumeLabels(map[string]string{"a": "1", "b": "2"}))
	check(t, err)
	h, err := GetVolume(ctx, "v")
	check(t, err)
	_, err = h.UpdateLabels(ctx, map[string]string{"c": "3"})
	check(t, err)
	// The handle's own, older labels do not come back.
	now, err := h.UpdateLabels(ctx, map[string]string{"b": "4"}, "a", "none")
	check(t, err)
	if l := now.Labels(); len(l) != 2 || l["b"] != "4" || l["c"] != "3" {
		t.Errorf("labels %v", l)
	}
}

func TestPruneVolumes(t *testing.T) {
	dir := useHome(t)
	ctx := t.Context()
	for name, labels := range map[string]map[string]string{"free": nil, "kept": {ProtectLabel: ""}, "held": nil} {
		_, err := CreateVolume(ctx, name, WithVolumeLabels(labels))
		check(t, err)
	}
	release := hold(t, dir, "held")
	h, err := GetVolume(ctx, "held")
	check(t, err)
	if hs, err := h.Holders(ctx); err != nil || len(hs) != 1 || hs[0].Sandbox != "box" || hs[0].PID != os.Getpid() || time.Since(hs[0].Since) > time.Hour {
		t.Errorf("holders %+v, %v", hs, err)
	}
	for _, dry := range []bool{true, false} {
		list, err := PruneVolumes(ctx, VolumePruneOptions{DryRun: dry})
		check(t, err)
		got := map[string]string{}
		for _, p := range list {
			got[p.Name] = p.Kept
			if (p.Kept == "in use") != errors.Is(p.Err, ErrVolumeInUse) {
				t.Errorf("%s: %v", p.Name, p.Err)
			}
		}
		if len(got) != 3 || got["free"] != "" || got["kept"] != "protected" || got["held"] != "in use" {
			t.Errorf("dry run %v: %v", dry, got)
		}
	}
	if _, err := GetVolume(ctx, "free"); !IsKind(err, ErrVolumeNotFound) {
		t.Errorf("free: %v", err)
	}
	release()
	if list, err := PruneVolumes(ctx, VolumePruneOptions{OlderThan: time.Hour}); err != nil || len(list) != 0 {
		t.Errorf("older than an hour: %+v, %v", list, err)
	}
}

func TestAdoptAndRepair(t *testing.T) {
	dir := useHome(t)
	ctx := t.Context()
	_, err := CreateVolume(ctx, "other")
	check(t, err)
	check(t, os.Mkdir(filepath.Join(dir, "volumes", "found"), 0o700))
	found, err := RepairVolumes(ctx)
	check(t, err)
	if len(found) != 1 || found[0].Kind != "stranger" || found[0].Name != "found" || found[0].Done() {
		t.Errorf("found %+v", found)
	}
	h, err := AdoptVolume(ctx, "found", VolumeAdoptOptions{QuotaMiB: 5, Labels: map[string]string{"k": "v"}})
	check(t, err)
	if h.Kind() != VolumeKindDir || *h.QuotaMiB() != 5 || h.Labels()["k"] != "v" {
		t.Errorf("adopted %+v", h.Local())
	}
	if found, err := CheckVolumes(ctx); err != nil || len(found) != 0 {
		t.Errorf("afterwards: %+v, %v", found, err)
	}
	_, err = AdoptVolume(ctx, "none", VolumeAdoptOptions{})
	wantErrKind(t, err, ErrVolumeNotFound)
}

func TestResizeVolume(t *testing.T) {
	needMkfs(t)
	useHome(t)
	ctx := t.Context()
	_, err := CreateVolumeFromSpec(ctx, VolumeSpec{Name: "d", Kind: VolumeKindDisk, SizeMiB: 8})
	check(t, err)
	_, err = ResizeVolume(ctx, "d", 4)
	wantErrKind(t, err, ErrInvalidConfig)
	for range 2 { // the second changes nothing
		h, err := ResizeVolume(ctx, "d", 16)
		check(t, err)
		fi, err := os.Stat(filepath.Join(h.Local().Path, "disk.raw"))
		check(t, err)
		if *h.CapacityBytes() != 16<<20 || fi.Size() != 16<<20 {
			t.Errorf("capacity %d, image of %d bytes", *h.CapacityBytes(), fi.Size())
		}
	}
}

// TestHoldersOfRemovedVolume: nobody holds a volume that is no more, and it is no
// volume that nobody holds; one that took its name does not matter.
func TestHoldersOfRemovedVolume(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	for _, attached := range []bool{false, true} {
		v, err := CreateVolume(ctx, "v")
		check(t, err)
		h, err := GetVolume(ctx, "v")
		check(t, err)
		if attached {
			hold(t, os.Getenv("MSB_HOME"), "v")()
		}
		if found, err := h.Holders(ctx); err != nil || len(found) != 0 {
			t.Errorf("%v, %v", found, err)
		}
		check(t, v.Remove(ctx))
		_, err = h.Holders(ctx)
		wantErrKind(t, err, ErrVolumeNotFound)
		again, err := CreateVolume(ctx, "v")
		check(t, err)
		_, err = h.Holders(ctx)
		wantErrKind(t, err, ErrVolumeNotFound)
		check(t, again.Remove(ctx))
	}
}

// TestErrorsNameTheVolume: a handle is bound to an id, and its errors say the name.
func TestErrorsNameTheVolume(t *testing.T) {
	dir := useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	h, err := GetVolume(ctx, "v")
	check(t, err)
	one := uint32(1)
	calls := map[string]func() error{
		"labels":  func() error { _, err := h.UpdateLabels(ctx, map[string]string{"a": "b"}); return err },
		"utf-8":   func() error { _, err := h.UpdateLabels(ctx, map[string]string{"\xff": "b"}); return err },
		"quota":   func() error { _, err := h.SetQuota(ctx, VolumeLimits{QuotaMiB: &one}); return err },
		"rename":  func() error { _, err := h.Rename(ctx, "w"); return err },
		"remove":  func() error { return v.Remove(ctx) },
		"replace": func() error { return h.SetLabels(ctx, nil) },
		"holders": func() error { _, err := h.Holders(ctx); return err },
	}
	// Nothing can be locked, nor anything be read of who holds the volume.
	check(t, os.RemoveAll(filepath.Join(dir, "volumes", ".locks")))
	check(t, os.WriteFile(filepath.Join(dir, "volumes", ".locks"), nil, 0o600))
	attach := filepath.Join(dir, "volumes", ".state", h.Local().ID, "attach")
	check(t, errors.Join(os.RemoveAll(attach), os.Mkdir(attach, 0o700)))
	for name, call := range calls {
		err := call()
		var where *VolumeError
		if err == nil || !strings.Contains(err.Error(), `volume "v"`) || strings.Contains(err.Error(), `"`+h.Local().ID+`"`) || errors.As(err, &where) && where.Volume != "v" {
			t.Errorf("%s: %v (%+v)", name, err, where)
		}
	}
}
