package microsandbox_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// existing mounts a volume that is there.
func existing(guest, volume string) msb.SandboxOption {
	return named(guest, volume, func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder { return n.Existing() })
}

func readonly(guest, volume string) msb.SandboxOption {
	return msb.WithVolume(guest, func(m *msb.MountBuilder) *msb.MountBuilder { return m.Named(volume).Readonly() })
}

// fsck demands that e2fsck finds nothing to say about an image nobody uses.
func fsck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck %s: %v\n%s", path, err, out)
	}
}

// TestDiskVolumeGrows: a resized volume has the new size in the next sandbox that
// mounts it for writing, with its files. A guest that ends at a named instant of
// the growth leaves a volume that the next one gets checked, whole and of the new
// size.
func TestDiskVolumeGrows(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	must(msb.CreateVolume(ctx, "data", msb.WithVolumeKind(msb.VolumeKindDisk), msb.WithVolumeSize(64)))(t)
	image := *must(msb.GetVolume(ctx, "data"))(t).DiskPath()
	sb := boot(ctx, t, "first", existing("/data", "data"))
	sum := sh(t, sb, "seq 1 200000 > /data/numbers; sha256sum < /data/numbers")
	_, err := msb.ResizeVolume(ctx, "data", 128)
	if !strings.Contains(err.Error(), `attached by sandbox "first"`) {
		t.Errorf("resize of an attached volume: %v", err)
	}
	ok(t, sb.Stop(ctx))

	size := uint32(64)
	for _, point := range []string{"agent.grow.smaller", "agent.grow.grown", ""} {
		size *= 2
		if h := must(msb.ResizeVolume(ctx, "data", size))(t); *h.CapacityBytes() != uint64(size)<<20 {
			t.Errorf("capacity %d, want %d MiB", *h.CapacityBytes(), size)
		}
		if point != "" {
			t.Setenv(failpoint.EnvVar, point+"=exit")
			if _, err := msb.CreateSandbox(ctx, "ends", msb.WithImage(vmtest.Image), existing("/data", "data")); err == nil {
				t.Errorf("%s was not reached", point)
			}
			discard(t, "ends")
			t.Setenv(failpoint.EnvVar, "")
		}
		if point == "" {
			readBeforeGrowth(ctx, t, sum)
		}
		sb := boot(ctx, t, "writer", existing("/data", "data"))
		if got := sh(t, sb, "sha256sum < /data/numbers; echo x > /data/new; df --output=size -m /data | tail -1"); !strings.HasPrefix(got, sum) || !atLeast(got, size*9/10) {
			t.Errorf("%s at %d MiB: %s, want %s", point, size, got, sum)
		}
		ok(t, sb.Stop(ctx))
		discard(t, "writer")
		fsck(t, image)
	}
}

// readBeforeGrowth looks at the file system that is smaller than its disk: a
// reader gets it as it is.
func readBeforeGrowth(ctx context.Context, t *testing.T, sum string) {
	t.Helper()
	sb := boot(ctx, t, "reader", readonly("/data", "data"))
	if got := sh(t, sb, "sha256sum < /data/numbers"); got != sum {
		t.Errorf("read-only: %s, want %s", got, sum)
	}
	ok(t, sb.Stop(ctx))
}

// atLeast reports whether the last word of text is a number of at least n.
func atLeast(text string, n uint32) bool {
	words := strings.Fields(text)
	var got uint32
	for _, c := range words[len(words)-1] {
		got = got*10 + uint32(c-'0')
	}
	return got >= n
}

// TestTrim: what a guest trims is given back to the host, of a volume and of a
// disk image, and neither gets shorter. A read-only one cannot be trimmed.
func TestTrim(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	must(msb.CreateVolume(ctx, "data", msb.WithVolumeKind(msb.VolumeKindDisk), msb.WithVolumeSize(128)))(t)
	raw := filepath.Join(t.TempDir(), "image.raw")
	ok(t, diskimg.FormatExt4(ctx, raw, 128<<20, diskimg.FormatOptions{}))
	images := map[string]string{"/data": *must(msb.GetVolume(ctx, "data"))(t).DiskPath(), "/raw": raw}
	stat := func(guest string) (st unix.Stat_t) {
		t.Helper()
		ok(t, unix.Stat(images[guest], &st))
		return st
	}
	disk := func(m *msb.MountBuilder) *msb.MountBuilder { return m.Disk(raw) }
	sb := boot(ctx, t, "writer", existing("/data", "data"), msb.WithVolume("/raw", disk))
	for guest := range images {
		before := stat(guest)
		sh(t, sb, "head -c 67108864 /dev/zero | tr '\\0' x > "+guest+"/big; sync")
		full := stat(guest)
		if grown := (full.Blocks - before.Blocks) * 512; grown < 64<<20 {
			t.Errorf("%s: %d bytes allocated for 64 MiB", guest, grown)
		}
		sh(t, sb, "rm "+guest+"/big; sync; fstrim "+guest+"; sync")
		after := stat(guest)
		if freed := (full.Blocks - after.Blocks) * 512; freed < 63<<20 || after.Size != 128<<20 {
			t.Errorf("%s: %d bytes of 64 MiB given back, length %d", guest, freed, after.Size)
		}
	}
	ok(t, sb.Stop(ctx))
	for _, path := range images {
		fsck(t, path)
	}
	before := stat("/data")
	sb = boot(ctx, t, "reader", readonly("/data", "data"))
	refuses(t, sb, "fstrim /data", "")
	if got := sh(t, sb, "cat /sys/block/$(basename $(findmnt -no SOURCE /data))/queue/discard_max_bytes"); got != "0" {
		t.Errorf("a read-only disk offers to discard %s bytes", got)
	}
	ok(t, sb.Stop(ctx))
	if after := stat("/data"); after.Blocks != before.Blocks || after.Mtim != before.Mtim {
		t.Errorf("a reader changed the image: %+v, before %+v", after, before)
	}
}
