package ledger

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// charge grows by d for good.
func charge(w *Writer, d Delta) error {
	op := w.Lock()
	if err := op.Grow(d); err != nil {
		return errors.Join(err, op.Done(Delta{}))
	}
	return op.Done(d)
}

// TestSlots: there are 64, the next writer is told so, a slot keeps its sum when
// its owner goes, and the next one counts on.
func TestSlots(t *testing.T) {
	v := newVolume(t, Limits{})
	var all []*Writer
	for i := range MaxWriters {
		w := v.writer(Options{Server: i%2 == 0})
		v.ok(charge(w, Delta{Block, 1}))
		all = append(all, w)
	}
	if _, err := openWriter(v.base, Options{}); !errdefs.Is(err, errdefs.Filesystem) || !errors.Is(err, unix.EBUSY) {
		t.Errorf("one more: %v", err)
	}
	for _, w := range all {
		if w.o.Server {
			v.ok(w.Poll())
			v.ok(w.Poll())
		}
	}
	if s := v.state(); s.Used != (Delta{MaxWriters * Block, MaxWriters}) || s.Writers != MaxWriters/2 || s.Unsettled {
		t.Errorf("with all: %+v", s)
	}
	v.ok(all[50].Close())
	v.ok(charge(v.writer(Options{}), Delta{-Block, -1}))
	for _, w := range all {
		v.ok(w.Close())
	}
	if s := v.state(); s.Used != (Delta{(MaxWriters - 1) * Block, MaxWriters - 1}) || s.Writers != 0 {
		t.Errorf("without any: %+v", s)
	}
	if fi, err := os.Stat(v.file()); err != nil || fi.Size() != maxSize {
		t.Errorf("size %v, %v", fi.Size(), err)
	}
}

// TestReserve: far from a limit a server grows without a system call, up to a
// chunk; when it is idle it says just what it used.
func TestReserve(t *testing.T) {
	v := newVolume(t, Limits{Bytes: 1 << 30})
	w := v.writer(Options{Server: true})
	v.ok(charge(w, Delta{Block, 1}))
	seq := w.me.seq
	for range Chunk/Block - 2 {
		v.ok(charge(w, Delta{Bytes: Block}))
	}
	if w.me.seq != seq {
		t.Errorf("the slot was written %d times", w.me.seq-seq)
	}
	if s := v.state(); s.Used.Bytes < Chunk || s.Used.Bytes > 2*Chunk {
		t.Errorf("with a reserve: %+v", s)
	}
	v.ok(w.Poll())
	v.ok(w.Poll())
	if s := v.state(); s.Used != (Delta{Chunk - Block, 1}) {
		t.Errorf("idle: %+v", s)
	}
	near := newVolume(t, Limits{Bytes: 63 << 20})
	w = near.writer(Options{Server: true})
	near.ok(charge(w, Delta{Block, 1}))
	if s := near.state(); s.Used != (Delta{Block, 1}) {
		t.Errorf("near the limit: %+v", s)
	}
}

// TestLimitHolds: four writers grow and shrink at the limit. What is there never
// exceeds what the ledger says, and that never exceeds the limit; in the end all
// of it was usable, and both are equal.
func TestLimitHolds(t *testing.T) {
	limits := Limits{Bytes: 100 * Block, Inodes: 50}
	v := newVolume(t, limits)
	var truth, truthInodes atomic.Int64
	var shrinking sync.RWMutex // held for writing, what is there does not shrink
	var wg sync.WaitGroup
	var refused atomic.Int64
	stop := make(chan struct{})
	var writers []*Writer
	for i := range 4 {
		w := v.writer(Options{Server: i < 2})
		writers = append(writers, w)
		wg.Go(func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			var mine Delta
			for {
				select {
				case <-stop:
					return
				default:
				}
				d := Delta{r.Int64N(40) * Block, r.Int64N(20)}
				if r.IntN(2) == 0 || mine == (Delta{}) {
					op := w.Lock()
					err := op.Grow(d)
					var full *errdefs.QuotaError
					if errors.As(err, &full) {
						refused.Add(1)
						d = Delta{}
					} else if err != nil {
						t.Error(err)
					}
					truth.Add(d.Bytes)
					truthInodes.Add(d.Inodes)
					mine = mine.Plus(d)
					v.okSoft(op.Done(d))
				} else {
					shrinking.RLock()
					op := w.Lock()
					truth.Add(-mine.Bytes)
					truthInodes.Add(-mine.Inodes)
					v.okSoft(op.Done(Delta{}.Minus(mine)))
					mine = Delta{}
					shrinking.RUnlock()
				}
			}
		})
	}
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		shrinking.Lock()
		there := Delta{truth.Load(), truthInodes.Load()}
		s := v.state()
		shrinking.Unlock()
		if s.Used.Bytes < there.Bytes || s.Used.Inodes < there.Inodes {
			t.Fatalf("the ledger says %+v, there is %+v", s.Used, there)
		}
		if there.Bytes > limits.Bytes || there.Inodes > limits.Inodes {
			t.Fatalf("there is %+v", there)
		}
	}
	close(stop)
	wg.Wait()
	for _, w := range writers {
		v.ok(w.Close())
	}
	there := Delta{truth.Load(), truthInodes.Load()}
	if s := v.state(); s.Used != there || refused.Load() == 0 {
		t.Errorf("in the end the ledger says %+v, there is %+v, %d refused", s.Used, there, refused.Load())
	}
	v.ok(charge(v.writer(Options{}), Delta(limits).Minus(there)))
	if err := charge(v.writer(Options{}), Delta{Bytes: 1}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("one byte more: %v", err)
	}
}

func (v *volume) okSoft(err error) {
	if err != nil {
		v.t.Error(err)
	}
}

// TestReserveIsGivenUp: what another server has in reserve is waited for before
// space is refused; an overfull volume takes what does not grow.
func TestReserveIsGivenUp(t *testing.T) {
	v := newVolume(t, Limits{Bytes: 200 << 20})
	a, b := v.writer(Options{Server: true}), v.writer(Options{})
	v.ok(charge(a, Delta{Block, 1})) // and a chunk
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				v.okSoft(a.Poll())
			}
		}
	})
	v.ok(charge(b, Delta{Bytes: 200<<20 - Block}))
	close(stop)
	wg.Wait()
	v.ok(v.l.SetLimits(Limits{Bytes: 1 << 20}))
	if err := charge(a, Delta{Bytes: 2 * Chunk}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("growth of a volume that is over its limit: %v", err)
	}
	v.ok(charge(a, Delta{}))
	v.ok(charge(b, Delta{Bytes: -Block}))
}

// TestOrphansChangeHands: an inode without a name counts once, as long as anybody
// has it open, whoever closes or dies first.
func TestOrphansChangeHands(t *testing.T) {
	v := newVolume(t, Limits{})
	const ino = 77
	file := Delta{10 * Block, 1}
	open := [3]bool{}
	var w [3]*Writer
	for i := range w {
		w[i] = v.writer(Options{Server: true, Orphans: func(visit visitor) {
			if open[i] {
				visit(ino, nameless(file))
			}
		}})
	}
	poll := func() Delta {
		for range 4 {
			for i := range w {
				if w[i].slot >= 0 {
					v.ok(w[i].Poll())
				}
			}
		}
		return v.state().Used
	}
	v.ok(charge(w[0], file))
	open = [3]bool{false, true, true}
	op := w[0].Lock(ino)
	op.Orphan(ino, file, false)
	v.ok(op.Done(Delta{}))
	if got := poll(); got != file {
		t.Errorf("open in two: %+v", got)
	}
	first, second := 1, 2
	if len(w[1].orphans) == 0 {
		first, second = 2, 1
	}
	open[first] = false
	w[first].Released(ino)
	if got := poll(); got != file || len(w[second].orphans) != 1 {
		t.Errorf("open in one: %+v", got)
	}
	v.ok(w[second].Close())
	if got := poll(); got != (Delta{}) {
		t.Errorf("open in none: %+v", got)
	}
	// the only one
	v.ok(w[first].Close())
	v.ok(charge(w[0], file))
	op = w[0].Lock(ino)
	op.Orphan(ino, file, true)
	v.ok(op.Done(Delta{}))
	if got := poll(); got != file {
		t.Errorf("open here: %+v", got)
	}
	w[0].Released(ino)
	if got := poll(); got != (Delta{}) {
		t.Errorf("closed here: %+v", got)
	}
}

// otherBoot makes a copy of the ledger that looks as after a boot.
func (v *volume) otherBoot(b []byte) *Ledger {
	v.t.Helper()
	path := filepath.Join(v.t.TempDir(), "ledger")
	v.ok(os.WriteFile(path, b, 0o600))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	v.ok(err)
	v.t.Cleanup(func() { f.Close() })
	r, ok := decodeBase(b)
	if !ok {
		v.t.Fatal("no base")
	}
	for seq := r.seq; seq < r.seq+2; seq++ { // both copies
		r := r
		r.seq, r.boot = seq, [16]byte{1}
		v.ok(pwriteAll(int(f.Fd()), r.encode(), place(baseOff, baseSize, seq)))
	}
	l, err := Open(f)
	v.ok(err)
	return l
}

// TestPowerCut: the ledger as it was last synced, or with any of its records
// newer, says after a boot no less than there ever was; a walk makes it exact.
func TestPowerCut(t *testing.T) {
	v := newVolume(t, Limits{})
	durable, err := os.ReadFile(v.file())
	v.ok(err)
	syncs := 0
	defer failpoint.Arm("ledger.raised", func() (err error) {
		syncs++
		durable, err = os.ReadFile(v.file())
		return err
	})()
	r := rand.New(rand.NewPCG(7, 7))
	var highest, now Delta
	writers := []*Writer{v.writer(Options{Server: true}), v.writer(Options{}), v.writer(Options{Server: true})}
	for step := range 400 {
		w := writers[r.IntN(len(writers))]
		d := Delta{r.Int64N(256) * Block, r.Int64N(10)}
		if r.IntN(3) == 0 {
			d = Delta{-min(now.Bytes, d.Bytes), -min(now.Inodes, d.Inodes)}
		}
		v.ok(charge(w, d))
		now = now.Plus(d)
		highest = higher(highest, now)
		if r.IntN(4) == 0 && w.o.Server {
			v.ok(w.Poll())
		}
		current, err := os.ReadFile(v.file())
		v.ok(err)
		torn := append([]byte(nil), durable...)
		for off := 0; off < len(torn); off += 512 { // of what was written since, some sectors are there
			if r.IntN(2) == 0 {
				copy(torn[off:off+512], current[off:off+512])
			}
		}
		l := v.otherBoot(torn)
		if s, err := l.State(); err != nil || !s.Unsettled || !s.Foreign || s.Used.Bytes < highest.Bytes || s.Used.Inodes < highest.Inodes {
			t.Fatalf("step %d: %+v, %v; there were up to %+v", step, s, err, highest)
		}
		v.ok(l.Recover())
		s, err := l.State()
		if err != nil || !s.Unsettled || s.Foreign || s.Used.Bytes < highest.Bytes || s.Used.Inodes < highest.Inodes {
			t.Fatalf("step %d, recovered: %+v, %v; there were up to %+v", step, s, err, highest)
		}
		if _, err := l.Settle(context.Background(), func(context.Context) (Delta, error) { return now, nil }); err != nil {
			t.Fatal(err)
		}
		if s, err := l.State(); err != nil || s.Used != now || s.Unsettled {
			t.Fatalf("step %d, settled: %+v, %v", step, s, err)
		}
	}
	if syncs == 0 || syncs > 100 {
		t.Errorf("%d syncs for %d bytes", syncs, highest.Bytes)
	}
	t.Logf("%d syncs, up to %d MiB", syncs, highest.Bytes>>20)
}

// TestLowerCeiling: after it a boot finds what was used.
func TestLowerCeiling(t *testing.T) {
	v := newVolume(t, Limits{})
	w := v.writer(Options{})
	v.ok(charge(w, Delta{100 << 20, 5}))
	v.ok(charge(w, Delta{-99 << 20, -4}))
	v.ok(w.Close())
	dir, err := os.Open(v.dir())
	v.ok(err)
	defer dir.Close()
	v.ok(v.l.LowerCeiling(int(dir.Fd())))
	b, err := os.ReadFile(v.file())
	v.ok(err)
	if s, err := v.otherBoot(b).State(); err != nil || s.Used != (Delta{1 << 20, 1}) {
		t.Errorf("after a boot: %+v, %v", s, err)
	}
	v.ok(charge(v.writer(Options{}), Delta{Block, 1})) // a higher ceiling is synced first
	if b, err = os.ReadFile(v.file()); err != nil {
		t.Fatal(err)
	}
	if s, err := v.otherBoot(b).State(); err != nil || s.Used.Bytes <= 1<<20 {
		t.Errorf("after growth and a boot: %+v, %v", s, err)
	}
}

// TestSettleWaitsForQuiet: a walk during which the volume changes is not believed.
func TestSettleWaitsForQuiet(t *testing.T) {
	v := newVolume(t, Limits{})
	a := v.actor(Options{})
	v.ok(a.create("f"))
	walks := 0
	_, err := v.l.Settle(context.Background(), func(context.Context) (Delta, error) {
		walks++
		return Delta{}, a.resize("f", int64(walks)*Block)
	})
	if !errors.Is(err, ErrBusy) || walks != settleTries {
		t.Errorf("%d walks, %v", walks, err)
	}
	v.exact()
	op := a.w.Lock() // at work
	if _, err := v.l.Settle(context.Background(), nil); !errors.Is(err, ErrBusy) {
		t.Errorf("while a writer is at work: %v", err)
	}
	v.ok(op.Done(Delta{}))
	v.settle()
	v.ok(os.WriteFile(filepath.Join(v.dir(), "behind"), make([]byte, 5000), 0o600))
	v.settle() // with a living writer
	v.ok(a.resize("f", 100*Block))
	v.exact()
}

// TestWalkKeepsNobody: while a walk takes its time, limits are set, writers join
// and another walk gives up at once.
func TestWalkKeepsNobody(t *testing.T) {
	v := newVolume(t, Limits{})
	done, inside, finish := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		first := true
		_, err := v.l.Settle(context.Background(), func(context.Context) (Delta, error) {
			if first {
				first = false
				close(inside)
				<-finish
			}
			return walkDir(v.dir())
		})
		done <- err
	}()
	<-inside
	start := time.Now()
	f, err := os.OpenFile(v.file(), os.O_RDWR, 0)
	v.ok(err)
	defer f.Close()
	other, err := Open(f)
	v.ok(err)
	v.ok(other.SetLimits(Limits{Bytes: 1 << 20}))
	v.ok(charge(v.writer(Options{Server: true}), Delta{}))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := other.Settle(ctx, nil); !errors.Is(err, ErrBusy) {
		t.Errorf("a second walk: %v", err)
	}
	if d := time.Since(start); d > 500*time.Millisecond {
		t.Errorf("all that took %v", d)
	}
	close(finish)
	if err := <-done; err != nil && !errors.Is(err, ErrBusy) { // the server is not polled, and counts as busy
		t.Error(err)
	}
	if s := v.state(); s.Limits.Bytes != 1<<20 {
		t.Errorf("%+v", s)
	}
}

// TestStuckInode: who holds an inode's lock and does not let go delays another
// once, not each time; nothing is refunded meanwhile, and a walk is asked for.
func TestStuckInode(t *testing.T) {
	v := newVolume(t, Limits{})
	a, b := v.actor(Options{}), v.actor(Options{})
	v.ok(a.create("f"))
	v.ok(a.resize("f", 10*Block))
	stopped := b.w.Lock(inodeAt(a.path("f")))
	v.within("ten operations", func() {
		for range 10 {
			v.ok(a.resize("f", 10*Block))
			v.ok(a.resize("f", 0))
		}
	})
	v.ok(stopped.Done(Delta{}))
	if s := v.state(); !s.Unsettled || s.Used.Bytes < 10*Block {
		t.Errorf("%+v", s)
	}
	v.settle()
	v.ok(a.resize("f", 3*Block))
	v.exact()
}

// TestStateOfReadOnlyFile: whoever only looks needs no right to write.
func TestStateOfReadOnlyFile(t *testing.T) {
	v := newVolume(t, Limits{Bytes: 5 * Block})
	v.ok(charge(v.writer(Options{}), Delta{Block, 1}))
	f, err := os.Open(v.file())
	v.ok(err)
	defer f.Close()
	l, err := Open(f)
	v.ok(err)
	if s, err := l.State(); err != nil || s.Used != (Delta{Block, 1}) || s.Limits.Bytes != 5*Block {
		t.Errorf("%+v, %v", s, err)
	}
}

// FuzzLedger: a file server that its guest has taken over owns these bytes. They
// may be refused; nobody may panic, hang or count below zero.
func FuzzLedger(f *testing.F) {
	path := filepath.Join(f.TempDir(), "seed")
	seed, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		f.Fatal(err)
	}
	defer seed.Close()
	if err := Format(seed, Limits{1 << 20, 1000}, true); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, uint16(0), uint64(0), true)
	f.Add(b, uint16(slotsOff+32), ^uint64(0)>>1, true)
	f.Add(b[:100], uint16(0), uint64(1), false)
	f.Fuzz(func(t *testing.T, b []byte, at uint16, value uint64, sealAll bool) {
		if len(b) > maxSize {
			b = b[:maxSize]
		}
		b = append([]byte(nil), b...)
		if int(at)+8 <= len(b) {
			le.PutUint64(b[at:], value)
		}
		if sealAll && len(b) >= FormatSize { // what checks the sums must look at the numbers, too
			seal(b[limitsOff : limitsOff+limitsSize])
			seal(b[baseOff : baseOff+baseSize])
			for i := range (len(b) - slotsOff) / (2 * slotSize) {
				seal(b[slotOff(i) : slotOff(i)+slotSize])
			}
		}
		hostile(t, b)
	})
}

// hostile does everything that can be done with a ledger.
func hostile(t *testing.T, b []byte) {
	path := filepath.Join(t.TempDir(), "ledger")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func() *os.File {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := open()
	defer f.Close()
	l, err := Open(f)
	if err != nil {
		return
	}
	if s, err := l.State(); err == nil && (s.Used.Bytes < 0 || s.Used.Inodes < 0 || s.Limits.Bytes < 0 || s.Limits.Inodes < 0) {
		t.Errorf("state %+v", s)
	}
	_ = l.Recover()
	_ = l.SetLimits(Limits{1 << 30, 1 << 20})
	w, err := NewWriter(open(), Options{Server: true})
	if err != nil {
		return
	}
	_ = charge(w, Delta{Block, 1})
	op := w.Lock(1)
	op.Orphan(1, Delta{Block, 1}, false)
	_ = op.Done(Delta{})
	_ = w.Poll()
	_ = w.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if got, err := l.Settle(ctx, func(context.Context) (Delta, error) { return Delta{Block, 1}, nil }); err == nil {
		if s, err := l.State(); err != nil || s.Used != (Delta{Block, 1}) || !got.Exact {
			t.Errorf("settled: %+v, %v", s, err)
		}
	}
}

// BenchmarkCharge is what an operation of a host program costs, and of a server.
func BenchmarkCharge(b *testing.B) {
	for _, o := range []Options{{}, {Server: true}} {
		for _, limits := range []Limits{{}, {Bytes: 1 << 30}} {
			b.Run(fmt.Sprintf("server=%v,limit=%v", o.Server, limits.Bytes != 0), func(b *testing.B) {
				w := newVolume(b, limits).writer(o)
				for b.Loop() {
					op := w.Lock(5)
					if err := errors.Join(op.Grow(Delta{Bytes: Block}), op.Done(Delta{})); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
