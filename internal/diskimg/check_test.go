package diskimg

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestMain lets the test binary be msb for confined programs.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "confine-exec" {
		os.Exit(confine.Main(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// debugfs changes an image with a program of e2fsprogs.
func debugfs(t testing.TB, path, request string) {
	t.Helper()
	tool, err := findTool("debugfs")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "-w", "-R", request, path).CombinedOutput(); err != nil {
		t.Fatalf("debugfs %s: %v\n%s", request, err, out)
	}
}

// seeded makes an image with some files in it; features are added to or, with
// "^", taken from ours.
func seeded(t testing.TB, path, features string) {
	t.Helper()
	tree := t.TempDir()
	for i := range 40 {
		dir := filepath.Join(tree, fmt.Sprint("d", i%5), fmt.Sprint("sub", i%3))
		err := os.MkdirAll(dir, 0o755)
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i)), make([]byte, i*700), 0o644))
		if err := errors.Join(err, os.Symlink(strings.Repeat("x", 10+i*4), filepath.Join(dir, fmt.Sprint("link", i)))); err != nil {
			t.Fatal(err)
		}
	}
	tool, err := findTool("mkfs.ext4")
	if err != nil {
		t.Fatal(err)
	}
	opt := FormatOptions{UUID: randomUUID()}
	args := mkfsArgs(8*mib, opt, "")
	if features != "" {
		args = append(args, "-O", features)
	}
	if err := run(t.Context(), tool, append(args, "-d", tree, path, "8192k")); err != nil {
		t.Fatal(err)
	}
}

func checkImage(t testing.TB, path string, limits Limits) error {
	t.Helper()
	f, _, err := OpenRaw(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return CheckExt4(t.Context(), "/proc/self/exe", f, path, limits)
}

func TestCheckExt4(t *testing.T) {
	e2fsck := needTools(t)
	for name, tt := range map[string]struct {
		damage []string
		want   errdefs.Kind // Unknown: mended
		says   string
	}{
		"sound":              {},
		"not unmounted":      {damage: []string{"set_super_value state 0"}},
		"journal to replay":  {damage: []string{"feature needs_recovery"}},
		"wrong free counts":  {damage: []string{"set_super_value state 0", "set_super_value free_blocks_count 3"}},
		"no root directory":  {damage: []string{"clri <2>", "set_super_value state 2"}, want: errdefs.Filesystem, says: "root inode"},
		"unknown feature":    {damage: []string{"feature FEATURE_I29"}, want: errdefs.Filesystem},
		"journal elsewhere":  {damage: []string{"set_super_value journal_uuid " + randomUUID(), "set_super_value journal_inum 0"}, want: errdefs.Filesystem},
		"beyond the image":   {damage: []string{"set_super_value blocks_count 99999999"}, want: errdefs.Filesystem},
		"directory and file": {damage: []string{"set_inode_field /d1 mode 0100644", "set_super_value state 2"}, want: errdefs.Filesystem},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			seeded(t, path, "")
			for _, request := range tt.damage {
				debugfs(t, path, request)
			}
			err := checkImage(t, path, Limits{})
			if tt.want != errdefs.Unknown {
				var e *errdefs.Error
				if !errors.As(err, &e) || e.Kind != tt.want || e.Hint == "" || !strings.Contains(strings.ToLower(e.Msg), tt.says) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(e2fsck, "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("afterwards: %v\n%s", err, out)
			}
		})
	}
}

// TestCheckExt4OfNoFileSystem: what is no file system at all is said to be
// damaged, in e2fsck's words for why and not in its advice.
func TestCheckExt4OfNoFileSystem(t *testing.T) {
	needTools(t)
	for name, tt := range map[string]struct {
		size int64
		says string
	}{
		"empty": {0, "has 0 bytes"}, "tiny": {1000, "has 1000 bytes"}, "zeroes": {1 << 20, "bad magic number"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, tt.size)); err != nil {
				t.Fatal(err)
			}
			var e *errdefs.Error
			if err := checkImage(t, path, Limits{}); !errors.As(err, &e) || e.Kind != errdefs.Filesystem || e.Hint == "" || !strings.Contains(strings.ToLower(e.Msg), tt.says) {
				t.Errorf("%v, want %q and a hint", err, tt.says)
			}
		})
	}
}

// claimed makes an image with multiple mount protection look as if another host
// had it mounted that renews its claim every 300 s.
func claimed(t testing.TB, path string) {
	t.Helper()
	const seqAt, intervalAt = 4, 112 // struct mmp_struct
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block := binary.LittleEndian.Uint64(b[1024+0x168:]) * 1024 // s_mmp_block
	binary.LittleEndian.PutUint32(b[block+seqAt:], 5)
	binary.LittleEndian.PutUint16(b[block+intervalAt:], 300)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCheckExt4IsBounded: an image that makes e2fsck wait for minutes (another
// host is said to have it mounted) costs the limit and no more; a cancelled check
// ends at once; neither leaves a process.
func TestCheckExt4IsBounded(t *testing.T) {
	needTools(t)
	path := filepath.Join(t.TempDir(), "disk.raw")
	seeded(t, path, "mmp,^metadata_csum")
	claimed(t, path)
	start := time.Now()
	err := checkImage(t, path, Limits{Wall: 300 * time.Millisecond})
	if !errdefs.Is(err, errdefs.Filesystem) || !strings.Contains(err.Error(), "not done after 300ms") {
		t.Errorf("limit: %v", err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %s", took)
	}
	f, _, err := OpenRaw(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := CheckExt4(ctx, "/proc/self/exe", f, path, Limits{}); !errdefs.Is(err, errdefs.Cancelled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestCheckExt4ServesTheOpenImage: another file put at the path is not touched.
func TestCheckExt4ServesTheOpenImage(t *testing.T) {
	needTools(t)
	path := filepath.Join(t.TempDir(), "disk.raw")
	seeded(t, path, "")
	f, _, err := OpenRaw(path, false)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	other := []byte("somebody else's")
	if err := errors.Join(os.Rename(path, path+".moved"), os.WriteFile(path, other, 0o600)); err != nil {
		t.Fatal(err)
	}
	if confine.Inspect().PrivateRoot() {
		if err := CheckExt4(t.Context(), "/proc/self/exe", f, path, Limits{}); err == nil {
			t.Error("the other file was checked")
		}
	}
	if b, err := os.ReadFile(path); string(b) != string(other) {
		t.Errorf("the other file was changed: %q, %v", b, err)
	}
}

// mutations of one image.
const (
	shortMutants  = 100
	normalMutants = 1000
	mutantsVar    = "MSB_SOAK_IMAGES" // another number, for long runs
)

// TestMutatedImages gives the confined e2fsck images that a hostile guest might
// leave: each is mended or refused, within the limits, and is as long as before.
func TestMutatedImages(t *testing.T) {
	needTools(t)
	count := normalMutants
	if testing.Short() {
		count = shortMutants
	}
	if n, err := strconv.Atoi(os.Getenv(mutantsVar)); err == nil {
		count = n
	}
	dir := storetest.Memory(t)
	var bases [][]byte
	for i, features := range []string{"", "^metadata_csum", "^has_journal,^metadata_csum", "bigalloc", "inline_data,^metadata_csum"} {
		path := filepath.Join(dir, fmt.Sprint("base", i))
		seeded(t, path, features)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bases = append(bases, b)
	}
	limits := Limits{CPU: 10 * time.Second, Wall: 20 * time.Second, Memory: 256 * mib}
	start := time.Now()
	var next, mended, refused, limited atomic.Int64
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			for n := next.Add(1); n <= int64(count) && !t.Failed(); n = next.Add(1) {
				// A path of its own: a child of the other worker that has not
				// executed yet may hold our descriptors and so their locks.
				path := filepath.Join(dir, fmt.Sprint("mutant", n))
				b := mutant(bases[n%int64(len(bases))], uint64(n))
				if err := os.WriteFile(path, b, 0o600); err != nil {
					t.Error(err)
					return
				}
				err := checkImage(t, path, limits)
				switch {
				case err == nil:
					mended.Add(1)
				case errdefs.Is(err, errdefs.Filesystem) && strings.Contains(err.Error(), "limits"), errdefs.Is(err, errdefs.Filesystem) && strings.Contains(err.Error(), "not done"):
					limited.Add(1)
				case errdefs.Is(err, errdefs.Filesystem):
					refused.Add(1)
				default:
					t.Errorf("mutant %d: %v", n, err)
				}
				if fi, err := os.Stat(path); err != nil || fi.Size() != int64(len(b)) {
					t.Errorf("mutant %d: %v, %v", n, fi, err)
				}
				_ = os.Remove(path)
			}
		})
	}
	wg.Wait()
	t.Logf("soak: part=images images=%d mended_or_sound=%d refused=%d stopped_by_a_limit=%d findings=0 seconds=%.0f",
		count, mended.Load(), refused.Load(), limited.Load(), time.Since(start).Seconds())
	if count >= normalMutants && (mended.Load() == 0 || refused.Load() == 0) {
		t.Error("the mutations are too weak or too strong")
	}
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &ru); err != nil || ru.Maxrss > 256<<10 {
		t.Errorf("a child had %d KiB in memory, %v", ru.Maxrss, err)
	}
}

// mutant is a copy of an image with some changes in what is not zero, mostly
// metadata. Every other one keeps the superblock's checksum right, so that
// e2fsck believes it and looks further.
func mutant(base []byte, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := append([]byte(nil), base...)
	for range 1 + r.IntN(24) {
		at := r.IntN(len(b))
		switch r.IntN(4) {
		case 0: // superblock
			at = 1024 + r.IntN(1024)
		case 1: // group descriptors, bitmaps, inode tables
			at = 2048 + r.IntN(1<<20)
		}
		for range 4096 { // the next byte that is something
			if at < len(b) && b[at] != 0 {
				break
			}
			at = (at + 1) % len(b)
		}
		if r.IntN(2) == 0 {
			b[at] ^= 1 << r.IntN(8)
		} else if at+4 <= len(b) {
			binary.LittleEndian.PutUint32(b[at:], []uint32{0, 1, 0x7fffffff, 0xffffffff, r.Uint32()}[r.IntN(5)])
		}
	}
	if seed%2 == 0 {
		binary.LittleEndian.PutUint16(b[1024+0x3a:], 0) // s_state: not clean, so all is checked
		sum := ^crc32.Update(0, crc32.MakeTable(crc32.Castagnoli), b[1024:1024+1020])
		binary.LittleEndian.PutUint32(b[1024+1020:], sum)
	}
	return b
}
