package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// realStore returns a store in a new home, with a directory volume "cache" and
// a disk volume "db".
func realStore(t *testing.T) (*volstore.Store, home.Dir) {
	t.Helper()
	h := home.Dir(filepath.Join(t.TempDir(), "home"))
	if err := h.Ensure(); err != nil {
		t.Fatal(err)
	}
	st := volstore.New(h)
	st.SetChecker(func(context.Context, *volstore.Volume, *os.File) error { return nil })
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, sp := range []volstore.Spec{{Name: "cache"}, {Name: "db", Kind: VolumeDisk, SizeMiB: 16}} {
		if _, err := st.Create(t.Context(), sp); err != nil {
			t.Fatal(err)
		}
	}
	return st, h
}

var forTest = OpenOptions{Sandbox: "api", PID: os.Getpid(), GuestUID: 1000, GuestGID: 1001}

// resolve provisions mounts that are known to be right.
func resolve(t *testing.T, st *volstore.Store, h home.Dir, specs ...Spec) []Spec {
	t.Helper()
	resolved, _, err := Provision(t.Context(), st, h, specs)
	if err != nil {
		t.Fatal(err)
	}
	return resolved
}

func open(t *testing.T, st *volstore.Store, resolved []Spec) *Plan {
	t.Helper()
	p, err := Open(t.Context(), st, resolved, forTest)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// openFiles counts the descriptors of this process.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestOpenPlan covers B-67 and the transports of T-16 and T-17: each kind
// becomes what the machine, the file server and the agent need.
func TestOpenPlan(t *testing.T) {
	st, h := realStore(t)
	src, img := t.TempDir(), image(t, 1<<20)
	plan := open(t, st, resolve(t, st, h,
		Spec{Guest: "/data/cache/deep", Kind: KindNamed, Source: "cache", Readonly: true},
		Spec{Guest: "/data/cache", Kind: KindNamed, Source: "cache", Nosuid: true},
		Spec{Guest: "/data", Kind: KindBind, Source: src, StatVirt: StatOff, Nodev: true},
		Spec{Guest: "/db", Kind: KindNamed, Source: "db"},
		Spec{Guest: "/tmp", Kind: KindTmpfs, SizeMiB: 64, Noexec: true},
		Spec{Guest: "/img", Kind: KindDisk, Source: img, Fstype: "vfat", Readonly: true},
	))
	tag := map[string]string{}
	for i, m := range plan.Guest {
		tag[m.Guest] = m.Source
		plan.Guest[i].Source = ""
	}
	want := []agentproto.Mount{
		{Kind: "virtiofs", Guest: "/data", Nodev: true},
		{Kind: "disk", Guest: "/db", Fstype: "ext4", Grow: true},
		{Kind: "disk", Guest: "/img", Fstype: "vfat", Readonly: true},
		{Kind: "tmpfs", Guest: "/tmp", Size: 64 << 20, Noexec: true},
		{Kind: "virtiofs", Guest: "/data/cache", Nosuid: true},
		{Kind: "virtiofs", Guest: "/data/cache/deep", Readonly: true},
	}
	if !slices.Equal(plan.Guest, want) {
		t.Errorf("guest mounts\n%+v\nwant\n%+v", plan.Guest, want)
	}
	checkShares(t, plan, h, src, tag)
	checkDisks(t, plan, tag)
	if len(plan.ShareLocks) != 1 || len(plan.DiskLocks) != 1 {
		t.Errorf("%d and %d locks; a volume mounted twice is attached once", len(plan.ShareLocks), len(plan.DiskLocks))
	}
}

func checkShares(t *testing.T, plan *Plan, h home.Dir, src string, tag map[string]string) {
	t.Helper()
	if len(plan.Shares) != 3 {
		t.Fatalf("shares %+v", plan.Shares)
	}
	for i, want := range []struct {
		guest, path, stat string
		readonly          bool
	}{
		{"/data", src, StatOff, false},
		{"/data/cache", h.Volume("cache"), StatStrict, false},
		{"/data/cache/deep", h.Volume("cache"), StatStrict, true},
	} {
		s := plan.Shares[i]
		real, err := filepath.EvalSymlinks(want.path)
		if err != nil {
			t.Fatal(err)
		}
		var stat unix.Stat_t
		if err := unix.Stat(real, &stat); err != nil {
			t.Fatal(err)
		}
		if s.Tag != tag[want.guest] || s.Path != real && s.Path != want.path || s.Dev != stat.Dev || s.Ino != stat.Ino ||
			s.StatVirt != want.stat || s.HostPerms != PermsPrivate || s.Readonly != want.readonly ||
			s.GuestUID != 1000 || s.GuestGID != 1001 || s.Cache != "auto" {
			t.Errorf("share %+v, want %+v", s, want)
		}
	}
}

func checkDisks(t *testing.T, plan *Plan, tag map[string]string) {
	t.Helper()
	if len(plan.Disks) != 2 {
		t.Fatalf("disks %+v", plan.Disks)
	}
	for i, want := range []struct {
		guest    string
		readonly bool
		flags    int
	}{{"/db", false, unix.O_RDWR}, {"/img", true, unix.O_RDONLY}} {
		d := plan.Disks[i]
		flags, err := unix.FcntlInt(d.File.Fd(), unix.F_GETFL, 0)
		if err != nil {
			t.Fatal(err)
		}
		if d.Serial != tag[want.guest] || d.Readonly != want.readonly || d.Format != FormatRaw || flags&unix.O_ACCMODE != want.flags {
			t.Errorf("disk %+v opened %#o, want %+v", d, flags, want)
		}
	}
}

// TestOpenSharing covers B-45 and decision 11.5.11: directory volumes are
// shared; a disk volume or image has one writer or many readers.
func TestOpenSharing(t *testing.T) {
	st, h := realStore(t)
	img := image(t, 1<<20)
	specs := map[string]Spec{
		"directory": {Guest: "/m", Kind: KindNamed, Source: "cache"},
		"disk":      {Guest: "/m", Kind: KindNamed, Source: "db"},
		"image":     {Guest: "/m", Kind: KindDisk, Source: img},
	}
	for name, spec := range specs {
		for _, first := range []bool{false, true} {
			for _, second := range []bool{false, true} {
				a, b := spec, spec
				a.Readonly, b.Readonly = first, second
				plan, err := Open(t.Context(), st, resolve(t, st, h, a), forTest)
				if err != nil {
					t.Fatal(err)
				}
				other, err := Open(t.Context(), st, resolve(t, st, h, b), OpenOptions{Sandbox: "other", PID: os.Getpid()})
				allowed := name == "directory" || first && second
				if allowed != (err == nil) {
					t.Errorf("%s, read-only %t and %t: %v", name, first, second, err)
				}
				if err != nil && !errors.Is(err, errdefs.ErrVolumeInUse) {
					t.Errorf("%s: %v is not ErrVolumeInUse", name, err)
				}
				if err == nil {
					other.Close()
				}
				if err := plan.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

// TestOpenAlways: a volume that one sandbox caches for good has no other
// attachment, whichever came first and whoever only reads, and each refusal says
// who is there and what to do.
func TestOpenAlways(t *testing.T) {
	st, h := realStore(t)
	auto := Spec{Guest: "/m", Kind: KindNamed, Source: "cache"}
	none, always, reader := auto, auto, auto
	none.Cache, always.Cache, reader.Cache, reader.Readonly = CacheNone, CacheAlways, CacheAlways, true
	for name, tt := range map[string]struct {
		first, second Spec
		who, hint     string
	}{
		"always, then auto":   {always, auto, `sandbox "box" (read-write, cache=always)`, "stop that sandbox, or mount the volume there with cache=auto"},
		"always, then none":   {always, none, "cache=always", "stop that sandbox"},
		"always, then always": {always, always, "cache=always", "mount it with cache=auto"},
		"auto, then always":   {auto, always, `sandbox "box" (read-write)`, "mount it with cache=auto or cache=none"},
		"none, then always":   {none, always, `sandbox "box" (read-write)`, "mount it with cache=auto"},
		"reader, then auto":   {reader, auto, `sandbox "box" (read-only, cache=always)`, "stop that sandbox"},
		"auto, then reader":   {auto, reader, `sandbox "box" (read-write)`, "mount it with cache=auto"},
		"reader, then reader": {reader, reader, "read-only, cache=always", "mount it with cache=auto"},
	} {
		t.Run(name, func(t *testing.T) {
			box := forTest
			box.Sandbox = "box"
			plan, err := Open(t.Context(), st, resolve(t, st, h, tt.first), box)
			if err != nil {
				t.Fatal(err)
			}
			if got := plan.Shares[0].Cache; got != orDefault(tt.first.Cache, CacheAuto) {
				t.Errorf("the share has cache mode %q", got)
			}
			second := resolve(t, st, h, tt.second)
			other := OpenOptions{Sandbox: "other", PID: os.Getpid()}
			_, err = Open(t.Context(), st, second, other)
			var e *errdefs.Error
			if !errors.As(err, &e) || e.Kind != errdefs.InvalidConfig || !errors.Is(err, errdefs.ErrVolumeInUse) ||
				!strings.Contains(err.Error(), tt.who) || !strings.Contains(e.Hint, tt.hint) {
				t.Errorf("the second one: %v, hint %q", err, e.Hint)
			}
			if err := plan.Close(); err != nil {
				t.Fatal(err)
			}
			after, err := Open(t.Context(), st, second, other)
			if err != nil {
				t.Fatalf("when the first is gone: %v", err)
			}
			after.Close()
		})
	}
}

// TestOpenLocksFollowTheFiles: an image stays locked while a process that
// inherited its file lives, as QEMU does, after the plan is closed.
func TestOpenLocksFollowTheFiles(t *testing.T) {
	st, h := realStore(t)
	img := image(t, 1<<20)
	plan := open(t, st, resolve(t, st, h, Spec{Guest: "/m", Kind: KindDisk, Source: img}))
	inherited, err := unix.Dup(int(plan.Disks[0].File.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := diskimg.OpenRaw(img, false); !errors.Is(err, errdefs.ErrVolumeInUse) {
		t.Errorf("while inherited: %v", err)
	}
	if err := unix.Close(inherited); err != nil {
		t.Fatal(err)
	}
	f, _, err := diskimg.OpenRaw(img, false)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// TestOpenRefusesSuccessor: a volume made later under the same name is not the
// one the sandbox was made with.
func TestOpenRefusesSuccessor(t *testing.T) {
	for _, name := range []string{"cache", "db"} {
		st, h := realStore(t)
		resolved := resolve(t, st, h, Spec{Guest: "/m", Kind: KindNamed, Source: name})
		remover := volstore.New(h) // what it does in the background has files open, too
		if err := errors.Join(remover.Remove(t.Context(), name), remover.Close()); err != nil {
			t.Fatal(err)
		}
		check := func(when string) {
			t.Helper()
			before := openFiles(t)
			_, err := Open(t.Context(), st, resolved, forTest)
			if !errdefs.Is(err, errdefs.VolumeNotFound) || !strings.Contains(err.Error(), `named mount at "/m"`) {
				t.Errorf("%s, %s: %v", name, when, err)
			}
			if _, err := Refresh(t.Context(), st, h, resolved); !errdefs.Is(err, errdefs.VolumeNotFound) {
				t.Errorf("%s, %s: Refresh: %v", name, when, err)
			}
			if after := openFiles(t); after > before {
				t.Errorf("%s, %s: %d files left open", name, when, after-before)
			}
		}
		check("removed")
		sp := volstore.Spec{Name: name}
		if name == "db" {
			sp.Kind, sp.SizeMiB = VolumeDisk, 16
		}
		if _, err := st.Create(t.Context(), sp); err != nil {
			t.Fatal(err)
		}
		check("made again")
		// The successor can be used, so nothing was left attached.
		open(t, st, resolve(t, st, h, Spec{Guest: "/m", Kind: KindNamed, Source: name}))
	}
}

// TestOpenRefusesReplaced: between Provision and Open nobody can slip in another
// directory, a link or another image.
func TestOpenRefusesReplaced(t *testing.T) {
	st, h := realStore(t)
	replace := map[string]func(p string) error{
		"other object": func(p string) error {
			if fi, err := os.Lstat(p + ".old"); err == nil && fi.IsDir() {
				return os.Mkdir(p, 0o755)
			}
			return os.WriteFile(p, make([]byte, 4096), 0o600)
		},
		"link back":   func(p string) error { return os.Symlink(p+".old", p) },
		"link away":   func(p string) error { return os.Symlink("/etc", p) },
		"gone":        func(string) error { return nil },
		"fifo":        func(p string) error { return unix.Mkfifo(p, 0o600) },
		"parent link": nil, // below
	}
	for name, swap := range replace {
		for _, kind := range []string{KindBind, KindDisk} {
			t.Run(kind+" "+name, func(t *testing.T) {
				parent := filepath.Join(t.TempDir(), "parent")
				p := filepath.Join(parent, "p")
				if err := os.MkdirAll(p, 0o755); err != nil {
					t.Fatal(err)
				}
				if kind == KindDisk {
					if err := errors.Join(os.Remove(p), os.WriteFile(p, make([]byte, 4096), 0o600)); err != nil {
						t.Fatal(err)
					}
				}
				resolved := resolve(t, st, h, Spec{Guest: "/m", Kind: kind, Source: p})
				if name == "parent link" {
					other := parent + ".other"
					err := errors.Join(os.Rename(parent, parent+".old"), os.Mkdir(other, 0o755), os.Symlink(other, parent))
					if kind == KindBind {
						err = errors.Join(err, os.Mkdir(p, 0o755))
					} else {
						err = errors.Join(err, os.WriteFile(p, make([]byte, 4096), 0o600))
					}
					if err != nil {
						t.Fatal(err)
					}
				} else if err := errors.Join(os.Rename(p, p+".old"), swap(p)); err != nil {
					t.Fatal(err)
				}
				before := openFiles(t)
				plan, err := Open(t.Context(), st, resolved, forTest)
				if err == nil {
					plan.Close()
					t.Fatal("opened")
				}
				if !errdefs.Is(err, errdefs.InvalidConfig) && !errdefs.Is(err, errdefs.PathNotFound) && !errdefs.Is(err, errdefs.IO) {
					t.Errorf("got %v", err)
				}
				if !strings.Contains(err.Error(), kind+` mount at "/m"`) {
					t.Errorf("error %q does not name the mount", err)
				}
				if after := openFiles(t); after > before {
					t.Errorf("%d files left open", after-before)
				}
			})
		}
	}
}

// TestOpenGivesEverythingBack: whatever step fails, nothing stays attached or
// open. The step is failed once per hit of each fail point.
func TestOpenGivesEverythingBack(t *testing.T) {
	st, h := realStore(t)
	resolved := resolve(t, st, h,
		Spec{Guest: "/a", Kind: KindNamed, Source: "cache"},
		Spec{Guest: "/b", Kind: KindNamed, Source: "db"},
		Spec{Guest: "/c", Kind: KindDisk, Source: image(t, 4096)},
		Spec{Guest: "/d", Kind: KindBind, Source: t.TempDir()},
	)
	open(t, st, resolved).Close() // whatever is opened once and kept
	before := openFiles(t)
	for point, hits := range map[string]int{"mount.attached": 2, "mount.planned": 1} {
		for n := range hits {
			seen := 0
			disarm := failpoint.Arm(point, func() error {
				if seen++; seen > n {
					return errors.New("die here")
				}
				return nil
			})
			_, err := Open(t.Context(), st, resolved, forTest)
			disarm()
			if err == nil || seen != n+1 {
				t.Fatalf("%s: %v after %d hits", point, err, seen)
			}
			if after := openFiles(t); after != before {
				t.Errorf("%s, hit %d: %d files open, %d before", point, n+1, after, before)
			}
		}
	}
	plan := open(t, st, resolved)
	if err := errors.Join(plan.Close(), plan.Close()); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	for _, name := range []string{"cache", "db"} {
		if err := st.Remove(t.Context(), name); err != nil {
			t.Errorf("still attached: %v", err)
		}
	}
}

// TestNamedModesWithStore covers NB-3, NB-9, B-46, B-47, B-48 and B-65 with the
// volume store: what ensure-exists compares, and that it changes nothing.
func TestNamedModesWithStore(t *testing.T) {
	st, h := realStore(t)
	make := func(sp volstore.Spec) {
		t.Helper()
		if _, err := st.Create(t.Context(), sp); err != nil {
			t.Fatal(err)
		}
	}
	labels := map[string]string{"team": "ml", "env": "dev"}
	make(volstore.Spec{Name: "quota", QuotaMiB: 64, Labels: labels})
	tests := map[string]struct {
		name  string
		named Named
		kind  errdefs.Kind // Unknown: reused
	}{
		"plain":                  {"cache", Named{}, errdefs.Unknown},
		"quota not asked":        {"quota", Named{}, errdefs.Unknown},
		"quota equal":            {"quota", Named{QuotaMiB: 64}, errdefs.Unknown},
		"quota differs":          {"quota", Named{QuotaMiB: 65}, errdefs.InvalidConfig},
		"quota asked, has none":  {"cache", Named{QuotaMiB: 64}, errdefs.InvalidConfig},
		"labels equal":           {"quota", Named{Labels: labels}, errdefs.Unknown},
		"some labels":            {"quota", Named{Labels: map[string]string{"team": "ml"}}, errdefs.Unknown},
		"label differs":          {"quota", Named{Labels: map[string]string{"team": "web"}}, errdefs.InvalidConfig},
		"label missing":          {"cache", Named{Labels: map[string]string{"team": "ml"}}, errdefs.InvalidConfig},
		"kind differs, disk":     {"cache", Named{Kind: VolumeDisk, SizeMiB: 16}, errdefs.InvalidConfig},
		"kind differs, default":  {"db", Named{}, errdefs.InvalidConfig},
		"size equal":             {"db", Named{Kind: VolumeDisk, SizeMiB: 16}, errdefs.Unknown},
		"size not asked":         {"db", Named{Kind: VolumeDisk}, errdefs.Unknown},
		"size differs":           {"db", Named{Kind: VolumeDisk, SizeMiB: 17}, errdefs.InvalidConfig},
		"missing disk, no size":  {"none", Named{Kind: VolumeDisk}, errdefs.InvalidConfig},
		"label on a disk volume": {"db", Named{Kind: VolumeDisk, Labels: map[string]string{"a": "b"}}, errdefs.InvalidConfig},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			before, err := st.Get(t.Context(), tt.name)
			if err != nil && tt.name != "none" {
				t.Fatal(err)
			}
			tt.named.Mode = ModeEnsureExists
			spec := Spec{Guest: "/m", Kind: KindNamed, Source: tt.name, Named: tt.named}
			resolved, undo, err := Provision(t.Context(), st, h, []Spec{spec})
			if errdefs.KindOf(err) != tt.kind || (err == nil) != (tt.kind == errdefs.Unknown) {
				t.Fatalf("got %v, want kind %d", err, tt.kind)
			}
			if err == nil && resolved[0].Resolved.VolumeID != before.ID {
				t.Errorf("another volume: %+v", resolved[0].Resolved)
			}
			undo(t.Context())
			after, err := st.Get(t.Context(), tt.name)
			if tt.name == "none" {
				if !errdefs.Is(err, errdefs.VolumeNotFound) {
					t.Errorf("made: %v", err)
				}
				return
			}
			if err != nil || after.ID != before.ID || after.QuotaMiB != before.QuotaMiB || len(after.Labels) != len(before.Labels) {
				t.Errorf("changed from %+v to %+v, %v", before, after, err)
			}
		})
	}
}

// TestProvisionWithStore covers NB-2, NB-7 to NB-9 and B-69 with the volume
// store: what is made has what was asked, and is gone after undo.
func TestProvisionWithStore(t *testing.T) {
	st, h := realStore(t)
	resolved, undo, err := Provision(t.Context(), st, h, []Spec{
		{Guest: "/a", Kind: KindNamed, Source: "dir", Named: Named{Mode: ModeCreate, QuotaMiB: 8, Labels: map[string]string{"a": "1", "b": "2"}}},
		{Guest: "/b", Kind: KindNamed, Source: "disk", Named: Named{Mode: ModeEnsureExists, Kind: VolumeDisk, SizeMiB: 16}},
	})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := st.Get(t.Context(), "dir")
	if err != nil || dir.QuotaMiB != 8 || dir.Labels["a"] != "1" || dir.Labels["b"] != "2" || dir.Kind != VolumeDir {
		t.Errorf("directory %+v, %v", dir, err)
	}
	disk, err := st.Get(t.Context(), "disk")
	if err != nil || disk.CapacityBytes != 16<<20 || disk.Kind != VolumeDisk {
		t.Errorf("disk %+v, %v", disk, err)
	}
	plan := open(t, st, resolved)
	undo(t.Context()) // attached: both stay
	if vols, err := st.List(t.Context(), volstore.Filter{}); err != nil || len(vols) != 4 {
		t.Errorf("%d volumes while attached, %v", len(vols), err)
	}
	plan.Close()
	TakeBack(context.Background(), st, resolved)
	vols, err := st.List(t.Context(), volstore.Filter{})
	if err != nil || len(vols) != 2 {
		t.Errorf("%d volumes left, %v", len(vols), err)
	}
}
