package mount

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// provisionErr provisions mounts that must be refused, and checks that nothing
// was made.
func provisionErr(t *testing.T, f *fakeStore, specs ...Spec) error {
	t.Helper()
	before := len(f.volumes)
	resolved, undo, err := Provision(t.Context(), f, f.h, specs)
	if err == nil || resolved != nil {
		t.Fatalf("Provision = %+v, %v, want an error", resolved, err)
	}
	undo(t.Context())
	if len(f.volumes) != before {
		t.Errorf("%d volumes left, %d before: %v", len(f.volumes), before, f.log)
	}
	return err
}

func image(t *testing.T, size int64) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(p, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p, size); err != nil {
		t.Fatal(err)
	}
	return p
}

func bindSpec(src string) Spec { return Spec{Guest: "/m", Kind: KindBind, Source: src} }
func diskSpec(src string) Spec { return Spec{Guest: "/d", Kind: KindDisk, Source: src} }

// TestProvisionHostPaths: relative paths and links are resolved, and what is
// stored survives a change of directory.
func TestProvisionHostPaths(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "src"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("src", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, given := range []string{"src", "./src", "link", "./link/../src", filepath.Join(dir, "link")} {
		resolved, _, err := Provision(t.Context(), f, f.h, []Spec{bindSpec(given)})
		if err != nil {
			t.Fatalf("%s: %v", given, err)
		}
		var st unix.Stat_t
		if err := unix.Stat("src", &st); err != nil {
			t.Fatal(err)
		}
		got := resolved[0]
		if got.Source != filepath.Join(real, "src") || got.Resolved.Dev != st.Dev || got.Resolved.Ino != st.Ino {
			t.Errorf("%s resolves to %+v", given, got)
		}
	}
}

// TestProvisionHostPathErrors: each names the path as it was given.
func TestProvisionHostPathErrors(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	fifo := filepath.Join(dir, "fifo")
	loop := filepath.Join(dir, "loop")
	if err := errors.Join(os.WriteFile(file, []byte("x"), 0o600), unix.Mkfifo(fifo, 0o600), os.Symlink(loop, loop)); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	tests := map[string]struct {
		spec Spec
		kind errdefs.Kind
		is   error
		want string
	}{
		"bind, missing":          {bindSpec("nowhere"), errdefs.InvalidConfig, fs.ErrNotExist, `"nowhere"`},
		"bind, parent missing":   {bindSpec("/nowhere/x"), errdefs.InvalidConfig, fs.ErrNotExist, `"/nowhere/x"`},
		"bind, file":             {bindSpec(file), errdefs.UnsupportedOperation, nil, "single files"},
		"bind, fifo":             {bindSpec(fifo), errdefs.InvalidConfig, nil, "not a directory"},
		"bind, below a file":     {bindSpec(file + "/x"), errdefs.InvalidConfig, unix.ENOTDIR, file},
		"bind, loop":             {bindSpec(loop), errdefs.InvalidConfig, nil, loop},
		"disk, missing":          {diskSpec("nowhere"), errdefs.InvalidConfig, fs.ErrNotExist, `"nowhere"`},
		"disk, directory":        {diskSpec(dir), errdefs.InvalidConfig, nil, "regular file"},
		"disk, fifo":             {diskSpec(fifo), errdefs.InvalidConfig, nil, "regular file"},
		"disk, device":           {diskSpec("/dev/null"), errdefs.InvalidConfig, nil, "regular file"},
		"disk, odd size":         {diskSpec(file), errdefs.InvalidConfig, nil, "1 bytes"},
		"disk, empty":            {diskSpec(image(t, 0)), errdefs.InvalidConfig, nil, "empty"},
		"disk, qcow2":            {diskSpec("a.qcow2"), errdefs.UnsupportedOperation, nil, "qcow2"},
		"disk, vmdk":             {diskSpec("a.vmdk"), errdefs.UnsupportedOperation, nil, "vmdk"},
		"disk, qcow2 by format":  {Spec{Guest: "/d", Kind: KindDisk, Source: "a.img", Format: FormatQcow2}, errdefs.UnsupportedOperation, nil, "qcow2"},
		"rules come first":       {Spec{Guest: "/m", Kind: KindBind, Source: "nowhere", SizeMiB: 1}, errdefs.InvalidConfig, nil, "option size"},
		"named, missing":         {Spec{Guest: "/m", Kind: KindNamed, Source: "cache"}, errdefs.VolumeNotFound, nil, `"cache"`},
		"ensure disk, no size":   {Spec{Guest: "/m", Kind: KindNamed, Source: "db", Named: Named{Mode: ModeEnsureExists, Kind: VolumeDisk}}, errdefs.InvalidConfig, nil, "needs a size"},
		"a relative place tells": {bindSpec("nowhere"), errdefs.InvalidConfig, nil, "nowhere"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := provisionErr(t, f, tt.spec)
			if !errdefs.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.spec.Guest) {
				t.Errorf("got %v (kind %d), want kind %d with %q", err, errdefs.KindOf(err), tt.kind, tt.want)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v does not match %v", err, tt.is)
			}
			var e *errdefs.Error
			if errors.As(err, &e) && errors.Is(err, fs.ErrNotExist) && !filepath.IsAbs(tt.spec.Source) && !strings.Contains(e.Hint, dir) {
				t.Errorf("hint %q does not say where it was looked for", e.Hint)
			}
		})
	}
	if len(f.log) != 0 {
		t.Errorf("the store was asked for %v", f.log)
	}
}

// TestProvisionAccess: what the caller may not read is refused before start.
func TestProvisionAccess(t *testing.T) {
	f := newFake(t)
	dir := filepath.Join(t.TempDir(), "closed")
	img := image(t, 4096)
	err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o000), os.Chmod(img, 0o444),
		os.Chmod(filepath.Dir(filepath.Dir(img)), 0o755)) // the directory of all of this test's directories
	if err != nil {
		t.Fatal(err)
	}
	ro := diskSpec(img)
	ro.Readonly = true
	var errs [3]error
	asOrdinaryUser(func() {
		for i, s := range []Spec{bindSpec(dir), diskSpec(img), ro} {
			_, _, errs[i] = Provision(t.Context(), f, f.h, []Spec{s})
		}
	})
	if !errors.Is(errs[0], fs.ErrPermission) {
		t.Errorf("closed directory: %v", errs[0])
	}
	if !errors.Is(errs[1], fs.ErrPermission) {
		t.Errorf("writable mount of a read-only image: %v", errs[1])
	}
	if errs[2] != nil {
		t.Errorf("read-only mount of a read-only image: %v", errs[2])
	}
}

// asOrdinaryUser runs f on a thread of its own that is root no more, if it was.
func asOrdinaryUser(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		if os.Getuid() == 0 {
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 65534, ^uintptr(0)); errno != 0 {
				panic(errno)
			}
		}
		f()
	}()
	<-done
}

// TestProvisionRefusesHome: no host path that is, holds or lies in the data
// directory is mounted, whatever way it is reached.
func TestProvisionRefusesHome(t *testing.T) {
	f := newFake(t)
	top := filepath.Dir(string(f.h))
	elsewhere := t.TempDir()
	link := filepath.Join(elsewhere, "link")
	moved := filepath.Join(elsewhere, "moved")
	vol := f.add("db", VolumeDisk)
	err := errors.Join(os.Symlink(string(f.h), link),
		// The sandboxes' directory lies on another disk.
		os.Mkdir(moved, 0o700), os.Remove(f.h.Sandboxes()), os.Symlink(moved, f.h.Sandboxes()),
		os.Mkdir(filepath.Join(top, "project"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	for name, spec := range map[string]Spec{
		"is it":             bindSpec(string(f.h)),
		"holds it":          bindSpec(top),
		"root directory":    bindSpec("/"),
		"lies in it":        bindSpec(f.h.Volumes()),
		"a volume's data":   bindSpec(vol.Path),
		"through a link":    bindSpec(link),
		"below a link":      bindSpec(link + "/volumes"),
		"parent, dots":      bindSpec(f.h.Volumes() + "/../.."),
		"part elsewhere":    bindSpec(moved),
		"around that part":  bindSpec(elsewhere),
		"image of a volume": diskSpec(vol.DiskPath),
	} {
		t.Run(name, func(t *testing.T) {
			wantInvalid(t, provisionErr(t, f, spec), "data directory", spec.Guest)
		})
	}
	if _, _, err := Provision(t.Context(), f, f.h, []Spec{bindSpec(filepath.Join(top, "project"))}); err != nil {
		t.Errorf("a neighbour: %v", err)
	}
}

// TestProvisionRefusesHomeAlias: the same directory mounted at another place of
// the host is still the data directory.
func TestProvisionRefusesHomeAlias(t *testing.T) {
	f := newFake(t)
	alias := t.TempDir()
	if err := unix.Mount(string(f.h), alias, "", unix.MS_BIND, ""); err != nil {
		needsMounting(t, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(alias, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	wantInvalid(t, provisionErr(t, f, bindSpec(alias)), "data directory")
	wantInvalid(t, provisionErr(t, f, bindSpec(alias+"/volumes")), "data directory")
}

// TestProvisionWithoutHome: a home that does not exist yet protects its place.
func TestProvisionWithoutHome(t *testing.T) {
	f := newFake(t)
	top := t.TempDir()
	f.h = home.Dir(filepath.Join(top, "not", "yet"))
	wantInvalid(t, provisionErr(t, f, bindSpec(top)), "data directory")
	if _, _, err := Provision(t.Context(), f, f.h, []Spec{bindSpec(t.TempDir())}); err != nil {
		t.Error(err)
	}
}

// TestProvisionImageTwice: one image has one mount in a sandbox, by identity.
func TestProvisionImageTwice(t *testing.T) {
	f := newFake(t)
	img := image(t, 4096)
	hard := filepath.Join(filepath.Dir(img), "hard.img")
	soft := filepath.Join(filepath.Dir(img), "soft.img")
	if err := errors.Join(os.Link(img, hard), os.Symlink(img, soft)); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{img, hard, soft} {
		second := diskSpec(other)
		second.Guest = "/second"
		wantInvalid(t, provisionErr(t, f, diskSpec(img), second), "mounted twice", `"/second"`)
	}
}

func namedSpec(guest, name, mode, kind string) Spec {
	s := Spec{Guest: guest, Kind: KindNamed, Source: name, Named: Named{Mode: mode, Kind: kind}}
	if kind == VolumeDisk && mode != "" && mode != ModeExisting {
		s.Named.SizeMiB = 64
	}
	return s
}

// TestProvisionModes covers B-46 and NB-1 to NB-3: three modes, absent and
// present, and what is taken back.
func TestProvisionModes(t *testing.T) {
	tests := []struct {
		mode    string
		present bool
		kind    errdefs.Kind // of the error, Unknown for none
		made    bool
	}{
		{"", false, errdefs.VolumeNotFound, false},
		{"", true, errdefs.Unknown, false},
		{ModeExisting, false, errdefs.VolumeNotFound, false},
		{ModeExisting, true, errdefs.Unknown, false},
		{ModeCreate, false, errdefs.Unknown, true},
		{ModeCreate, true, errdefs.VolumeAlreadyExists, false},
		{ModeEnsureExists, false, errdefs.Unknown, true},
		{ModeEnsureExists, true, errdefs.Unknown, false},
		{"ensure_exists", false, errdefs.Unknown, true},
	}
	for _, tt := range tests {
		name := tt.mode + " absent"
		if tt.present {
			name = tt.mode + " present"
		}
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			if tt.present {
				f.add("vol", VolumeDir)
			}
			resolved, undo, err := Provision(t.Context(), f, f.h, []Spec{namedSpec("/m", "vol", tt.mode, "")})
			if tt.kind != errdefs.Unknown {
				if !errdefs.Is(err, tt.kind) || !strings.Contains(err.Error(), `named mount at "/m"`) {
					t.Fatalf("got %v, want kind %d", err, tt.kind)
				}
				if (len(f.volumes) == 1) != tt.present {
					t.Errorf("volumes: %v", f.volumes)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := resolved[0].Resolved
			if got.VolumeID != f.volumes["vol"].ID || got.VolumeKind != VolumeDir {
				t.Errorf("resolved %+v", got)
			}
			undo(t.Context())
			if gone := f.volumes["vol"] == nil; gone != tt.made {
				t.Errorf("after undo the volume is gone: %t, want %t", gone, tt.made)
			}
		})
	}
}

// TestProvisionRollsBack covers B-69: when the third mount fails, the volumes
// made for the first two are gone and the one that was there is not.
func TestProvisionRollsBack(t *testing.T) {
	specs := []Spec{
		namedSpec("/a", "old", ModeEnsureExists, ""),
		namedSpec("/b", "new1", ModeEnsureExists, ""),
		namedSpec("/c", "new2", ModeCreate, VolumeDisk),
		namedSpec("/d", "bad", ModeCreate, ""),
	}
	check := func(t *testing.T, f *fakeStore, err error) {
		t.Helper()
		if err == nil {
			t.Fatal("no error")
		}
		if len(f.volumes) != 1 || f.volumes["old"] == nil {
			t.Errorf("left: %v", f.volumes)
		}
		if n := len(f.log); n < 2 || !strings.HasSuffix(f.log[n-1], "new1") || !strings.HasSuffix(f.log[n-2], "new2") {
			t.Errorf("not taken back in reverse: %v", f.log)
		}
	}
	t.Run("store fails", func(t *testing.T) {
		f := newFake(t)
		f.add("old", VolumeDir)
		f.failMaking = "bad"
		_, undo, err := Provision(t.Context(), f, f.h, specs)
		check(t, f, err)
		undo(t.Context()) // harmless
		if !strings.Contains(err.Error(), `named mount at "/d"`) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("caller gives up", func(t *testing.T) {
		f := newFake(t)
		f.add("old", VolumeDir)
		_, undo, err := Provision(t.Context(), f, f.h, specs[:3])
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		undo(ctx)
		check(t, f, ctx.Err())
	})
	t.Run("fail point", func(t *testing.T) {
		f := newFake(t)
		f.add("old", VolumeDir)
		defer failpoint.Arm("mount.provisioned", func() error { return errors.New("die here") })()
		_, _, err := Provision(t.Context(), f, f.h, specs[:3])
		check(t, f, err)
	})
}

// TestTakeBack: the stored mounts of a killed launch are enough to remove what
// it made, and nothing else; twice does no harm.
func TestTakeBack(t *testing.T) {
	f := newFake(t)
	f.add("old", VolumeDir)
	resolved, _, err := Provision(t.Context(), f, f.h, []Spec{
		namedSpec("/a", "old", ModeEnsureExists, ""), namedSpec("/b", "new", ModeEnsureExists, ""), namedSpec("/c", "old", "", ""),
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		TakeBack(t.Context(), f, resolved)
		if len(f.volumes) != 1 || f.volumes["old"] == nil {
			t.Errorf("left: %v", f.volumes)
		}
	}
	// A disk that somebody has written to by then stays.
	resolved, _, err = Provision(t.Context(), f, f.h, []Spec{namedSpec("/a", "d1", ModeCreate, VolumeDisk), namedSpec("/b", "d2", ModeCreate, VolumeDisk)})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.volumes["d2"].DiskPath, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(f.volumes["d2"].DiskPath, later, later); err != nil {
		t.Fatal(err)
	}
	TakeBack(t.Context(), f, resolved)
	if f.volumes["d1"] != nil || f.volumes["d2"] == nil {
		t.Errorf("left: %v", f.volumes)
	}
	// A successor of the name is not touched.
	resolved, _, err = Provision(t.Context(), f, f.h, []Spec{namedSpec("/b", "new", ModeCreate, "")})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.RemoveID(t.Context(), resolved[0].Resolved.VolumeID); err != nil {
		t.Fatal(err)
	}
	f.add("new", VolumeDir)
	TakeBack(t.Context(), f, resolved)
	if f.volumes["new"] == nil {
		t.Error("a volume made later was removed")
	}
}

// TestUndoKeepsWhatOthersUse: files that somebody put into a new volume are not
// the launch's to delete.
func TestUndoKeepsWhatOthersUse(t *testing.T) {
	f := newFake(t)
	_, undo, err := Provision(t.Context(), f, f.h, []Spec{namedSpec("/a", "vol", ModeCreate, "")})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.volumes["vol"].Path, "note"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	undo(t.Context())
	if f.volumes["vol"] == nil {
		t.Error("a volume with a file in it was removed")
	}
}

// TestProvisionChecksBeforeMaking: a mount that cannot work is refused before
// the volume of the mount before it is made.
func TestProvisionChecksBeforeMaking(t *testing.T) {
	for name, wrong := range map[string]Spec{
		"host path":           bindSpec("/nowhere"),
		"missing volume":      namedSpec("/m", "gone", "", ""),
		"taken name":          namedSpec("/m", "old", ModeCreate, ""),
		"policy on disk":      {Guest: "/m", Kind: KindNamed, Source: "disk", StatVirt: StatStrict},
		"host perms on disk":  {Guest: "/m", Kind: KindNamed, Source: "disk", HostPerms: PermsPrivate},
		"cache mode on disk":  {Guest: "/m", Kind: KindNamed, Source: "disk", Cache: CacheAuto},
		"unsupported image":   diskSpec("/x.qcow2"),
		"disk without a size": {Guest: "/m", Kind: KindNamed, Source: "none", Named: Named{Mode: ModeEnsureExists, Kind: VolumeDisk}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.add("old", VolumeDir)
			f.add("disk", VolumeDisk)
			err := provisionErr(t, f, namedSpec("/new", "new", ModeCreate, ""), wrong)
			if checked := Check(t.Context(), f, f.h, []Spec{wrong}); checked == nil || checked.Error() != err.Error() {
				t.Errorf("Check = %v, Provision = %v", checked, err)
			}
			if len(f.log) != 0 {
				t.Errorf("the store was asked to %v", f.log)
			}
		})
	}
}

// TestProvisionOneLaunch: mounts of one launch that name the same volume.
func TestProvisionOneLaunch(t *testing.T) {
	t.Run("existing after create", func(t *testing.T) {
		f := newFake(t)
		resolved, _, err := Provision(t.Context(), f, f.h, []Spec{namedSpec("/a", "vol", "", ""), namedSpec("/b", "vol", ModeCreate, "")})
		if err != nil {
			t.Fatal(err)
		}
		if resolved[0].Resolved.VolumeID != resolved[1].Resolved.VolumeID {
			t.Errorf("two volumes: %+v", resolved)
		}
	})
	t.Run("create twice", func(t *testing.T) {
		f := newFake(t)
		err := provisionErr(t, f, namedSpec("/a", "vol", ModeCreate, ""), namedSpec("/b", "vol", ModeCreate, ""))
		if !errdefs.Is(err, errdefs.VolumeAlreadyExists) || !strings.Contains(err.Error(), `"/b"`) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("existing disk twice", func(t *testing.T) {
		f := newFake(t)
		f.add("db", VolumeDisk)
		wantInvalid(t, provisionErr(t, f, namedSpec("/a", "db", "", ""), namedSpec("/b", "db", "", "")), "mounted twice", `"/b"`)
	})
	t.Run("kind differs", func(t *testing.T) {
		f := newFake(t)
		f.add("db", VolumeDisk)
		wantInvalid(t, provisionErr(t, f, namedSpec("/a", "db", ModeEnsureExists, "")), `"/a"`)
	})
}

// TestResolvedSurvivesStorage: what Provision returns is the same after JSON,
// is valid, and is what Refresh returns for an unchanged host.
func TestResolvedSurvivesStorage(t *testing.T) {
	f := newFake(t)
	f.add("db", VolumeDisk)
	dir := t.TempDir()
	specs := []Spec{
		{Guest: "//z/./", Kind: KindBind, Source: dir, Readonly: true, StatVirt: StatOff},
		namedSpec("/a", "cache", ModeCreate, ""),
		namedSpec("/db", "db", "", ""),
		{Guest: "/t", Kind: KindTmpfs, SizeMiB: 8, Noexec: true},
		{Guest: "/d", Kind: KindDisk, Source: image(t, 4096), Fstype: "ext4", Nodev: true},
	}
	resolved, _, err := Provision(t.Context(), f, f.h, specs)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(resolved)
	if err != nil {
		t.Fatal(err)
	}
	var stored []Spec
	if err := json.Unmarshal(b, &stored); err != nil {
		t.Fatal(err)
	}
	if err := Validate(stored); err != nil {
		t.Errorf("stored mounts: %v", err)
	}
	again, err := Refresh(t.Context(), f, f.h, stored)
	if err != nil {
		t.Fatal(err)
	}
	if !resolved[1].Resolved.Made || again[1].Resolved.Made {
		t.Error("made by the launch, and not by the start")
	}
	again[1].Resolved.Made = true
	b2, err := json.Marshal(again)
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != string(b2) {
		t.Errorf("refreshed:\n%s\nprovisioned:\n%s", b2, b)
	}
	if len(f.log) != 1 {
		t.Errorf("the store was asked to %v", f.log)
	}
}

// TestRefresh: a start needs the same volumes, under whatever name, and takes
// host paths as they are now.
func TestRefresh(t *testing.T) {
	f := newFake(t)
	dir := filepath.Join(t.TempDir(), "src")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	resolved, _, err := Provision(t.Context(), f, f.h, []Spec{namedSpec("/a", "vol", ModeCreate, ""), bindSpec(dir)})
	if err != nil {
		t.Fatal(err)
	}
	// The directory is replaced: the user's right between two runs.
	if err := errors.Join(os.Rename(dir, dir+".old"), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	fresh, err := Refresh(t.Context(), f, f.h, resolved)
	if err != nil {
		t.Fatal(err)
	}
	if fresh[1].Resolved == resolved[1].Resolved {
		t.Error("the identity is that of the old directory")
	}
	// Renamed: found by id.
	v := f.volumes["vol"]
	delete(f.volumes, "vol")
	v.Name = "renamed"
	f.volumes["renamed"] = v
	fresh, err = Refresh(t.Context(), f, f.h, resolved)
	if err != nil || fresh[0].Source != "renamed" {
		t.Errorf("after a rename: %+v, %v", fresh, err)
	}
	// Removed, and another of the name made.
	delete(f.volumes, "renamed")
	if err := os.Remove(v.Path); err != nil {
		t.Fatal(err)
	}
	f.add("vol", VolumeDir)
	_, err = Refresh(t.Context(), f, f.h, resolved)
	if !errdefs.Is(err, errdefs.VolumeNotFound) || !strings.Contains(err.Error(), "removed") {
		t.Errorf("a successor of the name: %v", err)
	}
}

// TestProvisionKeepsOrder: resolved mounts come in the caller's order and the
// given ones are not changed.
func TestProvisionKeepsOrder(t *testing.T) {
	f := newFake(t)
	specs := []Spec{{Guest: "/a/b//c", Kind: KindTmpfs}, {Guest: "/a", Kind: KindTmpfs}, namedSpec("/0", "v", "ensure_exists", "directory")}
	resolved, _, err := Provision(t.Context(), f, f.h, specs)
	if err != nil {
		t.Fatal(err)
	}
	var guests []string
	for _, s := range resolved {
		guests = append(guests, s.Guest)
	}
	if !slices.Equal(guests, []string{"/a/b/c", "/a", "/0"}) || specs[0].Guest != "/a/b//c" {
		t.Errorf("order %v, given %v", guests, specs[0].Guest)
	}
	if n := resolved[2].Named; n.Mode != ModeEnsureExists || n.Kind != VolumeDir {
		t.Errorf("not normalized: %+v", n)
	}
}

// TestProvisionProbes covers T-30 and T-31 before any boot: strict fails where
// user attributes are missing and names the way out, relaxed and off do not.
func TestProvisionProbes(t *testing.T) {
	f := newFake(t)
	dir := noAttributes(t)
	for _, policy := range []string{"", StatStrict} {
		s := bindSpec(dir)
		s.StatVirt = policy
		err := provisionErr(t, f, namedSpec("/v", "vol", ModeCreate, ""), s)
		var e *errdefs.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), `bind mount at "/m"`) || !strings.Contains(e.Hint, "stat-virt=relaxed") {
			t.Errorf("policy %q: %v", policy, err)
		}
	}
	for _, policy := range []string{StatRelaxed, StatOff} {
		s := bindSpec(dir)
		s.StatVirt = policy
		if _, _, err := Provision(t.Context(), f, f.h, []Spec{s}); err != nil {
			t.Errorf("policy %q: %v", policy, err)
		}
	}
}

// needsMounting is for a set-up that could not mount something.
func needsMounting(t *testing.T, err error) {
	t.Helper()
	prereq.Root(t, "mount something")
	prereq.Missing(t, "mounts: %v", err)
}

// noAttributes returns a directory without extended attributes of users.
func noAttributes(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("msb-test", dir, "ramfs", 0, ""); err != nil {
		needsMounting(t, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestProvisionProbesReadonly: on a read-only mount the probe writes nothing,
// so that a read-only file system can be mounted under strict.
func TestProvisionProbesReadonly(t *testing.T) {
	f := newFake(t)
	dir := t.TempDir()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		needsMounting(t, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		needsMounting(t, err)
	}
	s := bindSpec(dir)
	wantInvalid(t, provisionErr(t, f, s), `bind mount at "/m"`)
	s.Readonly = true
	if _, _, err := Provision(t.Context(), f, f.h, []Spec{s}); err != nil {
		t.Error(err)
	}
}
