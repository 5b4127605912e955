package ledger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestRules: the charge rule, number by number.
func TestRules(t *testing.T) {
	physical, flat := Rules{DirSizes: true}, Rules{}
	tests := map[string][2]int64{
		"empty file":             {flat.File(0), 0},
		"one byte":               {flat.File(1), Block},
		"a block":                {flat.File(Block), Block},
		"more than a block":      {flat.File(Block + 1), 2 * Block},
		"more than there can be": {flat.File(1<<63 - 1), MaxCharge},
		"link of 59":             {flat.Link(59), 0},
		"link of 60":             {flat.Link(60), Block},
		"small directory":        {physical.Dir(60), Block},
		"directory":              {physical.Dir(3 * Block), 3 * Block},
		"directory elsewhere":    {flat.Dir(3 * Block), Block},
		"root":                   {physical.Root(Block), 0},
		"grown root":             {physical.Root(3 * Block), 2 * Block},
		"root elsewhere":         {flat.Root(100), 0},
		"attributes of 64":       {flat.Xattrs(64), 0},
		"attributes of 65":       {flat.Xattrs(65), Block},
		"default inodes":         {DefaultInodes(1 << 30), 1 << 18},
		"default inodes, small":  {DefaultInodes(1), 1024},
		"default inodes, none":   {DefaultInodes(0), 0},
	}
	for name, got := range tests {
		if got[0] != got[1] {
			t.Errorf("%s: %d, want %d", name, got[0], got[1])
		}
	}
	for name, want := range map[string]bool{
		"user.x": true, "user.": false, overlayXattr: false, "security.capability": false, "trusted.x": false,
		"system.posix_acl_access": true, "system.posix_acl_default": true,
	} {
		if CountedXattr(name) != want {
			t.Errorf("%s counted: %v", name, !want)
		}
	}
}

// TestWalk: what is there is charged by the rule, each inode once, each name.
func TestWalk(t *testing.T) {
	v := newVolume(t, Limits{})
	at := func(name string) string { return filepath.Join(v.dir(), name) }
	standin := make([]byte, 20)
	standin[0] = 1
	binary.LittleEndian.PutUint32(standin[12:], unix.S_IFLNK|0o777)
	write := func(name string, n int) func() error {
		return func() error { return os.WriteFile(at(name), make([]byte, n), 0o600) }
	}
	steps := []struct {
		what string
		do   func() error
		more Delta
	}{
		{"nothing", func() error { return nil }, Delta{}},
		{"file", write("f", 5000), Delta{2 * Block, 1}},
		{"second name", func() error { return os.Link(at("f"), at("g")) }, Delta{0, 1}},
		{"hole", func() error { return os.Truncate(at("f"), 10*Block) }, Delta{8 * Block, 0}},
		{"directory", func() error { return os.Mkdir(at("d"), 0o700) }, Delta{Block, 1}},
		{"FIFO", func() error { return unix.Mkfifo(at("p"), 0o600) }, Delta{0, 1}},
		{"link", func() error { return os.Symlink(strings.Repeat("x", 60), at("d/l")) }, Delta{Block, 1}},
		{"few attributes", func() error { return unix.Setxattr(at("f"), "user.a", make([]byte, 50), 0) }, Delta{}},
		{"attributes", func() error { return unix.Setxattr(at("f"), "user.b", make([]byte, 50), 0) }, Delta{Block, 0}},
		{"attributes of a directory", func() error { return unix.Setxattr(at("d"), "user.b", make([]byte, 100), 0) }, Delta{Block, 0}},
		{"file of 40", write("s", 40), Delta{Block, 1}},
		{"that stands in for a link", func() error { return unix.Setxattr(at("s"), overlayXattr, standin, 0) }, Delta{-Block, 0}},
	}
	total := Delta{}
	for _, s := range steps {
		if err := s.do(); err == unix.EOPNOTSUPP {
			t.Skip("missing: user attributes in ", v.dir())
		} else if err != nil {
			t.Fatal(err)
		}
		total = total.Plus(s.more)
		if got := v.walk(); got != total {
			t.Errorf("%s: %+v, want %+v", s.what, got, total)
			total = got
		}
	}
	dir, err := os.Open(v.dir())
	v.ok(err)
	defer dir.Close()
	if _, err := Walk(context.Background(), dir, 3); err != ErrBudget {
		t.Errorf("a walk of 3: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Walk(ctx, dir, 0); err != context.Canceled {
		t.Errorf("a cancelled walk: %v", err)
	}
}

// TestWalkIsDeep: directories nested deeper than files may be open, and longer
// than a path may be, are counted.
func TestWalkIsDeep(t *testing.T) {
	v := newVolume(t, Limits{})
	const deep = 3000
	fd, err := unix.Open(v.dir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	v.ok(err)
	for range deep {
		v.ok(unix.Mkdirat(fd, "directory", 0o700))
		v.ok(unix.Mkdirat(fd, "beside", 0o700))
		next, err := unix.Openat(fd, "directory", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		v.ok(err)
		v.ok(unix.Close(fd))
		fd = next
	}
	v.ok(unix.Close(fd))
	before, err := os.ReadDir("/proc/self/fd")
	v.ok(err)
	if got, want := v.walk(), (Delta{2 * deep * Block, 2 * deep}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if after, err := os.ReadDir("/proc/self/fd"); err != nil || len(after) != len(before) {
		t.Errorf("%d descriptors, %d before", len(after), len(before))
	}
}

// TestDirGrowth: what is said not to grow does not, and what may grow does not
// grow more than was said.
func TestDirGrowth(t *testing.T) {
	v := newVolume(t, Limits{})
	if !v.rules.DirSizes {
		t.Skip("missing: a file system whose directories have blocks in ", v.base)
	}
	dir, err := os.Open(v.dir())
	v.ok(err)
	defer dir.Close()
	size := func() int64 { return v.rules.Dir(sizeAt(v.dir())) }
	certain := 0
	for i := range 3000 {
		name := strings.Repeat("n", 1+i%200) + string(rune('a'+i%26)) + strings.Repeat("m", i/200)
		bound := v.rules.DirGrowth(int(dir.Fd()), len(name), true)
		most := v.rules.DirGrowth(int(dir.Fd()), len(name), false)
		before := size()
		v.ok(os.WriteFile(filepath.Join(v.dir(), name), nil, 0o600))
		if grew := size() - before; grew > bound || bound > most {
			t.Fatalf("name %d: grew by %d, said %d and %d", i, grew, bound, most)
		}
		if bound == 0 {
			certain++
		}
	}
	if certain < 10 {
		t.Errorf("certain of %d names", certain)
	}
	if size() < 20*Block {
		t.Errorf("the directory has %d bytes", size())
	}
}

// TestSumsAreBounded: sums stop at their bound, from both sides, and come back
// from it.
func TestSumsAreBounded(t *testing.T) {
	top, one := Delta{maxValue, maxValue}, Delta{1, 1}
	far := Delta{math.MaxInt64, math.MinInt64}
	for name, tt := range map[string][2]Delta{
		"more than there can be": {top.Plus(one), top},
		"twice that":             {top.Plus(top), top},
		"less":                   {Delta{}.Minus(top).Minus(one), Delta{-maxValue, -maxValue}},
		"and back":               {top.Plus(top).Minus(one), Delta{maxValue - 1, maxValue - 1}},
		"numbers from anywhere":  {far.Plus(far), Delta{maxValue, -maxValue}},
		"their difference":       {Delta{}.Minus(far), Delta{-maxValue, maxValue}},
	} {
		if tt[0] != tt[1] {
			t.Errorf("%s: %+v, want %+v", name, tt[0], tt[1])
		}
	}
}

// TestHugeSparseFiles: files of more than there can be, in number enough to wrap
// 64 bits of charges, are more than any limit, for the walk, a writer and the
// ledger; and when they are gone nothing is left of them.
func TestHugeSparseFiles(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	v := &volume{t: t, base: storetest.Tmpfs(t, "64m")} // a file may have 8 EiB there
	v.make(Limits{})
	const files, size = 4096, 1<<63 - Block
	for i := range files {
		f, err := os.Create(filepath.Join(v.dir(), fmt.Sprint(i)))
		v.ok(err)
		v.ok(errors.Join(f.Truncate(size), f.Close()))
		if i == 2 {
			if got, want := v.walk().Bytes, int64(3*MaxCharge); got != want {
				t.Errorf("three of them: %d, want %d", got, want)
			}
		}
	}
	if got := v.walk(); got != (Delta{maxValue, files}) {
		t.Errorf("walk: %+v", got)
	}
	a := v.actor(Options{})
	for range 2 {
		w, err := v.l.Settle(t.Context(), func(context.Context) (Delta, error) { return walkDir(v.dir()) })
		if s := v.state(); err != nil || !w.Exact || s.Used != (Delta{maxValue, files}) || !s.Unsettled {
			t.Errorf("settled: %+v, %v: %+v", w, err, s)
		}
		for range 100 { // a slot that is full, too
			v.ok(charge(a.w, Delta{Bytes: MaxCharge}))
		}
		if s := v.state(); s.Used != (Delta{maxValue, files}) {
			t.Errorf("charged: %+v", s)
		}
	}
	v.ok(v.l.SetLimits(Limits{Bytes: 1 << 52}))
	if err := charge(a.w, Delta{Bytes: 1}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("beyond every limit: %v", err)
	}
	for i := range files {
		v.ok(os.Remove(filepath.Join(v.dir(), fmt.Sprint(i))))
	}
	v.settle()
}

// TestWalkStaysOnItsFileSystem: what is mounted on a directory of the volume is no
// part of it, and neither is the directory under it while it cannot be seen.
func TestWalkStaysOnItsFileSystem(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	v := newVolume(t, Limits{})
	at := func(name string) string { return filepath.Join(v.dir(), name) }
	for _, dir := range []string{"d", "d/mnt", "e"} {
		v.ok(os.Mkdir(at(dir), 0o700))
	}
	v.ok(os.WriteFile(at("d/f"), []byte("x"), 0o600))
	before := v.walk()
	v.ok(unix.Mount("tmpfs", at("d/mnt"), "tmpfs", 0, "size=1m"))
	defer func() { v.ok(unix.Unmount(at("d/mnt"), unix.MNT_DETACH)) }()
	v.ok(os.WriteFile(at("d/mnt/g"), make([]byte, 100_000), 0o600))
	v.ok(os.Mkdir(at("d/mnt/sub"), 0o700))
	if got, want := v.walk(), before.Minus(Delta{Block, 1}); got != want {
		t.Errorf("with a mount: %+v, want %+v", got, want)
	}
}
