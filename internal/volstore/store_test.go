package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
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

func needMkfs(t testing.TB) {
	t.Helper()
	for _, p := range []string{"/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"} {
		if exists(p) {
			return
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("missing: mkfs.ext4 (package e2fsprogs)")
	}
	t.Skip("missing: mkfs.ext4 (package e2fsprogs)")
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
	if got := prune(PruneFilter{Labels: tmp, DryRun: true}); got != want {
		t.Errorf("dry run: %q", got)
	}
	if got := prune(PruneFilter{Labels: tmp, Kind: KindDisk, DryRun: true}); got != "disk" {
		t.Errorf("disks: %q", got)
	}
	if got := prune(PruneFilter{Before: old.CreatedAt.Add(time.Nanosecond), DryRun: true}); got != "old plain" {
		t.Errorf("before: %q", got)
	}
	if got := prune(PruneFilter{Labels: tmp}); got != want {
		t.Errorf("prune: %q", got)
	}
	if got := prune(PruneFilter{DryRun: true}); got != "held:in use kept:protected plain" {
		t.Errorf("left: %q", got)
	}
}

func TestUsedBytes(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	used := func() uint64 {
		t.Helper()
		n, err := s.UsedBytes(t.Context(), v)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := used(); n != 0 {
		t.Errorf("empty: %d", n)
	}
	at := func(name string) string { return filepath.Join(v.Path, name) }
	steps := []struct {
		what string
		do   func() error
		more uint64
	}{
		{"empty file", func() error { return os.WriteFile(at("e"), nil, 0o600) }, 0},
		{"one byte", func() error { return os.WriteFile(at("one"), []byte("1"), 0o600) }, 4096},
		{"4097 bytes", func() error { return os.WriteFile(at("two"), make([]byte, 4097), 0o600) }, 8192},
		{"hard link", func() error { return os.Link(at("two"), at("three")) }, 0},
		{"hole", func() error { return errors.Join(os.WriteFile(at("h"), nil, 0o600), os.Truncate(at("h"), 1<<20)) }, 1 << 20},
		{"short symlink", func() error { return os.Symlink("/etc/passwd", at("l")) }, 0},
		{"long symlink", func() error { return os.Symlink(strings.Repeat("x", 60), at("m")) }, 4096},
		{"symlink to a directory outside", func() error { return os.Symlink("/usr", at("out")) }, 0},
		{"directory", func() error { return os.Mkdir(at("d"), 0o700) }, dirSize(t)},
	}
	total := uint64(0)
	for _, st := range steps {
		if err := st.do(); err != nil {
			t.Fatal(err)
		}
		total += st.more
		if n := used(); n != total {
			t.Errorf("%s: %d, want %d", st.what, n, total)
			total = n
		}
	}
}

// dirSize is what an empty directory is charged on the file system of the test.
func dirSize(t *testing.T) uint64 {
	fi, err := os.Stat(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return roundUp(fi.Size())
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	if err := os.WriteFile(outside, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(dir, "tree")
	deep := tree
	for range 3*maxDepth + 10 {
		deep = filepath.Join(deep, "deeper")
	}
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(outside, filepath.Join(deep, "l")), os.Symlink(dir, filepath.Join(tree, "up")), os.Chmod(deep, 0)); err != nil {
		t.Fatal(err)
	}
	calls := 0
	for ; ; calls++ {
		err := removeSome(tree, 500)
		if err == nil {
			break
		}
		if !errors.Is(err, errBudget) {
			t.Fatal(err)
		}
	}
	if calls < 4 {
		t.Errorf("removed 2200 entries in %d calls of 500", calls+1)
	}
	if _, err := os.Lstat(tree); !errors.Is(err, fs.ErrNotExist) {
		t.Error("tree is left")
	}
	if !exists(outside) {
		t.Error("a symlink was followed")
	}
	if err := removeTree(tree); err != nil {
		t.Errorf("removing nothing: %v", err)
	}
}

func TestLargeTreeIsReapedInTheBackground(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	for i := range 3 * reapAtOnce {
		if err := os.WriteFile(filepath.Join(v.Path, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	called := 0
	s.SetReaper(func(got home.Dir) error { called++; return nil })
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if left, _ := listNames(h.Trash()); called != 1 || len(left) != 1 {
		t.Errorf("reaper called %d times, trash %v", called, left)
	}
	mustCreate(t, s, Spec{Name: "a"}) // the name is free at once
	if err := New(h).ReapTrash(t.Context()); err != nil {
		t.Error(err)
	}
	if left, _ := listNames(h.Trash()); len(left) != 0 {
		t.Errorf("trash %v", left)
	}
}

func TestReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	h := home.Dir(t.TempDir())
	v := mustCreate(t, New(h), Spec{Name: "a"})
	storetest.MakeReadonly(t, string(h))
	s := New(h)
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
	d, err := s.OpenData(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Alive(); err != nil {
		t.Error(err)
	}
	var e *errdefs.Error
	for name, err := range map[string]error{"create": second(s.Create(t.Context(), Spec{Name: "b"})), "remove": s.Remove(t.Context(), "a")} {
		if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
}

// TestFullDisk: at 0 bytes free everything can be listed and removed, and what
// cannot be made leaves nothing behind.
func TestFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	dir := storetest.Tmpfs(t, "12m")
	h := home.Dir(filepath.Join(dir, "home"))
	s := New(h)
	for i := range 20 {
		mustCreate(t, s, Spec{Name: fmt.Sprint("v", i)})
	}
	free := storetest.Fill(t, dir)
	for _, sp := range []Spec{{Name: "new"}, {Name: "disk", Kind: KindDisk, SizeMiB: 64}} {
		_, err := s.Create(t.Context(), sp)
		var e *errdefs.Error
		if !errors.As(err, &e) || e.Kind != errdefs.IO {
			t.Errorf("create %s on a full disk: %v", sp.Name, err)
		}
		if exists(h.Volume(sp.Name)) {
			t.Errorf("%s is left", sp.Name)
		}
	}
	if left, _ := listNames(h.Staging()); len(left) != 0 {
		t.Errorf("staging is left: %v", left)
	}
	for i := range 20 {
		if all, err := New(h).List(t.Context(), Filter{}); err != nil || len(all) != 20-i {
			t.Fatalf("list on a full disk: %d, %v", len(all), err)
		}
		if err := New(h).Remove(t.Context(), fmt.Sprint("v", i)); err != nil {
			t.Fatalf("remove on a full disk: %v", err)
		}
	}
	free()
	mustCreate(t, s, Spec{Name: "new"})
	checkHome(t, s)
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
