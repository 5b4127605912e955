package ledger

import (
	"slices"
	"sync"
	"time"
)

// inodeStripe lets goroutines of one process take turns on inodes: the locks of an
// open file do not keep them from each other.
type inodeStripe struct {
	sync.Mutex
	kept map[uint64]*Lease // by inode, guarded by the stripe
}

const maxInodes = 4 // of one operation: rename has two directories, the file and its victim

// Op is a change of a volume from Lock to Done.
type Op struct {
	w       *Writer
	inos    [maxInodes]uint64
	n       int
	begun   time.Time
	late    bool // somebody else may be changing the same inodes
	deaths  uint64
	charged Delta // by Grow
	err     error
}

// Lock begins an operation that may change the charges of these inodes, at most
// four; a new inode needs none. Nobody else who locks one of them runs before
// Done. It waits a second for other processes; see [Op.Late].
func (w *Writer) Lock(inos ...uint64) Op {
	op := Op{w: w, n: len(inos)}
	copy(op.inos[:], inos)
	held := op.inos[:op.n]
	slices.SortFunc(held, func(a, b uint64) int { return cmpStripe(a, b) })
	op.n = len(slices.Compact(held))
	for i, ino := range op.inos[:op.n] {
		if i == 0 || stripe(ino) != stripe(op.inos[i-1]) {
			w.stripe(ino).Lock()
		}
	}
	op.deaths, op.err = w.begin() // before a lock is waited for: who has it as a lease sees that somebody is there
	var kept *Lease
	for _, ino := range op.inos[:op.n] {
		if w.closed.Load() {
			break
		}
		if l := w.stripe(ino).kept[ino]; l != nil {
			kept = l
		} else if !w.lockInode(ino) {
			op.late = true
		}
	}
	if op.late && op.err == nil {
		op.err = w.Doubt()
	}
	if op.begun = time.Now(); kept != nil {
		op.begun, op.deaths = kept.begun, kept.deaths
	}
	return op
}

// lockInode keeps other processes from an inode; false if one does not let go.
func (w *Writer) lockInode(ino uint64) bool {
	at := inodeLock + int64(ino)&inodeMask
	if ok, err := tryLock(w.l.fd, at, 1); ok || err != nil {
		return ok
	}
	w.mu.Lock()
	patience := inodePatience
	if since, ok := w.stuck[ino]; ok && time.Since(since) < stuckFor {
		patience = stuckPatience
	}
	w.mu.Unlock()
	ok, err := lockWithin(w.l.fd, at, 1, patience)
	w.mu.Lock()
	defer w.mu.Unlock()
	if ok || err != nil {
		delete(w.stuck, ino)
		return ok
	}
	if len(w.stuck) >= maxStuck {
		clear(w.stuck)
	}
	if w.stuck == nil {
		w.stuck = map[uint64]time.Time{}
	}
	if patience == inodePatience {
		w.stuck[ino] = time.Now()
	}
	return false
}

// maxStuck bounds what is remembered about stopped processes.
const maxStuck = 256

// inodeStripes is how many stripes a writer has.
const inodeStripes = 64

func stripe(ino uint64) uint64 { return ino % inodeStripes }

func (w *Writer) stripe(ino uint64) *inodeStripe { return &w.stripes[stripe(ino)] }

// cmpStripe orders inodes by stripe first, which is the order of locks.
func cmpStripe(a, b uint64) int {
	if x, y := stripe(a), stripe(b); x != y {
		return int(x) - int(y)
	}
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// begin says that the volume may change from now on.
func (w *Writer) begin() (deaths uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running++
	w.since++
	if w.me.flags&flagActive == 0 {
		w.me.flags |= flagOpen | flagActive
		err = w.write()
	}
	return w.known, err
}

// Doubt asks for a walk: somebody may have changed a size that was counted on.
func (w *Writer) Doubt() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.me.deaths++
	return w.write()
}

// Late reports whether another process did not let go of an inode's lock in time
// (it may be stopped). The operation goes on, but what it finds before it grows
// may change under it: take 0 for the size before, so that all of it is charged.
func (op *Op) Late() bool { return op.late }

// Grow charges the most that the operation may add, before it does. It may be
// called again for more.
//
// Errors: *errdefs.QuotaError when a limit does not allow it, and nothing is
// charged; Filesystem when the ledger cannot be written.
func (op *Op) Grow(most Delta) error {
	if op.err != nil {
		return op.err
	}
	most = clamp(most)
	if most == (Delta{}) {
		return nil
	}
	if err := op.w.grow(most); err != nil {
		return err
	}
	op.charged = op.charged.Plus(most)
	return chargedPoint.Hit()
}

// Done ends the operation; actual is what it added, by looking before and after.
// What was charged and is not in actual is refunded, unless others could not be
// kept out. It must be called once, also after a failed operation.
func (op *Op) Done(actual Delta) error {
	w := op.w
	err := donePoint.Hit()
	over := op.charged.Minus(actual)
	w.mu.Lock()
	if op.late || op.overrun() {
		over = Delta{min(over.Bytes, 0), min(over.Inodes, 0)}
	}
	w.refund(over)
	w.running--
	if w.running == 0 && !w.o.Server {
		w.freeLater()
	}
	if err == nil {
		err = w.trim()
	}
	w.mu.Unlock()
	op.unlock()
	if err == nil {
		err = settledPoint.Hit()
	}
	return err
}

// overrun reports whether the operation took so long that somebody stopped
// waiting for it, and asks for a walk then. mu is held.
func (op *Op) overrun() bool {
	return op.n > 0 && op.w.overrun(op.begun, op.deaths)
}

// overrun is that of an inode that was locked at begun. mu is held.
func (w *Writer) overrun(begun time.Time, deaths uint64) bool {
	if time.Since(begun) < inodePatience || w.read() == nil && w.known == deaths {
		return false
	}
	w.me.deaths++
	return true
}

func (op *Op) unlock() {
	w := op.w
	for _, ino := range op.inos[:op.n] {
		if w.closed.Load() {
			break // the descriptor may be another file's by now
		}
		if w.stripe(ino).kept[ino] == nil {
			unlock(w.l.fd, inodeLock+int64(ino)&inodeMask, 1)
		}
	}
	for i := op.n - 1; i >= 0; i-- {
		if i == 0 || stripe(op.inos[i]) != stripe(op.inos[i-1]) {
			w.stripe(op.inos[i]).Unlock()
		}
	}
}

// Orphan tells that the operation took the last name of an inode; charge is what
// it has counted, with one inode. held says that this server still has it open:
// then it stays charged until Released. Otherwise it is freed when no other
// server has it open. Done's actual must not contain it.
func (op *Op) Orphan(ino uint64, charge Delta, held bool) {
	w := op.w
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case held && w.o.Server:
		w.own(ino, charge)
	case op.late:
	default:
		w.free(charge)
	}
}
