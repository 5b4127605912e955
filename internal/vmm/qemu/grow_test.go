package qemu_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

const mib = 1 << 20

// volume is the image of a disk volume, by its serial.
type volume struct {
	name string
	path string
	to   int64 // its length in the end, bytes
}

// newVolume formats an image as volumes are.
func newVolume(t *testing.T, dir, name string, size int64) *volume {
	t.Helper()
	_, err := exec.LookPath("/usr/sbin/mkfs.ext4")
	need(t, "e2fsprogs", err)
	v := &volume{name: name, path: filepath.Join(dir, name), to: size}
	if err := diskimg.FormatExt4(t.Context(), v.path, size, diskimg.FormatOptions{}); err != nil {
		t.Fatal(err)
	}
	return v
}

// lengthen makes the image longer, as a resize does.
func (v *volume) lengthen(t *testing.T, size int64) {
	t.Helper()
	f := openDisk(t, v.path, os.O_RDWR)
	if err := diskimg.Lengthen(f, size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	v.to = size
}

// blocks are the blocks of the file system in the image and their size.
func (v *volume) blocks(t *testing.T) (count, size int64) {
	t.Helper()
	out, err := exec.Command("/usr/sbin/dumpe2fs", "-h", v.path).Output()
	if err != nil {
		t.Fatalf("dumpe2fs %s: %v", v.name, err)
	}
	number := func(what string) int64 {
		m := regexp.MustCompile(`(?m)^` + what + `:\s+(\d+)`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("no %s in %s", what, out)
		}
		n, _ := strconv.ParseInt(string(m[1]), 10, 64)
		return n
	}
	return number("Block count"), number("Block size")
}

// full reports whether the file system fills the image. The kernel leaves what is
// too small for a group's tables: 2 MiB and a bit, with small blocks 0.5 MiB.
func (v *volume) full(t *testing.T) bool {
	t.Helper()
	count, size := v.blocks(t)
	return v.to-count*size < 600*size
}

// bootVolumes boots the bare agent with volumes mounted for writing on /NAME.
func bootVolumes(t *testing.T, grow bool, vols ...*volume) *guest {
	t.Helper()
	var b agentproto.Boot
	g := boot(t, func(c *vmm.Config) {
		for _, v := range vols {
			c.Disks = append(c.Disks, vmm.Disk{Serial: v.name, File: openDisk(t, v.path, os.O_RDWR), Format: "raw"})
			b.Mounts = append(b.Mounts, agentproto.Mount{Kind: "disk", Guest: "/" + v.name, Source: v.name, Fstype: "ext4", Grow: grow})
		}
		b.Mounts = append(b.Mounts, agentproto.Mount{Kind: "tmpfs", Guest: "/tmp"})
		if c.MemoryMiB < 512 {
			c.MemoryMiB = 512
		}
	})
	g.ready(b)
	return g
}

// TestVolumeSizes: the smallest volume, an odd one and one of 100 GiB mount and
// hold files; e2fsck has nothing to say then.
func TestVolumeSizes(t *testing.T) {
	dir := t.TempDir()
	var vols []*volume
	for _, size := range []int64{diskimg.MinSizeMiB * mib, 3 * mib, 63 * mib, 67 * mib, 129*mib + 512, 131*mib + 4095, 100 << 30} {
		vols = append(vols, newVolume(t, dir, fmt.Sprintf("v%d", len(vols)), size))
	}
	g := bootVolumes(t, false, vols...)
	for _, v := range vols {
		if r := g.write("/"+v.name+"/file", string(pattern(800<<10, v.name))); !r.OK {
			t.Errorf("%s of %d bytes: %s", v.name, v.to, *r.Error)
		}
	}
	g.stop()
	for _, v := range vols {
		clean(t, v.path)
		var st unix.Stat_t
		if err := unix.Stat(v.path, &st); err != nil || st.Size != v.to || st.Blocks*512 > 8*mib+v.to>>14 {
			t.Errorf("%s: %d bytes, %d allocated, %v", v.name, st.Size, st.Blocks*512, err)
		}
	}
}

// pattern is n bytes that differ from block to block and from name to name.
func pattern(n int, name string) []byte {
	b := make([]byte, 0, n+64)
	for i := 0; len(b) < n; i++ {
		b = fmt.Appendf(b, "%s %d\n", name, i)
	}
	return b[:n]
}

// TestGrow: file systems of every layout grow to the length of their disks while
// the volume is mounted, at the latest when it has been mounted some times more:
// what takes longer than a boot should goes on meanwhile, and later. One that is
// mounted without that wish, or read-only, stays as it is.
func TestGrow(t *testing.T) {
	dir, long := t.TempDir(), int64(24<<10)
	if os.Getenv(growSoakEnv) != "" {
		long = 100 << 10 // a quarter of a minute, in several boots
	}
	var vols []*volume
	for _, s := range [][2]int64{
		{2, 3}, {2, 16}, {2, long}, {3, 64}, {16, 1 << 10}, {31, 40}, {40, 2 << 10}, {63, 64}, // blocks of 1 KiB
		{64, 65}, {65, 129}, {64, 100 << 10}, {100 << 10, 200 << 10}, // blocks of 4 KiB
	} {
		v := newVolume(t, dir, fmt.Sprintf("v%d-%d", s[0], s[1]), s[0]*mib)
		v.lengthen(t, s[1]*mib)
		vols = append(vols, v)
	}
	g := bootVolumes(t, false, vols[0])
	g.stop()
	if count, size := vols[0].blocks(t); count*size != 2*mib {
		t.Errorf("%s grew without being asked to: %d bytes", vols[0].name, count*size)
	}
	for _, v := range growAll(t, vols, 10) {
		count, size := v.blocks(t)
		t.Errorf("%s has %d bytes of %d", v.name, count*size, v.to)
	}
}

// growAll boots with the volumes, stopping as soon as the guest is ready, until
// all fill their disks, and returns those that do not. Each stop leaves whole
// file systems.
func growAll(t *testing.T, vols []*volume, boots int) (left []*volume) {
	t.Helper()
	left = vols
	for range boots {
		g := bootVolumes(t, true, left...)
		for _, v := range left {
			if r := g.write("/"+v.name+"/new", "text"); !r.OK {
				t.Errorf("%s: write: %s", v.name, *r.Error)
			}
		}
		g.stop()
		var small []*volume
		for _, v := range left {
			clean(t, v.path)
			if !v.full(t) {
				small = append(small, v)
			}
		}
		if left = small; len(left) == 0 {
			break
		}
		t.Logf("%d are still growing", len(left))
	}
	return left
}
