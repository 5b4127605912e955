package volumefs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// model is what the volume should hold, by path: the size of a file, or of a
// directory -1. All writes are atomic replacements, so no file has two names.
type model map[string]int64

// charge is the sum of charges but for what directories have grown beyond their
// first block, which only the file system knows.
func (m model) charge() (d ledger.Delta) {
	for _, size := range m {
		d.Inodes++
		if size < 0 {
			d.Bytes += ledger.Block
		} else {
			d.Bytes += ledger.Rules{}.File(size)
		}
	}
	return d
}

func (m model) makeParents(path string) {
	for dir := filepath.Dir(path); dir != "."; dir = filepath.Dir(dir) {
		m[dir] = -1
	}
}

func (m model) below(dir string) (names []string) {
	for name := range m {
		if strings.HasPrefix(name, dir+"/") {
			names = append(names, name)
		}
	}
	return names
}

// modelRun is a model beside two open file accesses of one volume.
type modelRun struct {
	t     *testing.T
	r     *rand.Rand
	m     model
	fs    []*FS
	b     *book
	limit ledger.Limits
	full  int // operations that the limit refused
}

// names are few, so that operations meet; some are long, so that directories grow.
func (x *modelRun) path() string {
	p := fmt.Sprint("f", x.r.IntN(30))
	if x.r.IntN(4) == 0 {
		p = strings.Repeat("long", 50) + fmt.Sprint(x.r.IntN(100))
	}
	for range x.r.IntN(3) {
		p = fmt.Sprint("d", x.r.IntN(4), "/") + p
	}
	return p
}

// step does one operation on both; what the volume refuses has no effect in the
// model.
func (x *modelRun) step() (what string, err error) {
	f, path := x.fs[x.r.IntN(len(x.fs))], x.path()
	size := x.r.Int64N(20 * ledger.Block)
	next := maps.Clone(x.m)
	switch x.r.IntN(9) {
	case 0, 1, 2:
		what, err = "write", f.Write(ctx, path, make([]byte, size), WriteOptions{})
		next.makeParents(path)
		next[path] = size
	case 3:
		what, err = "stream", x.stream(f, path, size)
		next.makeParents(path)
		next[path] = size
	case 4:
		from := x.path()
		what, err = "copy "+from, f.Copy(ctx, from, path, WriteOptions{})
		next.makeParents(path)
		next[path] = next[from]
	case 5:
		from := x.path()
		if x.r.IntN(4) == 0 {
			from, path = filepath.Dir(from), filepath.Dir(path)
		}
		what, err = "rename "+from, f.Rename(ctx, from, path, WriteOptions{})
		next.rename(from, path)
	case 6:
		what, err = "remove", f.Remove(ctx, path)
		delete(next, path)
	case 7:
		path = filepath.Join(path, "..", fmt.Sprint("d", x.r.IntN(4)))
		what, err = "mkdir", f.Mkdir(ctx, path)
		next.makeParents(path)
		next[path] = -1
	case 8:
		if x.r.IntN(3) > 0 {
			path = filepath.Dir(path)
		}
		what, err = "removeall", f.RemoveAll(ctx, path)
		for _, name := range append(next.below(path), path) {
			delete(next, name)
		}
	}
	if err == nil {
		x.m = next
	}
	return what + " " + path, err
}

func (m model) rename(from, to string) {
	if from == to {
		return
	}
	size := m[from]
	moved := m.below(from)
	sizes := map[string]int64{}
	for _, name := range moved {
		sizes[to+strings.TrimPrefix(name, from)] = m[name]
		delete(m, name)
	}
	delete(m, from)
	m.makeParents(to)
	m[to] = size
	maps.Copy(m, sizes)
}

func (x *modelRun) stream(f *FS, path string, size int64) error {
	w, err := f.OpenWrite(ctx, path, WriteOptions{})
	if err != nil {
		return err
	}
	defer w.Abort()
	for left := size; left > 0 && err == nil; {
		n := min(left, 1+x.r.Int64N(30_000))
		_, err = w.Write(make([]byte, n))
		left -= n
	}
	return errors.Join(err, w.Close())
}

// check compares ledger, walk, model and limit.
func (x *modelRun) check() error {
	s, err := x.b.l.State()
	if err != nil {
		return err
	}
	found, err := x.b.walkTree()
	if err != nil {
		return err
	}
	if s.Used != found || s.Unsettled {
		return fmt.Errorf("the ledger says %+v, the walk %+v", s, found)
	}
	if s.Used.Bytes > x.limit.Bytes || s.Used.Inodes > x.limit.Inodes {
		return fmt.Errorf("%+v is used, beyond %+v", s.Used, x.limit)
	}
	want := x.m.charge()
	if grown := found.Bytes - want.Bytes; found.Inodes != want.Inodes || grown < 0 || grown%ledger.Block != 0 || grown > x.directories()*8*ledger.Block {
		return fmt.Errorf("the walk says %+v, the model %+v", found, want)
	}
	return nil
}

func (x *modelRun) directories() int64 {
	n := int64(1) // the root
	for _, size := range x.m {
		if size < 0 {
			n++
		}
	}
	return n
}

func newModelRun(t *testing.T, seed uint64) *modelRun {
	base := t.TempDir()
	for _, name := range []string{"vol", "scratch"} {
		noErr(t, os.Mkdir(filepath.Join(base, name), 0o755))
	}
	x := &modelRun{t: t, r: rand.New(rand.NewPCG(seed, 1)), m: model{}, limit: ledger.Limits{Bytes: 1 << 20, Inodes: 60}}
	x.b = newBook(t, base)
	noErr(t, x.b.l.SetLimits(x.limit))
	for range 2 {
		f, done, err := openPair(base, Options{Volume: "v"})
		noErr(t, err)
		t.Cleanup(done)
		x.fs = append(x.fs, f)
	}
	return x
}

// modelSeed is printed, and can be given to run the same again.
func modelSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("MSB_TEST_MODEL_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		noErr(t, err)
	}
	t.Logf("MSB_TEST_MODEL_SEED=%d", seed)
	return seed
}

func modelSteps(t *testing.T) int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("MSB_TEST_MODEL_OPS"), "5000"))
	noErr(t, err)
	return n
}

// TestModel: after each of 5 000 random operations through two open accesses of
// one volume the ledger says what a walk finds, which is what the model says; the
// limits are never exceeded, and met often.
func TestModel(t *testing.T) {
	x := newModelRun(t, modelSeed(t))
	for i := range modelSteps(t) {
		what, err := x.step()
		if errors.Is(err, unix.ENOSPC) {
			x.full++
		} else if err != nil && !expected(err) {
			t.Fatalf("step %d, %s: %v", i, what, err)
		}
		if err := x.check(); err != nil {
			t.Fatalf("step %d, %s: %v", i, what, err)
		}
	}
	if x.full == 0 {
		t.Error("the limits were never met")
	}
	t.Logf("%d refused by the limits", x.full)
}

// expected are the ways in which random operations fail.
func expected(err error) bool {
	return slices.ContainsFunc([]error{
		fs.ErrNotExist, unix.EISDIR, unix.ENOTDIR, unix.EINVAL, unix.EEXIST, unix.ENOTEMPTY, unix.EBUSY,
	}, func(e error) bool { return errors.Is(err, e) })
}

// TestModelFindsPlantedBugs: one charge that is missing, or one refund, is found.
func TestModelFindsPlantedBugs(t *testing.T) {
	bugs := map[string]func(x *modelRun) error{
		"a file is not charged":  func(x *modelRun) error { return os.WriteFile(x.host("bug"), []byte("x"), 0o600) },
		"a name is not charged":  func(x *modelRun) error { return os.WriteFile(x.host("bug"), nil, 0o600) },
		"growth is not charged":  func(x *modelRun) error { return os.Truncate(x.host("f"), 5000) },
		"a file is not refunded": func(x *modelRun) error { return os.Remove(x.host("f")) },
		"a cut is not refunded":  func(x *modelRun) error { return os.Truncate(x.host("f"), 0) },
		"an attribute is not charged": func(x *modelRun) error {
			return unix.Setxattr(x.host("f"), "user.x", make([]byte, 100), 0)
		},
	}
	for name, plant := range bugs {
		t.Run(name, func(t *testing.T) {
			x := newModelRun(t, 1)
			noErr(t, x.fs[0].Write(ctx, "f", make([]byte, 100), WriteOptions{}))
			x.m["f"] = 100
			for range 20 {
				_, _ = x.step()
			}
			noErr(t, x.fs[0].Write(ctx, "f", make([]byte, 100), WriteOptions{}))
			x.m["f"] = 100
			noErr(t, x.check())
			noErr(t, plant(x))
			if x.check() == nil {
				t.Error("not found")
			}
		})
	}
}

func (x *modelRun) host(name string) string { return filepath.Join(x.b.base, "vol", name) }

// TestModelTogether: four goroutines over two accesses change the same names at
// once. The ledger never says more than the limit but for what is announced and taken
// back again, and is exact at the end. (A walk meanwhile would prove nothing: it
// finds twice what is renamed under it.)
func TestModelTogether(t *testing.T) {
	seed := modelSeed(t)
	x := newModelRun(t, seed)
	var wg sync.WaitGroup
	for i := range uint64(4) {
		y := *x
		y.r, y.m = rand.New(rand.NewPCG(seed, i)), model{}
		wg.Go(func() {
			for range modelSteps(t) / 8 {
				what, err := y.step()
				gone := errors.Is(err, unix.EPERM) // what ext4 says of a directory that is removed just now
				if err != nil && !expected(err) && !gone && !errors.Is(err, unix.ENOSPC) {
					t.Errorf("%s: %v", what, err)
				}
				announced := ledger.Delta{Bytes: 4 * 24 * ledger.Block, Inodes: 4}
				if s, err := y.b.l.State(); err != nil || s.Used.Bytes > x.limit.Bytes+announced.Bytes || s.Used.Inodes > x.limit.Inodes+announced.Inodes {
					t.Errorf("%s: %+v, %v", what, s, err)
				}
			}
		})
	}
	wg.Wait()
	if s := x.b.state(t); s.Unsettled { // a call that took a second: others went on without it
		t.Logf("a walk is asked for: %+v", s)
		x.b.settle(t)
	}
	x.b.check(t)
}
