package ledger

import (
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// Instants between two steps of a writer, for the tests that kill it.
var (
	joinedPoint    = failpoint.New("ledger.joined")    // the slot is locked, not yet said to be open
	openedPoint    = failpoint.New("ledger.opened")    // the slot says that it has an owner
	ceilingPoint   = failpoint.New("ledger.ceiling")   // a higher ceiling is written, not synced
	raisedPoint    = failpoint.New("ledger.raised")    // it is synced
	announcedPoint = failpoint.New("ledger.announced") // more is announced, the limit not yet looked at
	chargedPoint   = failpoint.New("ledger.charged")   // the charge stands, nothing has grown
	donePoint      = failpoint.New("ledger.done")      // the change is made, not yet settled
	settledPoint   = failpoint.New("ledger.settled")   // it is settled
	closedPoint    = failpoint.New("ledger.closed")    // the slot says that its owner has left, it is still locked
)

const (
	// Chunk is what a writer has in reserve at most, in bytes, and so what a
	// killed one may leave too much.
	Chunk = 1 << 20
	// chunkInodes is the same for inodes.
	chunkInodes = 256
	// near is the distance from the limit within which there is no reserve.
	near       = 64 << 20
	nearInodes = near / Block
	// spacePatience is how long a writer that finds no space waits for what others
	// have in reserve, and for what was deleted and may be open elsewhere.
	spacePatience = 300 * time.Millisecond
)

// Options of a writer. The zero value is that of a host program.
type Options struct {
	// Server keeps files open for others: it must call Poll every 100 ms, holds
	// a reserve, and answers for orphans. Others charge each operation exactly.
	Server bool
	// Orphans calls visit for each inode that is open here (by a handle or only
	// by an O_PATH descriptor) and has no name left. measure returns its charge,
	// that of Rules.Inode with one inode, and whether it still has no name; the
	// inode stays open until visit returns. It is called by Poll, only if Server.
	Orphans func(visit func(ino uint64, measure func() (charge Delta, nameless bool)))
}

// Writer is somebody who changes a volume. It is safe for concurrent use.
type Writer struct {
	l       *Ledger
	o       Options
	slot    int
	stripes [inodeStripes]inodeStripe
	closed  atomic.Bool

	mu       sync.Mutex
	me       slot                 // what the file says of this slot; me.reserve is what spare was when it was written
	spare    Delta                // in reserve
	near     bool                 // too near to the limit for a reserve, when last looked
	running  int                  // operations between Lock and Done
	leases   int                  // kept
	since    uint64               // operations since the last Poll
	orphans  map[uint64]Delta     // without a name, open here, counted by this slot
	others   map[uint64]Delta     // the same, counted by another server
	scanned  time.Time            // when the last look at the orphans ended
	scanTook time.Duration        // how long it took
	hindered time.Time            // since when no look at the orphans saw all; zero: the last one did
	later    Delta                // deleted, not yet pending in the file
	waited   time.Time            // when space was last waited for
	stuck    map[uint64]time.Time // inodes whose lock was waited for in vain, and when
	page     page
	known    uint64 // deaths of other writers, when last read
	buf      [maxSize]byte
}

// NewWriter takes a slot of a ledger that is open for reading and writing, of
// this boot. The descriptor is the writer's locks: two writers of one process
// need a file each, opened by itself, and it must not be inherited by a child.
//
// Errors: Filesystem when all slots are taken, or the ledger is damaged.
func NewWriter(f *os.File, o Options) (*Writer, error) {
	w := &Writer{l: &Ledger{f: f, fd: int(f.Fd())}, o: o, slot: -1}
	if o.Server {
		w.orphans, w.others = map[uint64]Delta{}, map[uint64]Delta{}
	}
	deadline := time.Now().Add(basePatience)
	for w.slot < 0 {
		if err := w.takeSlot(); err != nil {
			return nil, err
		}
		if w.slot < 0 {
			if time.Now().After(deadline) {
				return nil, errdefs.Wrap(errdefs.Filesystem, unix.EBUSY, "all %d writers' places of the volume are taken", MaxWriters).
					WithHint("msb volume usage NAME shows how many sandboxes and programs write to it")
			}
			time.Sleep(time.Millisecond)
		}
	}
	if err := w.join(); err != nil {
		unlock(w.l.fd, slotLock+int64(w.slot), 1)
		return nil, err
	}
	return w, nil
}

// takeSlot locks the first slot that nobody has; slot stays -1 if there is none.
func (w *Writer) takeSlot() error {
	for i := range MaxWriters {
		ok, err := tryLock(w.l.fd, slotLock+int64(i), 1)
		if err != nil {
			return errdefs.Wrap(errdefs.Filesystem, err, "lock a place in the ledger of a volume")
		}
		if ok {
			w.slot = i
			return nil
		}
	}
	return nil
}

// join takes over what the slot says, and says that it has an owner if that is a
// server. A host program is an owner while an operation runs, and gone without a
// trace in between: it need not be closed.
func (w *Writer) join() error {
	if err := joinedPoint.Hit(); err != nil {
		return err
	}
	if slotOff(w.slot)+2*slotSize > FormatSize {
		// A file without holes cannot run out of space later.
		if err := unix.Fallocate(w.l.fd, 0, 0, maxSize); err != nil && err != unix.EOPNOTSUPP {
			return errdefs.Wrap(errdefs.Filesystem, err, "make room in the ledger of a volume")
		}
	}
	if err := w.read(); err != nil {
		return err
	}
	w.me = w.page.slots[w.slot]
	killed := w.me.lost()
	if killed {
		w.me.deaths++ // its last owner was killed at work
	}
	w.me.gen, w.me.flags, w.me.pid = w.page.base.gen, 0, uint32(os.Getpid())
	w.me.reserve, w.me.orphans, w.me.next = Delta{}, Delta{}, w.me.ceiling
	if w.o.Server {
		w.me.flags = flagOpen | flagServer
		w.me.ackAt = now() // nothing is open here yet
	} else if !killed {
		return nil
	}
	if err := w.write(); err != nil {
		return err
	}
	return openedPoint.Hit()
}

// read reads the ledger into w.page, with what this writer knows of its own slot.
func (w *Writer) read() error {
	if w.slot < 0 { // closed
		return os.ErrClosed
	}
	if err := readPage(w.l.fd, w.buf[:], &w.page); err != nil {
		return err
	}
	w.known = w.page.deaths() - uint64(w.page.slots[w.slot].deaths)
	return nil
}

// write writes the slot. mu is held.
func (w *Writer) write() error {
	if w.slot < 0 { // closed
		return os.ErrClosed
	}
	var b [slotSize]byte
	w.me.seq++
	w.me.encode(b[:])
	return pwriteAll(w.l.fd, b[:], place(slotOff(w.slot), slotSize, w.me.seq))
}

// Limited reports whether the volume has a limit.
func (w *Writer) Limited() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.page.limits != Limits{}
}

// Usage returns the limits and what is used, without what this writer has in
// reserve. It costs one read.
func (w *Writer) Usage() (State, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.read(); err != nil {
		return State{}, err
	}
	v := w.l.look(&w.page, w.slot)
	s := State{Limits: w.page.limits, Used: clamp(v.used.Minus(w.spare)), Pending: v.pending, Orphans: v.orphans, Writers: v.live}
	s.Unsettled = w.page.base.unsettled || v.dead || w.page.deaths() != w.page.base.deaths
	return s, nil
}

// grow charges d, from the reserve if it can.
func (w *Writer) grow(d Delta) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.slot >= 0 && d.Bytes <= w.spare.Bytes && d.Inodes <= w.spare.Inodes {
		w.spare = w.spare.Minus(d)
		return nil
	}
	for {
		err := w.announce(d)
		if err == nil || !w.waitForSpace(err) {
			return err
		}
	}
}

// announce charges d and a reserve: it says so in the slot, and takes it back if
// that is too much together with all others. mu is held.
func (w *Writer) announce(d Delta) error {
	if err := w.read(); err != nil {
		return err
	}
	used := w.used()
	want := d.Minus(w.spare) // may be negative in one of both: given back
	w.near = nearLimit(w.page.limits, used.Plus(d))
	if err := w.exceeds(used, want); err != nil {
		return err
	}
	reserve := Delta{}
	if w.o.Server && !w.near {
		reserve = Delta{Chunk, chunkInodes}
	}
	want = want.Plus(reserve)
	if err := w.promise(used.Plus(want)); err != nil {
		return err
	}
	before := w.me
	w.me.use, w.me.reserve, w.me.flags = w.me.use.Plus(want), reserve, w.me.flags|flagOpen|flagActive
	if err := w.write(); err != nil {
		w.me.use, w.me.reserve = before.use, before.reserve
		return err
	}
	if err := announcedPoint.Hit(); err != nil {
		return err
	}
	if w.page.limits != (Limits{}) {
		if err := w.read(); err != nil {
			return err
		}
		if err := w.exceeds(w.used().Minus(want), want); err != nil {
			w.me.use, w.me.reserve = before.use, before.reserve
			if back := w.write(); back != nil {
				return back
			}
			return err
		}
	}
	w.spare = reserve
	return nil
}

// used is what the page in w.page says. mu is held.
func (w *Writer) used() Delta {
	v := view{used: w.page.sum()}
	for i := range w.page.n {
		if w.page.slots[i].pending != (Delta{}) {
			v = w.l.look(&w.page, w.slot)
			break
		}
	}
	return v.used
}

// exceeds returns a QuotaError if want more than used is too much. What does not
// grow is never refused.
func (w *Writer) exceeds(used, want Delta) error {
	l := w.page.limits
	if l.Bytes > 0 && want.Bytes > 0 && used.Bytes+want.Bytes > l.Bytes {
		return &errdefs.QuotaError{Limit: l.Bytes, Used: max(used.Bytes, 0), Want: want.Bytes}
	}
	if l.Inodes > 0 && want.Inodes > 0 && used.Inodes+want.Inodes > l.Inodes {
		return &errdefs.QuotaError{Limit: l.Inodes, Used: max(used.Inodes, 0), Want: want.Inodes, Inodes: true}
	}
	return nil
}

func nearLimit(l Limits, used Delta) bool {
	return l.Bytes > 0 && l.Bytes-used.Bytes < near || l.Inodes > 0 && l.Inodes-used.Inodes < nearInodes
}

// promise syncs a higher ceiling before use passes the one that stands.
func (w *Writer) promise(use Delta) error {
	c := w.page.promised(false)
	if use.Bytes <= c.Bytes && use.Inodes <= c.Inodes {
		return nil
	}
	w.me.next = higher(c, ceilingFor(use))
	if err := w.write(); err != nil {
		return err
	}
	if err := ceilingPoint.Hit(); err != nil {
		return err
	}
	if err := unix.Fdatasync(w.l.fd); err != nil {
		return errdefs.Wrap(errdefs.Filesystem, err, "sync the ledger of a volume")
	}
	w.me.ceiling = w.me.next // goes into the file with the next write
	return raisedPoint.Hit()
}

// ceilingFor is the ceiling for a use: an eighth above it, at least 1 MiB and 256
// inodes, at most 64 MiB and 16384.
func ceilingFor(use Delta) Delta {
	step := Delta{max(1<<20, min(use.Bytes/8, near)), max(256, min(use.Inodes/8, nearInodes))}
	return use.Plus(step)
}

// waitForSpace reports whether it is worth trying again: others may give a
// reserve back, or say that they do not have open what was deleted. mu is held,
// and released meanwhile. It waits once a second at most.
func (w *Writer) waitForSpace(err error) bool {
	if _, quota := err.(*errdefs.QuotaError); !quota {
		return false
	}
	w.publish()
	if w.read() != nil {
		return false
	}
	v := w.l.look(&w.page, w.slot)
	if !v.busy && v.pending == (Delta{}) {
		return false
	}
	start := time.Now()
	switch {
	case w.waited.IsZero() || start.Sub(w.waited) > time.Second:
		w.waited = start
	case start.Sub(w.waited) > spacePatience:
		return false
	}
	w.mu.Unlock()
	time.Sleep(time.Millisecond + rand.N(4*time.Millisecond))
	w.mu.Lock()
	return true
}

// refund returns what an operation charged too much, or freed. mu is held.
func (w *Writer) refund(d Delta) {
	w.spare = w.spare.Plus(d)
}

// trim writes the slot if the reserve is too large, or if nothing is to be in
// reserve. mu is held.
func (w *Writer) trim() error {
	keep := Delta{}
	if (w.o.Server || w.running > 0) && !w.near { // a host program in the middle of something larger has a reserve, too
		if w.spare.Bytes <= Chunk && w.spare.Inodes <= chunkInodes && w.spare.Bytes >= 0 && w.spare.Inodes >= 0 {
			return nil
		}
		keep = Delta{Chunk / 2, chunkInodes / 2}
		keep = Delta{max(0, min(w.spare.Bytes, keep.Bytes)), max(0, min(w.spare.Inodes, keep.Inodes))}
	}
	idle := w.running == 0 && !w.o.Server
	if w.spare == keep && !idle {
		return nil
	}
	w.me.use = w.me.use.Minus(w.spare.Minus(keep))
	w.spare, w.me.reserve = keep, keep
	if idle {
		w.me.flags = 0
	}
	return w.write()
}

// Poll is called by a server every 100 ms, and costs one read when there is
// nothing to do: it gives the reserve back when the writer was idle since the
// last Poll, answers other writers about orphans, and frees what others have
// answered about.
func (w *Writer) Poll() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.read(); err != nil {
		return err
	}
	w.near = nearLimit(w.page.limits, w.page.sum())
	if err := w.answer(); err != nil {
		return err
	}
	if err := w.collect(); err != nil {
		return err
	}
	quiet := w.running == 0 && w.leases == 0 && w.since == 0 && w.later == Delta{}
	w.since = 0
	if quiet && w.me.flags&flagActive != 0 {
		return w.settle()
	}
	return nil
}

// settle makes the slot exact. mu is held.
func (w *Writer) settle() error {
	w.me.use = w.me.use.Minus(w.spare)
	w.spare, w.me.reserve = Delta{}, Delta{}
	w.me.flags &^= flagActive
	return w.write()
}

// Close settles, frees what this writer had open without a name, and gives the
// slot up. No operation may be running.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.slot < 0 {
		return nil
	}
	for ino, d := range w.orphans {
		w.later = w.later.Plus(d)
		w.disown(ino, d)
	}
	err := w.read()
	if err == nil {
		err = w.collect()
	}
	w.publish()
	w.me.flags = 0
	if err == nil {
		err = w.settle()
	}
	if err == nil {
		err = closedPoint.Hit()
	}
	unlock(w.l.fd, slotLock+int64(w.slot), 1)
	w.slot = -1
	w.closed.Store(true)
	return errors.Join(err, w.l.f.Close())
}
