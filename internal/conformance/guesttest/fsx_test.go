package guesttest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// FsxSeedEnv repeats a run: the seed that a failure printed.
const FsxSeedEnv = "MSB_FSX_SEED"

const (
	fsxMax = 256 << 10 // bytes of the file
	fsxOps = 800
)

// fsx is a file and what must be in it.
type fsx struct {
	t      *testing.T
	rng    *rand.Rand
	path   string
	f      *os.File
	want   []byte
	buf    []byte
	trace  []string
	mapped []byte // a shared mapping of the whole file, if there is one
}

// TestFsx does random things to one file, through read and write and through
// shared mappings, and compares it each time with a copy in memory.
func TestFsx(t *testing.T) {
	seed := rand.Uint64()
	if s := os.Getenv(FsxSeedEnv); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	t.Logf("%s=%d", FsxSeedEnv, seed)
	x := &fsx{t: t, rng: rand.New(rand.NewPCG(seed, 0)), path: filepath.Join(workDir(t), "file"), buf: make([]byte, fsxMax+8)}
	x.open(os.O_CREATE)
	defer func() { x.unmap(); x.f.Close() }()
	ops := []struct {
		weight int
		name   string
		run    func() error
	}{
		{30, "write", x.write}, {20, "read", x.read}, {8, "truncate", x.truncate}, {8, "punch", x.punch},
		{12, "store", x.store}, {12, "load", x.load}, {3, "sync", func() error { return x.f.Sync() }},
		{3, "reopen", x.reopen}, {3, "append", x.append}, {3, "allocate", x.allocate}, {2, "seek", x.seekHole},
		{4, "copy", x.copyRange},
	}
	total := 0
	for _, op := range ops {
		total += op.weight
	}
	for i := range fsxOps {
		n := x.rng.IntN(total)
		for _, op := range ops {
			if n -= op.weight; n >= 0 {
				continue
			}
			if err := op.run(); err != nil {
				x.fail(i, op.name, err)
			}
			break
		}
	}
	x.whole(fsxOps)
}

func (x *fsx) note(format string, args ...any) {
	x.trace = append(x.trace, fmt.Sprintf(format, args...))
}

func (x *fsx) fail(i int, op string, err error) {
	x.t.Helper()
	for _, line := range x.trace[max(0, len(x.trace)-30):] {
		x.t.Log(line)
	}
	x.t.Fatalf("operation %d, %s: %v", i, op, err)
}

func (x *fsx) open(flags int) {
	f, err := os.OpenFile(x.path, os.O_RDWR|flags, 0o644)
	if err != nil {
		x.t.Fatal(err)
	}
	x.f = f
}

// span picks a range; within the file if inside is set.
func (x *fsx) span(inside bool) (off, n int) {
	limit := fsxMax
	if inside {
		limit = len(x.want)
	}
	if limit == 0 {
		return 0, 0
	}
	off = x.rng.IntN(limit)
	if x.rng.IntN(4) == 0 {
		off &^= 4095
	}
	n = x.rng.IntN(min(limit-off, 16_000) + 1)
	return off, n
}

func (x *fsx) random(n int) []byte {
	b := x.buf[: n+7 : n+7]
	v := x.rng.Uint64() | 0x0101010101010101 // no zero bytes: those are holes
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], v)
	}
	return b[:n]
}

func (x *fsx) grow(n int) {
	for len(x.want) < n {
		x.want = append(x.want, make([]byte, n-len(x.want))...)
	}
}

func (x *fsx) write() error {
	off, n := x.span(false)
	b := x.random(n)
	x.note("write %d+%d", off, n)
	if got, err := x.f.WriteAt(b, int64(off)); err != nil || got != n {
		return fmt.Errorf("%d of %d: %v", got, n, err)
	}
	if n > 0 {
		x.grow(off + n)
		copy(x.want[off:], b)
	}
	return x.size()
}

func (x *fsx) append() error {
	n := min(x.rng.IntN(5000), fsxMax-len(x.want))
	b := x.random(n)
	x.note("append %d", n)
	f, err := os.OpenFile(x.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return err
	}
	x.want = append(x.want, b...)
	return x.size()
}

func (x *fsx) read() error {
	off, n := x.span(true)
	x.note("read %d+%d", off, n)
	return x.compare(off, n)
}

func (x *fsx) compare(off, n int) error {
	got := make([]byte, n)
	if r, err := x.f.ReadAt(got, int64(off)); r != n {
		return fmt.Errorf("%d of %d bytes at %d of %d: %v", r, n, off, len(x.want), err)
	}
	return same(got, x.want[off:off+n], off)
}

func same(got, want []byte, off int) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d is %#x, want %#x", off+i, got[i], want[i])
		}
	}
	return nil
}

func (x *fsx) truncate() error {
	n := x.rng.IntN(fsxMax)
	x.note("truncate %d to %d", len(x.want), n)
	x.unmap() // a mapping beyond the end faults
	if err := x.f.Truncate(int64(n)); err != nil {
		return err
	}
	x.want = x.want[:min(n, len(x.want))]
	x.grow(n)
	return x.size()
}

func (x *fsx) punch() error {
	off, n := x.span(true)
	if n == 0 {
		return nil
	}
	x.note("punch %d+%d", off, n)
	err := unix.Fallocate(int(x.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
	if err != nil {
		return err
	}
	clear(x.want[off : off+n])
	return x.compare(off, n)
}

func (x *fsx) allocate() error {
	off, n := x.span(false)
	if n == 0 {
		return nil
	}
	x.note("allocate %d+%d", off, n)
	if err := unix.Fallocate(int(x.f.Fd()), 0, int64(off), int64(n)); err != nil {
		return err
	}
	x.grow(off + n)
	return x.size()
}

// seekHole checks what SEEK_DATA and SEEK_HOLE promise: a hole reads as zero.
func (x *fsx) seekHole() error {
	off, n := x.span(true)
	if n == 0 {
		return nil
	}
	x.note("seek %d", off)
	// Linux asks the server and does not write back what was stored first.
	if x.mapped != nil {
		if err := unix.Msync(x.mapped, unix.MS_SYNC); err != nil {
			return err
		}
	}
	data, err := unix.Seek(int(x.f.Fd()), int64(off), unix.SEEK_DATA)
	if err == unix.ENXIO {
		data = int64(len(x.want))
	} else if err != nil {
		return err
	}
	if hole := x.want[off:data]; bytes.Count(hole, []byte{0}) != len(hole) {
		return fmt.Errorf("from %d the next data is at %d, but between are bytes that are not zero", off, data)
	}
	return nil
}

func (x *fsx) copyRange() error {
	from, n := x.span(true)
	if n == 0 || n > fsxMax/4 {
		return nil
	}
	to := x.rng.IntN(fsxMax - n)
	if to < from+n && from < to+n {
		return nil // the call refuses what overlaps
	}
	x.note("copy %d+%d to %d", from, n, to)
	src, dst := int64(from), int64(to)
	for left := n; left > 0; {
		done, err := unix.CopyFileRange(int(x.f.Fd()), &src, int(x.f.Fd()), &dst, left, 0)
		if err != nil || done == 0 {
			return fmt.Errorf("%d left: %d, %v", left, done, err)
		}
		left -= done
	}
	x.grow(to + n)
	copy(x.want[to:to+n], x.want[from:from+n])
	return x.compare(to, n)
}

func (x *fsx) reopen() error {
	x.note("reopen")
	x.unmap()
	if err := x.f.Close(); err != nil {
		return err
	}
	x.open(0)
	return x.size()
}

// size compares the file's size.
func (x *fsx) size() error {
	st, err := x.f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != int64(len(x.want)) {
		return fmt.Errorf("size is %d, want %d", st.Size(), len(x.want))
	}
	return nil
}

// whole compares everything, through a new descriptor.
func (x *fsx) whole(i int) {
	got, err := os.ReadFile(x.path)
	if err == nil && len(got) != len(x.want) {
		err = fmt.Errorf("%d bytes, want %d", len(got), len(x.want))
	}
	if err == nil {
		err = same(got, x.want, 0)
	}
	if err != nil {
		x.fail(i, "at the end", err)
	}
}
