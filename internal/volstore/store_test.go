package volstore

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

func TestValidateName(t *testing.T) {
	good := []string{"a", "A", "9x", "a..b", "a.", "a-", "CON", "nul.txt", "a.lock", "volumes", strings.Repeat("a", MaxName)}
	bad := []string{"", ".", "..", ".a", ".locks", "_x", "-x", "a/b", `a\b`, "/a", "a b", "a\t", "a\n", "ä", "a:b", "a@b", "a%", "*", "~", "a\x00", strings.Repeat("a", MaxName+1)}
	for _, name := range good {
		if err := ValidateName(name); err != nil {
			t.Errorf("ValidateName(%q): %v", name, err)
		}
	}
	for _, name := range bad {
		if err := ValidateName(name); !errdefs.Is(err, errdefs.InvalidConfig) {
			t.Errorf("ValidateName(%q): %v", name, err)
		}
	}
}

func TestSpecValidate(t *testing.T) {
	tests := map[string]struct {
		spec Spec
		ok   bool
	}{
		"directory":               {Spec{Name: "a"}, true},
		"directory, quota":        {Spec{Name: "a", Kind: KindDir, QuotaMiB: 1}, true},
		"directory, size":         {Spec{Name: "a", SizeMiB: 10}, false},
		"disk":                    {Spec{Name: "a", Kind: KindDisk, SizeMiB: 10}, true},
		"disk without size":       {Spec{Name: "a", Kind: KindDisk}, false},
		"disk, quota":             {Spec{Name: "a", Kind: KindDisk, SizeMiB: 10, QuotaMiB: 1}, false},
		"disk, too small":         {Spec{Name: "a", Kind: KindDisk, SizeMiB: 1}, false},
		"unknown kind":            {Spec{Name: "a", Kind: "tape"}, false},
		"bad name":                {Spec{Name: "-"}, false},
		"label that is not UTF-8": {Spec{Name: "a", Labels: map[string]string{"a": "\xff"}}, false},
	}
	for name, tt := range tests {
		if err := tt.spec.Validate(); (err == nil) != tt.ok || (err != nil && !errdefs.Is(err, errdefs.InvalidConfig)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCreateGetListRemove(t *testing.T) {
	s, h := newStore(t)
	ctx := t.Context()
	a := mustCreate(t, s, Spec{Name: "a", QuotaMiB: 5, Labels: map[string]string{"team": "x", "n": "1"}})
	b := mustCreate(t, s, Spec{Name: "b", Labels: map[string]string{"team": "y"}})
	for name, other := range map[string]*Store{"same store": s, "another store": New(h)} {
		got, err := other.Get(ctx, "a")
		if diff := cmp.Diff(a, got); err != nil || diff != "" {
			t.Errorf("%s: Get: %v\n%s", name, err, diff)
		}
		byID, err := other.GetByID(ctx, b.ID)
		if diff := cmp.Diff(b, byID); err != nil || diff != "" {
			t.Errorf("%s: GetByID: %v\n%s", name, err, diff)
		}
		all, err := other.List(ctx, Filter{})
		if diff := cmp.Diff([]*Volume{b, a}, all); err != nil || diff != "" {
			t.Errorf("%s: List: %v\n%s", name, err, diff)
		}
		some, err := other.List(ctx, Filter{Labels: map[string]string{"team": "x"}})
		if diff := cmp.Diff([]*Volume{a}, some); err != nil || diff != "" {
			t.Errorf("%s: List by label: %v\n%s", name, err, diff)
		}
	}
	if fi, err := os.Lstat(a.Path); err != nil || fi.Mode().Perm() != 0o700 || a.Path != h.Volume("a") || a.DiskPath != "" {
		t.Errorf("data directory: %v, %v, %+v", fi, err, a)
	}
	if _, err := s.Create(ctx, Spec{Name: "a"}); !errdefs.Is(err, errdefs.VolumeAlreadyExists) || err.Error() != `volume "a" already exists` {
		t.Errorf("create again: %v", err)
	}
	if err := s.Remove(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"remove": s.Remove(ctx, "a"), "remove by id": s.RemoveID(ctx, a.ID), "get": second(s.Get(ctx, "a")), "get by id": second(s.GetByID(ctx, a.ID)),
		"remove nonsense": s.Remove(ctx, "../x"), "get nonsense": second(s.Get(ctx, "")),
	} {
		if !errdefs.Is(err, errdefs.VolumeNotFound) {
			t.Errorf("%s after removal: %v", name, err)
		}
	}
	if exists(a.Path) {
		t.Error("data directory is left")
	}
	mustCreate(t, s, Spec{Name: "a"})
}

func second[T any](_ T, err error) error { return err }

func TestDiskVolume(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 5})
	fi, err := os.Lstat(v.DiskPath)
	if err != nil || fi.Size() != 5*mib || v.CapacityBytes != 5*mib || v.DiskFormat != "raw" || v.DiskFstype != "ext4" {
		t.Errorf("%+v, %v", v, err)
	}
	if used, err := s.UsedBytes(t.Context(), v); err != nil || used == 0 || used > 1*mib {
		t.Errorf("used %d, %v", used, err)
	}
	if err := s.Remove(t.Context(), "d"); err != nil {
		t.Error(err)
	}
}

func TestStrangerIsReportedNeverTouched(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "first"}) // makes the home
	file := filepath.Join(h.Volume("a"), "precious")
	if err := errors.Join(os.Mkdir(h.Volume("a"), 0o755), os.WriteFile(file, []byte("data"), 0o644)); err != nil {
		t.Fatal(err)
	}
	var e *errdefs.Error
	_, err := s.Create(t.Context(), Spec{Name: "a"})
	if !errors.As(err, &e) || e.Kind != errdefs.VolumeAlreadyExists || !strings.Contains(e.Hint, "msb volume adopt a") {
		t.Errorf("create: %v", err)
	}
	err = s.Remove(t.Context(), "a")
	if !errors.As(err, &e) || e.Kind != errdefs.VolumeNotFound || !strings.Contains(e.Hint, "adopt") {
		t.Errorf("remove: %v", err)
	}
	v, err := s.Adopt(t.Context(), "a", AdoptOptions{QuotaMiB: 3, Labels: map[string]string{"x": "y"}})
	if err != nil || v.Kind != KindDir || v.QuotaMiB != 3 || v.Labels["x"] != "y" {
		t.Fatalf("adopt: %+v, %v", v, err)
	}
	if b, err := os.ReadFile(file); string(b) != "data" {
		t.Errorf("after adopt: %q, %v", b, err)
	}
	if _, err := s.Adopt(t.Context(), "a", AdoptOptions{}); !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
		t.Errorf("adopt again: %v", err)
	}
	if _, err := s.Adopt(t.Context(), "none", AdoptOptions{}); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("adopt nothing: %v", err)
	}
}

func TestReplacedDirectory(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a", Labels: map[string]string{"keep": "me"}})
	if err := errors.Join(os.Rename(h.Volume("a"), h.Volume("aside")), os.Mkdir(h.Volume("a"), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenData(t.Context(), v.ID); !errdefs.Is(err, errdefs.Filesystem) {
		t.Errorf("OpenData of a replaced directory: %v", err)
	}
	got, err := s.Adopt(t.Context(), "a", AdoptOptions{})
	if err != nil || got.ID != v.ID || got.Labels["keep"] != "me" {
		t.Fatalf("adopt: %+v, %v", got, err)
	}
	d, err := s.OpenData(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	if err := os.Remove(h.Volume("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenData(t.Context(), v.ID); !errdefs.Is(err, errdefs.Filesystem) {
		t.Errorf("OpenData of a missing directory: %v", err)
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Errorf("remove without data: %v", err)
	}
	if !exists(h.Volume("aside")) {
		t.Error("the directory moved aside was removed")
	}
}

func TestAdoptDisk(t *testing.T) {
	needMkfs(t)
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	stranger := h.Volume("e")
	if err := os.Mkdir(stranger, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(v.DiskPath, filepath.Join(stranger, home.DiskFile)); err != nil {
		t.Fatal(err)
	}
	got, err := s.Adopt(t.Context(), "e", AdoptOptions{})
	if err != nil || got.Kind != KindDisk || got.CapacityBytes != 4*mib || got.DiskFstype != "ext4" {
		t.Errorf("adopt: %+v, %v", got, err)
	}
}

// needMkfs demands what makes disk volumes.
func needMkfs(t testing.TB) {
	t.Helper()
	prereq.Program(t, "mkfs.ext4", "e2fsprogs")
}

func TestEnsure(t *testing.T) {
	needMkfs(t)
	s, h := newStore(t)
	ctx := t.Context()
	dir := Spec{Name: "a", QuotaMiB: 5, Labels: map[string]string{"x": "1", "y": "2"}}
	if _, _, err := s.Ensure(ctx, ModeExisting, dir, Requested{}); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("existing, missing: %v", err)
	}
	if v, created, err := s.Ensure(ctx, ModeEnsure, dir, Requested{Quota: true}); err != nil || !created || v.QuotaMiB != 5 {
		t.Fatalf("ensure, missing: %+v, %v, %v", v, created, err)
	}
	if _, created, err := s.Ensure(ctx, ModeExisting, dir, Requested{}); err != nil || created {
		t.Errorf("existing: %v, %v", created, err)
	}
	if _, _, err := s.Ensure(ctx, ModeCreate, dir, Requested{}); !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
		t.Errorf("create, present: %v", err)
	}
	mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	tests := map[string]struct {
		spec  Spec
		asked Requested
		want  string // "" is success
	}{
		"plain":                    {Spec{Name: "a"}, Requested{}, ""},
		"same quota":               {Spec{Name: "a", QuotaMiB: 5}, Requested{Quota: true}, ""},
		"other quota":              {Spec{Name: "a", QuotaMiB: 6}, Requested{Quota: true}, "quota"},
		"quota not asked for":      {Spec{Name: "a", QuotaMiB: 6}, Requested{}, ""},
		"some labels":              {Spec{Name: "a", Labels: map[string]string{"x": "1"}}, Requested{}, ""},
		"other label":              {Spec{Name: "a", Labels: map[string]string{"x": "2"}}, Requested{}, "label"},
		"label missing":            {Spec{Name: "a", Labels: map[string]string{"z": ""}}, Requested{}, "label"},
		"other kind":               {Spec{Name: "a", Kind: KindDisk, SizeMiB: 4}, Requested{Kind: true, Size: true}, "kind"},
		"kind unset against disk":  {Spec{Name: "d"}, Requested{}, "kind"},
		"disk":                     {Spec{Name: "d", Kind: KindDisk}, Requested{Kind: true}, ""},
		"disk, same size":          {Spec{Name: "d", Kind: KindDisk, SizeMiB: 4}, Requested{Kind: true, Size: true}, ""},
		"disk, other size":         {Spec{Name: "d", Kind: KindDisk, SizeMiB: 8}, Requested{Kind: true, Size: true}, "size"},
		"missing disk, no size":    {Spec{Name: "new", Kind: KindDisk}, Requested{Kind: true}, "size"},
		"bad name":                 {Spec{Name: "/"}, Requested{}, "must start"},
		"missing, becomes a label": {Spec{Name: "n2", Labels: map[string]string{"a": "b"}}, Requested{}, ""},
	}
	for name, tt := range tests {
		_, _, err := s.Ensure(ctx, ModeEnsure, tt.spec, tt.asked)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tt.want != "" && (!errdefs.Is(err, errdefs.InvalidConfig) || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
	if err := os.Mkdir(h.Volume("stranger"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Ensure(ctx, ModeEnsure, Spec{Name: "stranger"}, Requested{}); !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
		t.Errorf("ensure over a stranger: %v", err)
	}
	if _, _, err := s.Ensure(ctx, "perhaps", Spec{Name: "a"}, Requested{}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("unknown mode: %v", err)
	}
}

func TestClosedStore(t *testing.T) {
	s := New(home.Dir(t.TempDir()))
	mustCreate(t, s, Spec{Name: "a"})
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "a"); !errdefs.Is(err, errdefs.InvalidHandle) {
		t.Errorf("get: %v", err)
	}
}

// TestHomeReplaced: a store notices that its home was removed and made anew.
func TestHomeReplaced(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "a"})
	if err := os.RemoveAll(string(h)); err != nil {
		t.Fatal(err)
	}
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 0 {
		t.Errorf("list: %v, %v", all, err)
	}
	mustCreate(t, s, Spec{Name: "b"})
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 1 || all[0].Name != "b" {
		t.Errorf("list: %v, %v", all, err)
	}
}
