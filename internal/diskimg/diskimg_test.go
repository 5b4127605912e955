package diskimg

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

func needTools(t *testing.T) (e2fsck string) {
	t.Helper()
	if _, err := findTool("mkfs.ext4"); err != nil {
		prereq.Missing(t, "mkfs.ext4 (package e2fsprogs)")
	}
	e2fsck, err := findTool("e2fsck")
	if err != nil {
		prereq.Missing(t, "e2fsck (package e2fsprogs)")
	}
	return e2fsck
}

func TestFormatExt4Sizes(t *testing.T) {
	e2fsck := needTools(t)
	sizes := []int64{MinSizeMiB * mib, 3 * mib, 5*mib + 512, 17 * mib, 63 * mib, 64 * mib, 68*mib - 1, 129 * mib, 130 * mib, 131*mib + 4095, 1000 * mib, 4 << 30, 100 << 30}
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			if err := FormatExt4(t.Context(), path, size, FormatOptions{Label: "data"}); err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil || st.Size != size || st.Mode&0o777 != 0o600 {
				t.Errorf("size %d, mode %o, %v", st.Size, st.Mode, err)
			}
			if allocated, limit := st.Blocks*512, 3<<20+size>>15; allocated > limit {
				t.Errorf("%d bytes allocated, want at most %d", allocated, limit)
			}
			if out, err := exec.Command(e2fsck, "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
}

func TestFormatExt4Mounts(t *testing.T) {
	needTools(t)
	if !storetest.Isolated(t) {
		return
	}
	for _, size := range []int64{MinSizeMiB * mib, 129*mib + 512, 100 << 30} {
		dir := t.TempDir()
		path, at := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "mnt")
		opt := FormatOptions{Templates: filepath.Join(dir, "templates")}
		err := FormatExt4(t.Context(), filepath.Join(dir, "first"), size, opt) // leaves the template
		if err := errors.Join(err, FormatExt4(t.Context(), path, size, opt), os.Mkdir(at, 0o700)); err != nil {
			t.Fatal(err)
		}
		prereq.LoopMount(t, path, at, "rw")
		content := make([]byte, 800<<10)
		err = os.WriteFile(filepath.Join(at, "file"), content, 0o600)
		if err := errors.Join(err, unix.Unmount(at, 0)); err != nil {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestFormatExt4IsDeterministic(t *testing.T) {
	needTools(t)
	var sums [2][32]byte
	for i := range sums {
		path := filepath.Join(t.TempDir(), "disk.raw")
		if err := FormatExt4(t.Context(), path, 32*mib, FormatOptions{UUID: "11111111-2222-4333-8444-555555555555"}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = sha256.Sum256(b)
		for start := time.Now().Unix(); i == 0 && time.Now().Unix() == start; { // its times have seconds
			time.Sleep(10 * time.Millisecond)
		}
	}
	if sums[0] != sums[1] {
		t.Error("two images with one UUID differ")
	}
}

func TestFormatExt4Refuses(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	check := func(what string, err error, want errdefs.Kind) {
		t.Helper()
		if !errdefs.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 0 {
			t.Errorf("%s: left behind %v", what, left)
		}
	}
	check("too small", FormatExt4(t.Context(), path, MinSizeMiB*mib-1, FormatOptions{}), errdefs.InvalidConfig)
	check("bad uuid", FormatExt4(t.Context(), path, 4*mib, FormatOptions{UUID: "x"}), errdefs.IO)
	check("larger than a file", FormatExt4(t.Context(), path, 1<<62, FormatOptions{}), errdefs.InvalidConfig)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	check("cancelled", FormatExt4(ctx, path, 4*mib, FormatOptions{}), errdefs.Cancelled)

	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := FormatExt4(t.Context(), path, 4*mib, FormatOptions{}); !errdefs.Is(err, errdefs.IO) {
		t.Errorf("over a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Error("an existing file was touched")
	}
}

func TestFormatExt4FullDisk(t *testing.T) {
	needTools(t)
	if !storetest.Isolated(t) {
		return
	}
	dir := storetest.Tmpfs(t, "1m")
	storetest.Fill(t, dir)
	path := filepath.Join(dir, "disk.raw")
	if err := FormatExt4(t.Context(), path, 1<<30, FormatOptions{}); !errdefs.Is(err, errdefs.IO) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("image left: %v", err)
	}
}

func TestMissingTool(t *testing.T) {
	_, err := findTool("mkfs.of-nobody")
	var e *errdefs.Error
	if !errors.As(err, &e) || e.Kind != errdefs.UnsupportedOperation || e.Hint == "" {
		t.Errorf("findTool: %v", err)
	}
}

func TestFormatOf(t *testing.T) {
	for path, want := range map[string]string{
		"a.qcow2": "qcow2", "a.vmdk": "vmdk", "a.raw": "raw", "a.img": "raw", "a": "raw", "a.QCOW2": "raw", "a.qcow2.bak": "raw", "qcow2": "raw",
	} {
		if got := FormatOf(path); got != want {
			t.Errorf("FormatOf(%q) = %q, want %q", path, got, want)
		}
	}
}

func TestOpenRawLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	const ro, rw = true, false
	for name, tt := range map[string]struct {
		first, second bool
		ok            bool
	}{
		"writer and writer": {rw, rw, false}, "writer and reader": {rw, ro, false},
		"reader and writer": {ro, rw, false}, "reader and reader": {ro, ro, true},
	} {
		t.Run(name, func(t *testing.T) {
			a, id, err := OpenRaw(path, tt.first)
			if err != nil || id.Ino == 0 {
				t.Fatal(id, err)
			}
			b, _, err := OpenRaw(path, tt.second)
			if (err == nil) != tt.ok || (err != nil && !errors.Is(err, errdefs.ErrVolumeInUse)) {
				t.Errorf("second: %v", err)
			}
			a.Close()
			if b != nil {
				b.Close()
			}
			c, _, err := OpenRaw(path, rw)
			if err != nil {
				t.Fatalf("after both closed: %v", err)
			}
			c.Close()
		})
	}
}

func TestOpenRawRefuses(t *testing.T) {
	dir := t.TempDir()
	file, link, fifo := filepath.Join(dir, "f"), filepath.Join(dir, "l"), filepath.Join(dir, "p")
	err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(file, link), unix.Mkfifo(fifo, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]errdefs.Kind{
		link: errdefs.InvalidConfig, fifo: errdefs.InvalidConfig, dir: errdefs.InvalidConfig,
		"/dev/null": errdefs.InvalidConfig, filepath.Join(dir, "none"): errdefs.PathNotFound,
	} {
		if f, _, err := OpenRaw(path, false); !errdefs.Is(err, want) {
			t.Errorf("OpenRaw(%s) = %v, %v", path, f, err)
		}
	}
}

// TestOpenRawAgainstQEMU has qemu-io open an image that we hold, and the reverse.
func TestOpenRawAgainstQEMU(t *testing.T) {
	qemuIO, err := exec.LookPath("qemu-io")
	if err != nil {
		prereq.Missing(t, "qemu-io (package qemu-utils)")
	}
	path := filepath.Join(t.TempDir(), "i.raw")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, _, err := OpenRaw(path, false)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(qemuIO, "-f", "raw", "-c", "write 0 4k", path).CombinedOutput(); err == nil {
		t.Errorf("qemu-io wrote to an image that we hold:\n%s", out)
	}
	f.Close()

	cmd := exec.Command(qemuIO, "-f", "raw", path)
	stdin, _ := cmd.StdinPipe()
	stdout, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	_, _ = io.WriteString(stdin, "length\n")
	if _, err := stdout.Read(make([]byte, 1)); err != nil { // it has the image now
		t.Fatal(err)
	}
	if _, _, err := OpenRaw(path, true); !errors.Is(err, errdefs.ErrVolumeInUse) {
		t.Errorf("OpenRaw while qemu-io writes: %v", err)
	}
}

func BenchmarkFormatExt4(b *testing.B) {
	for _, gib := range []int64{1, 100} {
		b.Run(fmt.Sprintf("%dGiB", gib), func(b *testing.B) {
			dir := b.TempDir()
			for i := 0; b.Loop(); i++ {
				if err := FormatExt4(b.Context(), fmt.Sprint(dir, "/", i), gib<<30, FormatOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
