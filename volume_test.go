package microsandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// useHome gives the test a home of its own, not yet made, through the
// environment as a program would find it.
func useHome(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "home")
	for _, name := range []string{envBackend, envProfile, envKey, envURL, envConfig} {
		unset(t, name)
	}
	setenv(t, "MSB_HOME", dir)
	return dir
}

func setenv(t testing.TB, name, value string) { t.Helper(); t.Setenv(name, value) }

// unset is t.Setenv's opposite.
func unset(t testing.TB, name string) {
	t.Helper()
	t.Setenv(name, "") // remembers the old value
	os.Unsetenv(name)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantErrKind checks an error's kind both ways.
func wantErrKind(t testing.TB, err error, kind ErrorKind) {
	t.Helper()
	if !IsKind(err, kind) || !errors.Is(err, kind) {
		t.Errorf("error %v (%T), want kind %s", err, err, kind)
	}
}

// needMkfs demands what makes disk volumes.
func needMkfs(t testing.TB) {
	t.Helper()
	prereq.Program(t, "mkfs.ext4", "e2fsprogs")
}

// TestCreateVolume: SV-02, T-54, B-12, B-13.
func TestCreateVolume(t *testing.T) {
	home := useHome(t)
	ctx := t.Context()
	spec := VolumeSpec{Name: "cache", Kind: VolumeKindDir, QuotaMiB: 1024, Labels: map[string]string{"team": "ml"}}
	v, err := CreateVolumeFromSpec(ctx, spec)
	check(t, err)
	if want := filepath.Join(home, "volumes", "cache"); v.Path() != want {
		t.Errorf("path %s, want %s", v.Path(), want)
	}
	if fi, err := os.Stat(v.Path()); err != nil || !fi.IsDir() {
		t.Errorf("data directory: %v", err)
	}
	check(t, v.FS().WriteString(ctx, "keep", "me"))
	h, err := GetVolume(ctx, "cache")
	check(t, err)
	if *h.QuotaMiB() != 1024 || h.Labels()["team"] != "ml" {
		t.Errorf("quota %v, labels %v", h.QuotaMiB(), h.Labels())
	}
	_, err = CreateVolume(ctx, "cache", WithVolumeQuota(7))
	wantErrKind(t, err, ErrVolumeAlreadyExists)
	if !errors.Is(err, os.ErrExist) {
		t.Error("does not match os.ErrExist")
	}
	again, err := GetVolume(ctx, "cache")
	check(t, err)
	if s, err := again.FS().ReadString(ctx, "keep"); s != "me" || err != nil || *again.QuotaMiB() != 1024 {
		t.Errorf("the refused create changed the volume: %q, %v, %v", s, err, again.QuotaMiB())
	}
}

// TestCreateVolumeRace: of many callers of one name exactly one wins.
func TestCreateVolumeRace(t *testing.T) {
	useHome(t)
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() { _, errs[i] = CreateVolume(t.Context(), "one") })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		wantErrKind(t, err, ErrVolumeAlreadyExists)
	}
	if won != 1 {
		t.Errorf("%d callers created the volume", won)
	}
}

// TestVolumeNames: B-04.
func TestVolumeNames(t *testing.T) {
	useHome(t)
	for _, name := range []string{"a", "A", "0a", "a.b-c_d"} {
		if _, err := CreateVolume(t.Context(), name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", ".a", "-a", "_a", "a/b", "a b", "é", "..", "a\x00", "../a"} {
		_, err := CreateVolume(t.Context(), name)
		wantErrKind(t, err, ErrInvalidConfig)
	}
}

// TestVolumeSpecRefused: T-15, T-19, VB-2 to VB-4, B-06, B-07, B-08; nothing is left.
func TestVolumeSpecRefused(t *testing.T) {
	home := useHome(t)
	tests := map[string]VolumeSpec{
		"no name":            {},
		"unknown kind":       {Name: "x", Kind: "tape"},
		"disk without size":  {Name: "x", Kind: VolumeKindDisk},
		"directory and size": {Name: "x", SizeMiB: 1},
		"dir kind and size":  {Name: "x", Kind: VolumeKindDir, SizeMiB: 64},
		"disk and quota":     {Name: "x", Kind: VolumeKindDisk, SizeMiB: 64, QuotaMiB: 1},
	}
	for name, spec := range tests {
		t.Run(name, func(t *testing.T) {
			wantErrKind(t, spec.Validate(), ErrInvalidConfig)
			_, err := CreateVolumeFromSpec(t.Context(), spec)
			wantErrKind(t, err, ErrInvalidConfig)
			_, err = NewVolumeBuilderFrom(spec).Create(t.Context())
			wantErrKind(t, err, ErrInvalidConfig)
		})
	}
	if _, err := os.Stat(filepath.Join(home, "volumes", "x")); !os.IsNotExist(err) {
		t.Errorf("something was left: %v", err)
	}
	list, err := ListVolumes(t.Context())
	if err != nil || len(list) != 0 {
		t.Errorf("list: %v, %v", list, err)
	}
	check(t, VolumeSpec{Name: "x"}.Validate())
	check(t, VolumeSpec{Name: "x", Kind: VolumeKindDisk, SizeMiB: 64}.Validate())
}

// TestGetVolume: SV-03, B-14.
func TestGetVolume(t *testing.T) {
	useHome(t)
	_, err := GetVolume(t.Context(), "none")
	wantErrKind(t, err, ErrVolumeNotFound)
	wantErrKind(t, RemoveVolume(t.Context(), "none"), ErrVolumeNotFound)
	_, err = CreateVolume(t.Context(), "v")
	check(t, err)
	h, err := GetVolume(t.Context(), "v")
	check(t, err)
	if h.Name() != "v" {
		t.Errorf("name %q", h.Name())
	}
}

// TestListVolumes: SV-04, X-12, B-15, B-25.
func TestListVolumes(t *testing.T) {
	useHome(t)
	if list, err := ListVolumes(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("empty home: %v, %v", list, err)
	}
	for _, name := range []string{"a", "b", "c"} {
		_, err := CreateVolume(t.Context(), name, WithVolumeLabels(map[string]string{"name": name, "all": "yes"}))
		check(t, err)
	}
	names := func(opts ...VolumeListOption) (out []string) {
		t.Helper()
		list, err := ListVolumesWith(t.Context(), opts...)
		check(t, err)
		for _, h := range list {
			out = append(out, h.Name())
		}
		return out
	}
	if got := names(); !reflect.DeepEqual(got, []string{"c", "b", "a"}) {
		t.Errorf("list %v", got)
	}
	if got := names(WithVolumeListLabels(map[string]string{"all": "yes"}), WithVolumeListLabels(map[string]string{"name": "b"})); !reflect.DeepEqual(got, []string{"b"}) {
		t.Errorf("filtered list %v", got)
	}
	if got := names(WithVolumeListLabels(map[string]string{"name": "a"}), WithVolumeListLabels(map[string]string{"name": "b"})); got != nil {
		t.Errorf("two values of one label select %v", got)
	}
	if got := names(WithVolumeListLabelKeys("all", "name"), WithVolumeListLabels(map[string]string{"name": "b"})); !reflect.DeepEqual(got, []string{"b"}) {
		t.Errorf("keys select %v", got)
	}
	if got := names(WithVolumeListLabelKeys("all", "none")); got != nil {
		t.Errorf("a key that nobody has selects %v", got)
	}
	if got := names(WithVolumeListLabels(map[string]string{"name": "z"})); got != nil {
		t.Errorf("filtered list %v", got)
	}
}

// TestRemoveVolume: SV-05, H-04, X-05, B-16.
func TestRemoveVolume(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	removers := map[string]func(v *Volume) error{
		"by name": func(v *Volume) error { return RemoveVolume(ctx, v.Name()) },
		"volume":  func(v *Volume) error { return v.Remove(ctx) },
		"handle": func(v *Volume) error {
			h, err := GetVolume(ctx, v.Name())
			if err != nil {
				return err
			}
			check(t, h.Remove(ctx))
			err = h.Remove(ctx)
			wantErrKind(t, err, ErrVolumeNotFound)
			return nil
		},
	}
	for name, remove := range removers {
		t.Run(name, func(t *testing.T) {
			v, err := CreateVolume(ctx, "v")
			check(t, err)
			check(t, v.FS().WriteString(ctx, "d/f", "x"))
			check(t, remove(v))
			if _, err := os.Stat(v.Path()); !os.IsNotExist(err) {
				t.Errorf("the directory is there: %v", err)
			}
			wantErrKind(t, RemoveVolume(ctx, "v"), ErrVolumeNotFound)
			wantErrKind(t, v.Remove(ctx), ErrVolumeNotFound)
		})
	}
}

// TestVolumeAccessors: V-01 to V-11, T-47 for a directory and a disk, local half.
func TestVolumeAccessors(t *testing.T) {
	home := useHome(t)
	t.Run("directory", func(t *testing.T) {
		v, err := CreateVolume(t.Context(), "dir")
		check(t, err)
		if v.Name() != "dir" || v.Kind() != VolumeKindDirectory || v.BackendKind() != BackendLocal {
			t.Errorf("%s %s %s", v.Name(), v.Kind(), v.BackendKind())
		}
		if p, err := v.HostPath(); p != filepath.Join(home, "volumes", "dir") || err != nil || p != v.Path() {
			t.Errorf("path %s, %v", p, err)
		}
		if v.DiskPath() != nil || v.CapacityBytes() != nil || v.DiskFormat() != nil || v.DiskFstype() != nil {
			t.Error("a directory has attributes of a disk")
		}
		if l := v.Local(); l == nil || *l != (VolumeLocalState{Path: v.Path(), Kind: VolumeKindDir}) || v.Cloud() != nil {
			t.Errorf("state %+v, %+v", l, v.Cloud())
		}
	})
	t.Run("disk", func(t *testing.T) {
		needMkfs(t)
		v, err := CreateVolume(t.Context(), "disk", WithVolumeKind(VolumeKindDisk), WithVolumeSize(64))
		check(t, err)
		if v.Kind() != VolumeKindDisk || *v.CapacityBytes() != 64<<20 || *v.DiskFormat() != "raw" || *v.DiskFstype() != "ext4" {
			t.Errorf("%s %v %v %v", v.Kind(), v.CapacityBytes(), v.DiskFormat(), v.DiskFstype())
		}
		if p := *v.DiskPath(); p != filepath.Join(v.Path(), "disk.raw") {
			t.Errorf("image %s", p)
		}
		if fi, err := os.Stat(*v.DiskPath()); err != nil || fi.Size() != 64<<20 {
			t.Errorf("image: %v", err)
		}
		if l := v.Local(); l.Kind != VolumeKindDisk || *l.CapacityBytes != 64<<20 || *l.DiskFormat != "raw" || *l.DiskFstype != "ext4" {
			t.Errorf("state %+v", l)
		}
	})
}

// TestVolumeHandleAccessors: H-01, H-02, H-06 to H-15, X-06, X-08, T-21, T-49.
func TestVolumeHandleAccessors(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	before := time.Now()
	v, err := CreateVolume(ctx, "dir", WithVolumeQuota(1024), WithVolumeLabels(map[string]string{"b": "2", "a": "1"}))
	check(t, err)
	after := time.Now()
	h, err := GetVolume(ctx, "dir")
	check(t, err)
	if h.Name() != "dir" || h.Kind() != VolumeKindDirectory || h.Path() != v.Path() || h.IsDefault() || h.BackendKind() != BackendLocal {
		t.Errorf("%s %s %s", h.Name(), h.Kind(), h.Path())
	}
	if *h.QuotaMiB() != 1024 || h.CapacityBytes() != nil || h.DiskFormat() != nil || h.DiskFstype() != nil || h.DiskPath() != nil {
		t.Error("wrong attributes of a directory")
	}
	if !reflect.DeepEqual(h.Labels(), map[string]string{"a": "1", "b": "2"}) || !reflect.DeepEqual(h.LabelPairs(), []Label{{"a", "1"}, {"b", "2"}}) {
		t.Errorf("labels %v, %v", h.Labels(), h.LabelPairs())
	}
	h.Labels()["a"] = "changed"
	if h.Labels()["a"] != "1" {
		t.Error("the handle's labels can be changed from outside")
	}
	if c := h.CreatedAt(); c.Before(before.Truncate(time.Microsecond)) || c.After(after) || c.Location() != time.UTC {
		t.Errorf("created %v, between %v and %v", c, before, after)
	}
	l := h.Local()
	if l == nil || h.Cloud() != nil || l.ID == "" || l.Path != h.Path() || *l.QuotaMiB != 1024 || l.Kind != h.Kind() ||
		!l.CreatedAt.Equal(h.CreatedAt()) || !reflect.DeepEqual(l.Labels, h.Labels()) || l.UsedBytes != h.UsedBytes() {
		t.Errorf("state %+v", l)
	}
	_, err = CreateVolume(ctx, "plain")
	check(t, err)
	plain, err := GetVolume(ctx, "plain")
	check(t, err)
	if plain.QuotaMiB() != nil || len(plain.Labels()) != 0 {
		t.Errorf("plain volume: %v %v", plain.QuotaMiB(), plain.Labels())
	}
	t.Run("disk", func(t *testing.T) {
		needMkfs(t)
		_, err := NewVolumeBuilder("disk").Disk().Size(64).Create(ctx)
		check(t, err)
		h, err := GetVolume(ctx, "disk")
		check(t, err)
		if h.Kind() != VolumeKindDisk || *h.CapacityBytes() != 64<<20 || *h.DiskFormat() != "raw" || *h.DiskFstype() != "ext4" ||
			*h.DiskPath() != filepath.Join(h.Path(), "disk.raw") || h.QuotaMiB() != nil {
			t.Errorf("disk: %+v", h.Local())
		}
	})
}

// TestUsedBytes: H-05, B-20.
func TestUsedBytes(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	old, err := GetVolume(ctx, "v")
	check(t, err)
	was := old.UsedBytes()
	check(t, v.FS().Write(ctx, "f", make([]byte, 1<<20)))
	fresh, err := GetVolume(ctx, "v")
	check(t, err)
	if was != 0 || old.UsedBytes() != was || fresh.UsedBytes() < was+1<<20 {
		t.Errorf("old %d then %d, fresh %d", was, old.UsedBytes(), fresh.UsedBytes())
	}
}

// TestSetLabels: X-13.
func TestSetLabels(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	_, err := CreateVolume(ctx, "v", WithVolumeLabels(map[string]string{"old": "1"}))
	check(t, err)
	h, err := GetVolume(ctx, "v")
	check(t, err)
	check(t, h.SetLabels(ctx, map[string]string{"new": "2"}))
	if h.Labels()["old"] != "1" {
		t.Error("the handle changed")
	}
	fresh, err := GetVolume(ctx, "v")
	check(t, err)
	if !reflect.DeepEqual(fresh.Labels(), map[string]string{"new": "2"}) {
		t.Errorf("labels %v", fresh.Labels())
	}
}

// TestHandleOfRemovedVolume: B-19, B-21 and decision 11.5.10: everything that
// came from a removed volume fails and touches nothing, least of all the volume
// that has the name now.
func TestHandleOfRemovedVolume(t *testing.T) {
	home := useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	check(t, v.FS().WriteString(ctx, "f", "old"))
	h, err := GetVolume(ctx, "v")
	check(t, err)
	byName := NewVolumeFs(mustBackend(t), "v")
	_, err = byName.Exists(ctx, "f")
	check(t, err)
	reader, err := h.FS().ReadStream(ctx, "f")
	check(t, err)
	defer reader.Close()
	writer, err := v.FS().WriteStream(ctx, "g")
	check(t, err)
	defer writer.Close()

	check(t, RemoveVolume(ctx, "v"))
	attempts := func(t *testing.T) {
		t.Helper()
		for name, fs := range map[string]*VolumeFs{"volume": v.FS(), "handle": h.FS(), "by name": byName} {
			wantErrKind(t, fs.WriteString(ctx, "new/f", "x"), ErrVolumeNotFound)
			wantErrKind(t, fs.Mkdir(ctx, "d"), ErrVolumeNotFound)
			_, err := fs.Read(ctx, "f")
			wantErrKind(t, err, ErrVolumeNotFound)
			_, err = fs.List(ctx, "")
			wantErrKind(t, err, ErrVolumeNotFound)
			if t.Failed() {
				t.Logf("file access of the %s", name)
			}
		}
		wantErrKind(t, h.Remove(ctx), ErrVolumeNotFound)
		wantErrKind(t, h.SetLabels(ctx, nil), ErrVolumeNotFound)
		wantErrKind(t, v.Remove(ctx), ErrVolumeNotFound)
	}
	attempts(t)
	_, err = reader.Recv(ctx)
	wantErrKind(t, err, ErrVolumeNotFound)
	if _, err := os.Stat(filepath.Join(home, "volumes", "v")); !os.IsNotExist(err) {
		t.Errorf("something was made in the place of the volume: %v", err)
	}

	again, err := CreateVolume(ctx, "v")
	check(t, err)
	attempts(t)
	_, err = writer.Write([]byte("x"))
	check(t, err)
	wantErrKind(t, writer.Close(), ErrVolumeNotFound)
	if list, err := again.FS().List(ctx, ""); err != nil || len(list) != 0 {
		t.Errorf("the new volume was touched: %v, %v", list, err)
	}
}

// TestRemoveUnderLoad: while many goroutines use a volume it is removed and made
// again, over and over: a write that is begun after the removal returned is never
// acknowledged, and the next volume starts empty.
func TestRemoveUnderLoad(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	for round := range 20 {
		v, err := CreateVolume(ctx, "v")
		check(t, err)
		if l, err := v.FS().List(ctx, ""); err != nil || len(l) != 0 {
			t.Fatalf("round %d starts with %v, %v", round, l, err)
		}
		var removed atomic.Bool
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := 0; ; i++ {
					late := removed.Load()
					err := v.FS().WriteString(ctx, fmt.Sprintf("d%d/f%d", w, i%5), "x")
					if late {
						if !IsKind(err, ErrVolumeNotFound) {
							t.Errorf("a write after the removal: %v", err)
						}
						return
					}
					if err != nil && !IsKind(err, ErrVolumeNotFound) {
						t.Errorf("write: %v", err)
						return
					}
				}
			})
		}
		check(t, v.FS().WriteString(ctx, "first", "x"))
		check(t, v.Remove(ctx))
		removed.Store(true)
		wg.Wait()
	}
}

func mustBackend(t testing.TB) Backend {
	t.Helper()
	b, err := defaultBackend()
	check(t, err)
	return b
}

// TestCancelledContext: T-54, the kind of an ended context.
func TestCancelledContext(t *testing.T) {
	useHome(t)
	ctx, cancel := context.WithCancel(t.Context())
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	cancel()
	_, err = CreateVolume(ctx, "w")
	wantErrKind(t, err, ErrCancelled)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not match context.Canceled", err)
	}
	wantErrKind(t, v.FS().WriteString(ctx, "f", "x"), ErrCancelled)
	if _, err := GetVolume(t.Context(), "w"); !IsKind(err, ErrVolumeNotFound) {
		t.Errorf("the cancelled create left a volume: %v", err)
	}
}
