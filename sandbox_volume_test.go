package microsandbox_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// named returns an option that mounts a volume at a guest path.
func named(guest, volume string, f func(*msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder) msb.SandboxOption {
	return msb.WithVolume(guest, func(m *msb.MountBuilder) *msb.MountBuilder { return m.NamedWith(volume, f) })
}

func volumeNames(ctx context.Context, t testing.TB) string {
	t.Helper()
	var names []string
	for _, h := range must(msb.ListVolumes(ctx))(t) {
		names = append(names, h.Name())
	}
	return strings.Join(names, " ")
}

// TestVolumesInSandboxes follows volumes through two sandboxes and a restart.
func TestVolumesInSandboxes(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	reuse := must(msb.CreateVolume(ctx, "reuse", msb.WithVolumeQuota(100), msb.WithVolumeLabels(map[string]string{"team": "ml", "extra": "x"})))(t)
	ok(t, reuse.FS().WriteString(ctx, "/kept", "from before"))
	bind := t.TempDir()

	mode := func(guest, volume string) *msb.MountBuilder {
		return msb.NewMountBuilder(guest).NamedWith(volume, func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder { return n.Create() })
	}
	if _, err := mode("/v/made", "made").Build(); err != nil {
		t.Fatal(err)
	}
	if got := volumeNames(ctx, t); got != "reuse" {
		t.Fatalf("B-69: describing a mount made a volume: %s", got)
	}
	sb := boot(ctx, t, "vols", append(nested(t, bind),
		named("/v/made", "made", func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder {
			return n.Create().Quota(64).Label("a", "1").Label("b", "2")
		}),
		named("/v/disk", "made-disk", func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder {
			return n.Create().Quota(5).Disk().Size(16)
		}),
		named("/v/ensured", "ensured", func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder {
			return n.EnsureExists().Size(99).Directory().Label("l", "v")
		}),
		named("/v/reuse", "reuse", func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder {
			return n.EnsureExists().Label("team", "ml").Quota(100)
		}),
		named("/v/override", "wrong", func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder { return n.Create().Name("override") }),
		msb.WithMounts(map[string]msb.MountConfig{"/v/tmp": msb.Mount.Tmpfs(msb.TmpfsOptions{})}),
	)...)
	sh(t, sb, "for d in made disk ensured override tmp; do echo $d > /v/$d/data; done; echo layer > /root/layer")

	t.Run("MB-03 NB-2 NB-3 NB-4 NB-5 NB-6 NB-7 NB-8 NB-9 B-46 B-64 what was made", func(t *testing.T) { testMade(ctx, t) })
	t.Run("NB-3 B-47 B-48 compatible volume is reused as it is", func(t *testing.T) {
		h := must(msb.GetVolume(ctx, "reuse"))(t)
		if h.Labels()["extra"] != "x" || len(h.Labels()) != 2 || *h.QuotaMiB() != 100 {
			t.Errorf("labels %v, quota %d", h.Labels(), *h.QuotaMiB())
		}
		if got := sh(t, sb, "cat /v/reuse/kept"); got != "from before" {
			t.Errorf("guest reads %q", got)
		}
	})
	t.Run("nested mounts in any order", func(t *testing.T) { testNested(t, sb, bind) })
	t.Run("SV-05 H-04 B-18 a volume in use is not removed", func(t *testing.T) { testInUse(ctx, t) })
	t.Run("MB-02 B-45 two sandboxes at once", func(t *testing.T) { testShared(ctx, t, sb) })
	t.Run("MB-02 MB-04 B-44 B-49 restart", func(t *testing.T) { testRestart(ctx, t, sb) })
	t.Run("SV-05 B-01 F-6 volumes outlive the sandbox", func(t *testing.T) { testOutlive(ctx, t) })
}

// testMade checks the volumes that the launch made.
func testMade(ctx context.Context, t *testing.T) {
	for name, want := range map[string]struct {
		kind     msb.VolumeKind
		quota    uint32
		capacity uint64
		labels   map[string]string
	}{
		"made":      {kind: msb.VolumeKindDir, quota: 64, labels: map[string]string{"a": "1", "b": "2"}},
		"made-disk": {kind: msb.VolumeKindDisk, capacity: 16 << 20},
		"ensured":   {kind: msb.VolumeKindDir, labels: map[string]string{"l": "v"}},
		"override":  {kind: msb.VolumeKindDir},
	} {
		h := must(msb.GetVolume(ctx, name))(t)
		var quota uint32
		if q := h.QuotaMiB(); q != nil {
			quota = *q
		}
		var capacity uint64
		if c := h.CapacityBytes(); c != nil {
			capacity = *c
		}
		if h.Kind() != want.kind || quota != want.quota || capacity != want.capacity || !maps.Equal(h.Labels(), want.labels) {
			t.Errorf("%s: kind %s, quota %d, capacity %d, labels %v; want %+v", name, h.Kind(), quota, capacity, h.Labels(), want)
		}
		if h.Kind() == msb.VolumeKindDir {
			if got := must(h.FS().ReadString(ctx, "/data"))(t); got != strings.TrimPrefix(name, "made-")+"\n" {
				t.Errorf("%s: the guest's file has %q", name, got)
			}
		}
	}
	if _, err := msb.GetVolume(ctx, "wrong"); !msb.IsKind(err, msb.ErrVolumeNotFound) {
		t.Errorf("NB-4: the name that was replaced: %v", err)
	}
}

// nested returns mounts inside of mounts in a random order.
func nested(t *testing.T, bind string) []msb.SandboxOption {
	t.Helper()
	var mounts []msb.VolumeMount
	for guest, set := range map[string]func(*msb.MountBuilder) *msb.MountBuilder{
		"/n": func(m *msb.MountBuilder) *msb.MountBuilder { return m.Tmpfs() },
		"/n/a/vol": func(m *msb.MountBuilder) *msb.MountBuilder {
			return m.NamedWith("nest", (*msb.NamedVolumeBuilder).Create)
		},
		"/n/a/vol/b/bind": func(m *msb.MountBuilder) *msb.MountBuilder {
			return m.Bind(bind)
		},
		"/n/a/vol/b/bind/tmp": func(m *msb.MountBuilder) *msb.MountBuilder { return m.Tmpfs() },
	} {
		mounts = append(mounts, must(set(msb.NewMountBuilder(guest)).Build())(t))
	}
	seed := rand.Uint64()
	t.Logf("order of nested mounts: seed %d", seed)
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(mounts), func(i, j int) { mounts[i], mounts[j] = mounts[j], mounts[i] })
	return []msb.SandboxOption{msb.WithVolumeMounts(mounts...)}
}

func testNested(t *testing.T, sb *msb.Sandbox, bind string) {
	got := sh(t, sb, "for d in /n /n/a/vol /n/a/vol/b/bind /n/a/vol/b/bind/tmp; do stat -f -c %T $d; echo here > $d/here; done")
	if got != "tmpfs\nfuseblk\nfuseblk\ntmpfs" && got != "tmpfs\nfuse\nfuse\ntmpfs" {
		// coreutils has its own names for the file systems of FUSE
		t.Errorf("file systems: %q", got)
	}
	if _, err := os.Stat(filepath.Join(bind, "here")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(bind, "tmp", "here")); err == nil {
		t.Error("a file of a tmpfs reached the host")
	}
	h := must(msb.GetVolume(testContext(t), "nest"))(t)
	if yes, err := h.FS().Exists(testContext(t), "/b/bind/here"); yes || err != nil {
		t.Errorf("a file of the bind mount is in the volume around it: %v, %v", yes, err)
	}
}

// testInUse: neither kind is removed while sandbox "vols" mounts it.
func testInUse(ctx context.Context, t *testing.T) {
	for _, name := range []string{"made", "made-disk"} {
		h := must(msb.GetVolume(ctx, name))(t)
		for _, err := range []error{msb.RemoveVolume(ctx, name), h.Remove(ctx)} {
			wantKind(t, err, msb.ErrInvalidConfig, name, "vols")
			if !errors.Is(err, msb.ErrVolumeInUse) {
				t.Errorf("remove %s: %v does not match ErrVolumeInUse", name, err)
			}
		}
		if _, err := msb.GetVolume(ctx, name); err != nil {
			t.Error(err)
		}
	}
	_, err := msb.CreateSandbox(ctx, "second", msb.WithImage(vmtest.Image), msb.WithMounts(map[string]msb.MountConfig{"/d": msb.Mount.Named("made-disk", msb.MountOptions{})}))
	wantKind(t, err, msb.ErrInvalidConfig, "made-disk", "vols")
	if !errors.Is(err, msb.ErrVolumeInUse) {
		t.Errorf("second writer of a disk: %v does not match ErrVolumeInUse", err)
	}
	_, err = msb.CreateSandbox(ctx, "second", msb.WithImage(vmtest.Image), msb.WithMounts(map[string]msb.MountConfig{"/d": msb.Mount.Named("made-disk", msb.MountOptions{Readonly: true})}))
	if !errors.Is(err, msb.ErrVolumeInUse) {
		t.Errorf("reader beside the writer of a disk: %v", err)
	}
	if got := sandboxNames(must(msb.ListSandboxes(ctx))(t)); fmt.Sprint(got) != "[vols]" {
		t.Errorf("sandboxes: %v", got)
	}
}

// testShared mounts a directory volume in a second sandbox as well.
func testShared(ctx context.Context, t *testing.T, sb *msb.Sandbox) {
	peer := boot(ctx, t, "peer", msb.WithMounts(map[string]msb.MountConfig{"/shared": msb.Mount.Named("made", msb.MountOptions{})}))
	sees := func(sb *msb.Sandbox, script string) func() bool {
		return func() bool { return run(t, sb, script).Success() }
	}
	if got := sh(t, peer, "cat /shared/data"); got != "made" {
		t.Errorf("the second sandbox reads %q", got)
	}
	sh(t, peer, "echo peer > /shared/peer")
	vmtest.Eventually(t, time.Second, "what the second wrote in the first", sees(sb, `test "$(cat /v/made/peer)" = peer`))
	sh(t, sb, "echo more >> /v/made/peer")
	vmtest.Eventually(t, time.Second, "what the first wrote in the second", sees(peer, `test "$(tail -1 /shared/peer)" = more`))
	ok(t, peer.Stop(ctx))
	wantKind(t, msb.RemoveVolume(ctx, "made"), msb.ErrInvalidConfig, "vols")
}

func testRestart(ctx context.Context, t *testing.T, sb *msb.Sandbox) {
	ok(t, sb.Stop(ctx))
	if h := must(msb.GetSandbox(ctx, "vols"))(t); h.Status() != msb.SandboxStatusStopped {
		t.Errorf("status %s", h.Status())
	}
	again := must(msb.StartSandbox(ctx, "vols"))(t)
	got := sh(t, again, "for d in made disk ensured override; do cat /v/$d/data; done; cat /root/layer; ls -A /v/tmp /n | wc -w; ls /n")
	if want := "made\ndisk\nensured\noverride\nlayer\n3\na"; got != want { // the 3: two headings and the mount point /n/a
		t.Errorf("after the restart: %q, want %q", got, want)
	}
	ok(t, again.Stop(ctx))
}

// testOutlive: volumes are there without the sandbox, and can be removed; the
// sandbox is not started without them.
func testOutlive(ctx context.Context, t *testing.T) {
	h := must(msb.GetVolume(ctx, "override"))(t)
	ok(t, h.Remove(ctx))
	_, err := msb.StartSandbox(ctx, "vols")
	wantKind(t, err, msb.ErrVolumeNotFound, "override")
	must(msb.CreateVolume(ctx, "override"))(t)
	_, err = msb.StartSandbox(ctx, "vols") // another volume of that name
	wantKind(t, err, msb.ErrVolumeNotFound, "override")
	if h := must(msb.GetSandbox(ctx, "vols"))(t); h.Status() != msb.SandboxStatusStopped {
		t.Errorf("after refused starts: status %s", h.Status())
	}
	ok(t, msb.RemoveSandbox(ctx, "vols"))
	made := must(msb.GetVolume(ctx, "made"))(t)
	if got := must(made.FS().ReadString(ctx, "/peer"))(t); got != "peer\nmore\n" {
		t.Errorf("after the sandboxes have gone: %q", got)
	}
	for _, name := range []string{"made", "made-disk"} {
		path := must(msb.GetVolume(ctx, name))(t).Path()
		ok(t, msb.RemoveVolume(ctx, name))
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("directory of %s: %v", name, err)
		}
		wantKind(t, msb.RemoveVolume(ctx, name), msb.ErrVolumeNotFound, name)
	}
}

// TestNamedModesRefused: a mount that does not fit its mode fails the launch
// before anything is made.
func TestNamedModesRefused(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	must(msb.CreateVolume(ctx, "dir", msb.WithVolumeQuota(10), msb.WithVolumeLabels(map[string]string{"k": "v"})))(t)
	must(msb.CreateVolume(ctx, "disk", msb.WithVolumeKind(msb.VolumeKindDisk), msb.WithVolumeSize(16)))(t)
	before := volumeNames(ctx, t)
	ensure := func(o msb.NamedVolumeOptions) msb.NamedVolumeOptions {
		o.Mode = msb.NamedVolumeModeEnsureExists
		return o
	}
	for _, test := range []struct {
		id, volume string
		options    msb.NamedVolumeOptions
		kind       msb.ErrorKind
	}{
		{"NB-1 T-41 B-43 existing, absent", "absent", msb.NamedVolumeOptions{}, msb.ErrVolumeNotFound},
		{"NB-1 T-41 B-43 existing by name, absent", "absent", msb.NamedVolumeOptions{Mode: msb.NamedVolumeModeExisting}, msb.ErrVolumeNotFound},
		{"existing with metadata", "dir", msb.NamedVolumeOptions{QuotaMiB: 10}, msb.ErrInvalidConfig},
		{"NB-2 T-42 B-46 create, present", "dir", msb.NamedVolumeOptions{Mode: msb.NamedVolumeModeCreate}, msb.ErrVolumeAlreadyExists},
		{"NB-6 disk without size", "new", msb.NamedVolumeOptions{Mode: msb.NamedVolumeModeCreate, Kind: "disk"}, msb.ErrInvalidConfig},
		{"NB-3 T-43 B-47 other kind", "disk", ensure(msb.NamedVolumeOptions{}), msb.ErrInvalidConfig},
		{"NB-3 T-43 B-47 other quota", "dir", ensure(msb.NamedVolumeOptions{QuotaMiB: 11}), msb.ErrInvalidConfig},
		{"NB-3 T-43 B-47 other capacity", "disk", ensure(msb.NamedVolumeOptions{Kind: "disk", SizeMiB: 17}), msb.ErrInvalidConfig},
		{"NB-9 B-65 other label", "dir", ensure(msb.NamedVolumeOptions{Labels: map[string]string{"k": "w"}}), msb.ErrInvalidConfig},
		{"NB-9 B-65 label absent", "dir", ensure(msb.NamedVolumeOptions{Labels: map[string]string{"z": "v"}}), msb.ErrInvalidConfig},
		{"T-40 unknown mode", "dir", msb.NamedVolumeOptions{Mode: "sometimes"}, msb.ErrInvalidArgument},
	} {
		t.Run(test.id, func(t *testing.T) {
			// The mount before it would make a volume.
			_, err := msb.CreateSandbox(ctx, "refused", msb.WithImage(vmtest.Image),
				named("/first", "first", (*msb.NamedVolumeBuilder).Create),
				msb.WithMounts(map[string]msb.MountConfig{"/v": msb.Mount.NamedWith(test.volume, msb.MountOptions{}, test.options)}))
			wantKind(t, err, test.kind, "/v")
			noSandboxes(ctx, t, h)
			if got := volumeNames(ctx, t); got != before {
				t.Errorf("volumes %q, want %q", got, before)
			}
		})
	}
	t.Run("B-48 nothing was changed", func(t *testing.T) {
		v := must(msb.GetVolume(ctx, "dir"))(t)
		if *v.QuotaMiB() != 10 || !maps.Equal(v.Labels(), map[string]string{"k": "v"}) {
			t.Errorf("quota %d, labels %v", *v.QuotaMiB(), v.Labels())
		}
	})
}

// TestFailedLaunchLeavesNothing fails launches late: in the guest, and by the
// end of the caller's context while it boots.
func TestFailedLaunchLeavesNothing(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	blank := filepath.Join(t.TempDir(), "blank.img")
	ok(t, os.WriteFile(blank, make([]byte, 1<<20), 0o600))
	fresh := named("/fresh", "fresh", (*msb.NamedVolumeBuilder).Create)
	gone := func(t *testing.T) {
		noSandboxes(ctx, t, h)
		if got := volumeNames(ctx, t); got != "" {
			t.Errorf("volumes left: %s", got)
		}
		vmtest.Eventually(t, 2*time.Second, "every process has gone", func() bool { return len(vmtest.Processes(string(h))) == 0 })
	}
	t.Run("B-69 the guest cannot mount", func(t *testing.T) {
		_, err := msb.CreateSandbox(ctx, "late", msb.WithImage(vmtest.Image), fresh,
			msb.WithMounts(map[string]msb.MountConfig{"/img": msb.Mount.Disk(blank, msb.DiskOptions{})}))
		wantKind(t, err, msb.ErrInvalidConfig, "/img", "no file system")
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("message of several lines: %q", err)
		}
		gone(t)
	})
	t.Run("B-69 the caller gives up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		_, err := msb.CreateSandbox(ctx, "late", msb.WithImage(vmtest.Image), fresh, msb.WithProgress(func(p msb.LaunchProgress) {
			if p.Message == "agent" { // the machine runs, its guest does not answer yet
				cancel()
			}
		}))
		wantKind(t, err, msb.ErrCancelled)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%v does not match context.Canceled", err)
		}
		gone(t)
	})
}

// TestHostsOfMounts shows mounts whose host side is not what it mostly is: a
// file system without attributes of users, an image without a Linux file system.
func TestHostsOfMounts(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	if os.Getuid() != 0 {
		prereq.Missing(t, "root, to mount a ramfs")
	}
	plain := filepath.Join(t.TempDir(), "plain")
	ok(t, os.Mkdir(plain, 0o755))
	if err := unix.Mount("none", plain, "ramfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=0755"); err != nil {
		prereq.Missing(t, "a mount of ramfs: %v", err)
	}
	t.Cleanup(func() { ok(t, unix.Unmount(plain, 0)) })
	ok(t, os.WriteFile(filepath.Join(plain, "hello"), []byte("seeded\n"), 0o640))

	for _, readonly := range []bool{false, true} {
		t.Run(fmt.Sprintf("T-30 strict needs attributes, readonly %t", readonly), func(t *testing.T) {
			_, err := msb.CreateSandbox(ctx, "strict", msb.WithImage(vmtest.Image), named("/first", "first", (*msb.NamedVolumeBuilder).Create),
				msb.WithMounts(map[string]msb.MountConfig{"/p": msb.Mount.Bind(plain, msb.MountOptions{Readonly: readonly})}))
			wantKind(t, err, msb.ErrUnsupportedOperation, "/p", "extended attributes")
			var e *msb.Error
			if !errors.As(err, &e) || !strings.Contains(e.Hint, "off") {
				t.Errorf("hint of %#v", err)
			}
			noSandboxes(ctx, t, h)
			if got := volumeNames(ctx, t); got != "" {
				t.Errorf("volumes left: %s", got)
			}
		})
	}
	fat := filepath.Join(t.TempDir(), "fat.img")
	writeFAT(t, fat)
	sb := boot(ctx, t, "off", msb.WithMounts(map[string]msb.MountConfig{
		"/off":     msb.Mount.Bind(plain, msb.MountOptions{StatVirtualization: msb.StatVirtualizationOff}),
		"/off-ro":  msb.Mount.Bind(plain, msb.MountOptions{StatVirtualization: msb.StatVirtualizationOff, Readonly: true}),
		"/relaxed": msb.Mount.Bind(plain, msb.MountOptions{StatVirtualization: msb.StatVirtualizationRelaxed}),
		"/fat":     msb.Mount.Disk(fat, msb.DiskOptions{}),
	}))
	t.Run("T-31 T-32 relaxed and off do without attributes", func(t *testing.T) {
		if got := sh(t, sb, "stat -c %a /off/hello /off-ro/hello /relaxed/hello; echo guest > /off/guest; cat /relaxed/guest"); got != "640\n640\n640\nguest" {
			t.Errorf("got %q", got)
		}
		refuses(t, sb, "touch /off-ro/x", "Read-only file system")
		sh(t, sb, "ln -s hello /relaxed/link && chmod 600 /off/hello")
		if got, err := os.Readlink(filepath.Join(plain, "link")); got != "hello" {
			t.Errorf("link of the guest on the host: %q, %v", got, err)
		}
		if fi := must(os.Stat(filepath.Join(plain, "hello")))(t); fi.Mode().Perm() != 0o600 {
			t.Errorf("mode on the host: %v", fi.Mode())
		}
	})
	t.Run("B-52 an image of another type is probed", func(t *testing.T) {
		if got := sh(t, sb, "stat -f -c %T /fat && echo hello > /fat/hello.txt && cat /fat/hello.txt"); got != "msdos\nhello" {
			t.Errorf("got %q", got)
		}
	})
	ok(t, sb.Stop(ctx))
	if b := must(os.ReadFile(fat))(t); !strings.Contains(string(b), "HELLO   TXT") {
		t.Error("the guest's file is not in the image")
	}
}

// writeFAT makes an empty FAT16 file system of 4 MiB.
func writeFAT(t testing.TB, path string) {
	t.Helper()
	const (
		sectors    = 8192 // of 512 bytes, one to a cluster
		fatSectors = 32
		reserved   = 1
	)
	b := make([]byte, sectors*512)
	copy(b, "\xeb\x3c\x90msb test")
	le := binary.LittleEndian
	le.PutUint16(b[11:], 512)
	b[13] = 1 // sectors of a cluster
	le.PutUint16(b[14:], reserved)
	b[16] = 2                 // FATs
	le.PutUint16(b[17:], 512) // entries of the root directory
	le.PutUint16(b[19:], sectors)
	b[21] = 0xf8 // fixed disk
	le.PutUint16(b[22:], fatSectors)
	le.PutUint16(b[24:], 32)
	le.PutUint16(b[26:], 2)
	b[36], b[38] = 0x80, 0x29
	copy(b[43:], "NO NAME    FAT16   ")
	b[510], b[511] = 0x55, 0xaa
	for i := range 2 {
		copy(b[(reserved+i*fatSectors)*512:], "\xf8\xff\xff\xff")
	}
	ok(t, os.WriteFile(path, b, 0o600))
}
