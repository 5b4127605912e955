package fuseserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// quotaSoak is another number of operations, quotaSeed repeats a run.
const quotaSoak, quotaSeed = "MSB_TEST_MODEL_OPS", "MSB_TEST_MODEL_SEED"

// player is somebody who changes the volume at random.
type player interface {
	step(r *rand.Rand) error
	// rest gives back what is not open any more.
	rest(r *rand.Rand)
}

// expected are the errors that a random operation may meet.
var expected = []errno{unix.ENOSPC, unix.ENOENT, unix.EEXIST, unix.ENOTDIR, unix.EISDIR, unix.ENOTEMPTY, unix.EINVAL,
	unix.ESTALE, unix.ELOOP, unix.EPERM, unix.ENODATA, unix.EOPNOTSUPP, unix.EBUSY}

// guestPlayer is a guest. It keeps some files open and remembers some names.
type guestPlayer struct {
	*share
	open  []*guestFile
	known map[uint64]uint64 // lookups by node
}

func (g *guestPlayer) String() string { return "guest" }

func someName(r *rand.Rand) string { return fmt.Sprintf("n%d", r.IntN(12)) }

// dir returns a directory: the root, or one in it.
func (g *guestPlayer) dir(r *rand.Rand) uint64 {
	if r.IntN(3) == 0 {
		if e, err := g.look(rootID, fmt.Sprintf("d%d", r.IntN(2))); err == 0 {
			return e.NodeID
		}
	}
	return rootID
}

func (g *guestPlayer) look(dir uint64, name string) (w.EntryOut, errno) {
	return g.keep(g.lookup(dir, name))
}

func (g *guestPlayer) keep(e w.EntryOut, err errno) (w.EntryOut, errno) {
	if err == 0 {
		g.known[e.NodeID]++
	}
	return e, err
}

// file returns an open file, one that is open already or one more.
func (g *guestPlayer) file(r *rand.Rand) (*guestFile, errno) {
	if n := len(g.open); n > 0 && r.IntN(3) > 0 {
		return g.open[r.IntN(n)], 0
	}
	e, err := g.look(g.dir(r), someName(r))
	if err != 0 {
		return nil, err
	}
	flags := uint32(unix.O_RDWR)
	if r.IntN(5) == 0 {
		flags |= unix.O_TRUNC
	}
	fh, err := g.share.open(e.NodeID, flags)
	if err != 0 {
		return nil, err
	}
	g.open = append(g.open, &guestFile{g.share, e.NodeID, fh})
	return g.open[len(g.open)-1], 0
}

func (g *guestPlayer) step(r *rand.Rand) error {
	if err := g.one(r); err != 0 && !slices.Contains(expected, err) {
		return fmt.Errorf("guest: %w", err)
	}
	return nil
}

// one does one operation.
func (g *guestPlayer) one(r *rand.Rand) errno {
	dir, name := g.dir(r), someName(r)
	switch r.IntN(14) {
	case 0, 1:
		e, fh, err := g.create(dir, name, unix.O_RDWR, 0o600)
		if _, err = g.keep(e, err); err == 0 {
			g.open = append(g.open, &guestFile{g.share, e.NodeID, fh})
		}
		return err
	case 2:
		_, err := g.keep(g.mkdir(rootID, fmt.Sprintf("d%d", r.IntN(2)), 0o700))
		return err
	case 3:
		_, err := g.keep(g.symlink(dir, name, pattern(1+r.IntN(200))))
		return err
	case 4:
		e, err := g.look(g.dir(r), someName(r))
		if err == 0 {
			_, err = g.keep(g.link(e.NodeID, dir, name))
		}
		return err
	case 5, 6:
		return g.unlink(dir, name)
	case 7:
		return g.rmdir(rootID, fmt.Sprintf("d%d", r.IntN(2)))
	case 8:
		return g.rename(dir, name, g.dir(r), someName(r), []uint32{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[r.IntN(4)])
	case 9:
		return g.attribute(r)
	case 10:
		return g.nameless(r, dir, name)
	}
	return g.change(r)
}

func (g *guestPlayer) attribute(r *rand.Rand) errno {
	e, err := g.look(g.dir(r), someName(r))
	if err != 0 {
		return err
	}
	if r.IntN(3) == 0 {
		return g.removexattr(e.NodeID, "user.a")
	}
	return g.setxattr(e.NodeID, "user.a", pattern(r.IntN(3000)), 0)
}

// nameless makes a file without a name and sometimes gives it one.
func (g *guestPlayer) nameless(r *rand.Rand, dir uint64, name string) errno {
	b, err := g.do(w.OpTmpfile, dir, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_TMPFILE, Mode: 0o100600}, w.Append))
	if err != 0 {
		return err
	}
	var e w.EntryOut
	var o w.OpenOut
	rest, _ := w.Decode(b, &e)
	w.Decode(rest, &o)
	g.known[e.NodeID]++
	g.open = append(g.open, &guestFile{g.share, e.NodeID, o.Fh})
	if r.IntN(2) == 0 {
		_, err = g.keep(g.link(e.NodeID, dir, name))
	}
	return err
}

// change changes the content of a file.
func (g *guestPlayer) change(r *rand.Rand) errno {
	f, err := g.file(r)
	if err != 0 {
		return err
	}
	off, size := uint64(r.IntN(300_000)), r.IntN(60_000)
	switch r.IntN(8) {
	case 0, 1, 2:
		_, err = g.write(f.node, f.fh, off, pattern(size))
	case 3:
		_, err = g.writeWith(f.node, w.WriteIn{Fh: f.fh, Flags: unix.O_APPEND}, pattern(size))
	case 4:
		err = g.truncate(f.node, uint64(size))
	case 5:
		_, err = g.setattr(f.node, w.SetattrIn{Valid: w.FattrSize | w.FattrFh, Fh: f.fh, Size: off})
	case 6:
		mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE}[r.IntN(4)]
		_, err = g.do(w.OpFallocate, f.node, 0, pack(w.FallocateIn{Fh: f.fh, Mode: mode, Offset: off, Length: uint64(size) + 1}, w.Append))
	case 7:
		var to *guestFile
		if to, err = g.file(r); err == 0 {
			_, err = g.do(w.OpCopyFileRange, f.node, 8, pack(w.CopyFileRangeIn{FhIn: f.fh, NodeIDOut: to.node, FhOut: to.fh, OffOut: off, Len: uint64(size)}, w.Append))
		}
	}
	return err
}

func (g *guestPlayer) rest(r *rand.Rand) {
	for len(g.open) > r.IntN(4) {
		i := r.IntN(len(g.open))
		g.release(g.open[i].node, g.open[i].fh)
		g.open = slices.Delete(g.open, i, i+1)
	}
	for node, n := range g.known {
		if r.IntN(3) > 0 && !slices.ContainsFunc(g.open, func(f *guestFile) bool { return f.node == node }) {
			g.forget(node, n)
			delete(g.known, node)
		}
	}
}

// hostPlayer changes the volume through the host API.
type hostPlayer struct{ fs *volumefs.FS }

func (h *hostPlayer) step(r *rand.Rand) error {
	path := func() string {
		if r.IntN(3) == 0 {
			return fmt.Sprintf("/d%d/%s", r.IntN(2), someName(r))
		}
		return "/" + someName(r)
	}
	ctx, o := context.Background(), volumefs.WriteOptions{}
	switch r.IntN(6) {
	case 0, 1:
		_ = h.fs.Write(ctx, path(), []byte(pattern(r.IntN(100_000))), o)
	case 2:
		_ = h.fs.Remove(ctx, path())
	case 3:
		_ = h.fs.Rename(ctx, path(), path(), o)
	case 4:
		_ = h.fs.Copy(ctx, path(), path(), o)
	case 5:
		if r.IntN(10) == 0 {
			_ = h.fs.RemoveAll(ctx, fmt.Sprintf("/d%d", r.IntN(2)))
		} else {
			_ = h.fs.Mkdir(ctx, fmt.Sprintf("/d%d", r.IntN(2)))
		}
	}
	return nil
}

func (h *hostPlayer) rest(*rand.Rand) {}

// host opens the volume as a host program does.
func (a *account) host() *hostPlayer {
	a.t.Helper()
	root, err := os.OpenFile(a.dir, unix.O_PATH, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	scratch := filepath.Join(filepath.Dir(a.dir), "scratch")
	_ = os.Mkdir(scratch, 0o755)
	sf, err := os.Open(scratch)
	if err != nil {
		a.t.Fatal(err)
	}
	fs, err := volumefs.New(root, volumefs.Options{Scratch: sf, Ledger: func() (*ledger.Writer, error) {
		f, err := os.OpenFile(a.path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		return ledger.NewWriter(f, ledger.Options{})
	}})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { fs.Close(); root.Close(); sf.Close() })
	return &hostPlayer{fs}
}

// TestQuotaModel: random operations of two guests and the host, one after the
// other and at once. The ledger never says less than there is; at rest, just what
// there is, and no more than the limit.
func TestQuotaModel(t *testing.T) {
	steps := 5000
	if testing.Short() {
		steps = 1000
	}
	if s := os.Getenv(quotaSoak); s != "" {
		steps, _ = strconv.Atoi(s)
	}
	seed, _ := strconv.ParseUint(cmp.Or(os.Getenv(quotaSeed), strconv.FormatInt(time.Now().UnixNano(), 10)), 10, 64)
	t.Logf("%s=%d %s=%d", quotaSeed, seed, quotaSoak, steps)
	r := rand.New(rand.NewPCG(seed, 0))
	limits := ledger.Limits{Bytes: 3 << 20, Inodes: 40}
	a := newAccount(t, limits)
	players := []player{&guestPlayer{share: a.serve(), known: map[uint64]uint64{}}, &guestPlayer{share: a.serve(), known: map[uint64]uint64{}}, a.host()}
	const barrier = 250
	for done := 0; done < steps; done += barrier {
		if done/barrier%2 == 0 {
			for i := range barrier {
				if err := players[r.IntN(3)].step(r); err != nil {
					t.Fatal(err)
				}
				a.bound(fmt.Sprintf("step %d", done+i))
			}
		} else {
			playAtOnce(t, r, players, barrier)
		}
		for _, p := range players {
			p.rest(r)
		}
		a.bound(fmt.Sprintf("at rest after %d steps", done+barrier))
		a.settle()
		if u := a.used(); u.Bytes > limits.Bytes || u.Inodes > limits.Inodes {
			t.Fatalf("after %d steps: used %v of %v", done+barrier, u, limits)
		}
	}
}

func playAtOnce(t *testing.T, r *rand.Rand, players []player, steps int) {
	var at sync.WaitGroup
	for _, p := range players {
		own := rand.New(rand.NewPCG(r.Uint64(), 1))
		at.Go(func() {
			for range steps / len(players) {
				if err := p.step(own); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	at.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// TestQuotaModelCatches: a charge or a refund that an operation forgot shows, and so
// does one of somebody who knows nothing of the ledger.
func TestQuotaModelCatches(t *testing.T) {
	settleAs := func(charged, actual int64) func(a *account) error {
		return func(a *account) error {
			op := a.shares[0].srv.quota.w.Lock(a.ino("f"))
			return errors.Join(op.Grow(ledger.Delta{Bytes: charged}), op.Done(ledger.Delta{Bytes: actual}))
		}
	}
	for name, forget := range map[string]func(a *account) error{
		"refund":         settleAs(4096, 4096), // it failed, say, and did not grow the file
		"charge":         settleAs(0, -4096),   // it grew the file by that before it cut it
		"foreign charge": func(a *account) error { return os.WriteFile(filepath.Join(a.dir, "new"), []byte("x"), 0o600) },
		"foreign refund": func(a *account) error { return os.Remove(filepath.Join(a.dir, "f")) },
	} {
		t.Run(name, func(t *testing.T) {
			a := newAccount(t, ledger.Limits{Bytes: 1 << 20})
			g := &guestPlayer{share: a.serve(), known: map[uint64]uint64{}}
			e, fh := g.mustCreate(rootID, "f", 0o600)
			g.write(e.NodeID, fh, 0, "x")
			g.release(e.NodeID, fh)
			g.forget(e.NodeID, 1)
			r := rand.New(rand.NewPCG(1, 2))
			for range 50 {
				if err := g.step(r); err != nil {
					t.Fatal(err)
				}
			}
			a.equal("before")
			if err := forget(a); err != nil {
				t.Fatal(err)
			}
			if got, truth, ok := a.settled(700 * time.Millisecond); ok {
				t.Errorf("not noticed: the ledger says %v, there is %v", got, truth)
			}
		})
	}
}
