package ledger

import (
	"time"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var (
	pendingPoint  = failpoint.New("ledger.pending")   // what was deleted is pending
	takenPoint    = failpoint.New("ledger.taken")     // orphans of others are charged here, not yet answered
	answeredPoint = failpoint.New("ledger.answered")  // the answer is written
	freedPoint    = failpoint.New("ledger.collected") // what was pending is free
)

// own counts an inode without a name that is open here. Its charge is in the slot
// already. mu is held.
func (w *Writer) own(ino uint64, charge Delta) {
	if _, known := w.orphans[ino]; known {
		w.free(charge) // a look between the deletion and this has charged it once more
		return
	}
	_, _ = tryLock(w.l.fd, orphanLock+int64(ino)&inodeMask, 1)
	w.orphans[ino] = charge
	w.me.orphans = w.me.orphans.Plus(charge)
}

// disown ends own. mu is held.
func (w *Writer) disown(ino uint64, charge Delta) {
	delete(w.orphans, ino)
	w.me.orphans = w.me.orphans.Minus(charge)
	unlock(w.l.fd, orphanLock+int64(ino)&inodeMask, 1)
}

// Released tells that the last descriptor of an inode is closed here. It does
// nothing for one that was no orphan.
func (w *Writer) Released(ino uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.others, ino)
	charge, ok := w.orphans[ino]
	if !ok {
		return
	}
	w.disown(ino, charge)
	w.since++
	w.free(charge)
	// A failure leaves too much charged; the next write mends it.
	if w.me.flags&flagActive == 0 {
		_ = w.settle()
	} else {
		_ = w.trim()
	}
}

// Recount says what an orphan that this writer counts is charged by now: it may
// have grown or shrunk, which was charged or refunded by an operation. It does
// nothing for any other inode.
func (w *Writer) Recount(ino uint64, charge Delta) {
	w.mu.Lock()
	defer w.mu.Unlock()
	old, ok := w.orphans[ino]
	if !ok || old == charge {
		return
	}
	w.orphans[ino] = charge
	w.me.orphans = w.me.orphans.Plus(charge).Minus(old)
	if w.me.flags&flagActive == 0 {
		_ = w.write() // else with what follows; a walk adds it to what it finds
	}
}

// Counted returns the inodes without a name that this writer counts.
func (w *Writer) Counted() map[uint64]bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.orphans) == 0 {
		return nil
	}
	inos := make(map[uint64]bool, len(w.orphans))
	for ino := range w.orphans {
		inos[ino] = true
	}
	return inos
}

// Named says that an inode made without a name has got its first: it stays
// charged, and is an orphan no more. It reports whether it was one.
func (w *Writer) Named(ino uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	charge, ok := w.orphans[ino]
	if ok {
		w.disown(ino, charge)
	}
	return ok
}

// free gives back what was deleted: at once if no other server lives, else when
// they have answered. A host program that is in the middle of something larger
// asks for a chunk at a time whether one lives. mu is held.
func (w *Writer) free(charge Delta) {
	w.later = w.later.Plus(charge)
	switch {
	case w.o.Server:
		if w.alone() {
			w.refund(charge)
			w.later = w.later.Minus(charge)
		}
	case w.running <= 1 || w.near || w.later.Bytes > Chunk/2 || w.later.Inodes > chunkInodes/2:
		w.freeLater()
	}
}

// freeLater is the end of free. mu is held.
func (w *Writer) freeLater() {
	if w.later == (Delta{}) {
		return
	}
	if w.alone() {
		w.refund(w.later)
		w.later = Delta{}
		return
	}
	w.publish()
}

// alone reports whether no other server lives. mu is held.
func (w *Writer) alone() bool {
	if w.read() != nil {
		return false
	}
	return w.l.look(&w.page, w.slot).others == 0
}

// publish makes what was deleted pending in the file. mu is held.
func (w *Writer) publish() {
	if w.later == (Delta{}) {
		return
	}
	if w.me.pending != (Delta{}) && w.read() == nil && !w.l.look(&w.page, w.slot).waiting[w.slot] {
		w.me.use = w.me.use.Minus(w.me.pending) // answered; what is new must not hold it up
		w.me.pending = Delta{}
	}
	w.me.pending = w.me.pending.Plus(w.later)
	w.me.pendAt = now()
	w.later = Delta{}
	if w.write() == nil {
		_ = pendingPoint.Hit()
	}
}

// collect frees what was pending when all others have answered, and makes what
// came since then pending. w.page is fresh. mu is held.
func (w *Writer) collect() error {
	if w.me.pending != (Delta{}) {
		if w.l.look(&w.page, w.slot).waiting[w.slot] {
			return nil
		}
		w.me.use = w.me.use.Minus(w.me.pending)
		w.me.pending = Delta{}
		if err := w.write(); err != nil {
			return err
		}
		if err := freedPoint.Hit(); err != nil {
			return err
		}
	}
	w.publish()
	return nil
}

// After a look at all open inodes that took longer than slowScan, the next one waits
// for scanPause times as long: somebody who deletes a great deal costs others a tenth
// of a processor.
const (
	slowScan  = 5 * time.Millisecond
	scanPause = 9
)

// answer looks for orphans that are open here, if others ask, and says that it
// has looked. w.page is fresh before and after. mu is held.
func (w *Writer) answer() error {
	if !w.o.Server {
		return nil
	}
	asked := false
	for ino := range w.others { // their server may have closed them or died
		if lockedElsewhere(w.l.fd, orphanLock+int64(ino)&inodeMask, 1) {
			continue
		}
		delete(w.others, ino)
		asked = true
	}
	for i := range w.page.n {
		s := &w.page.slots[i]
		asked = asked || i != w.slot && s.pending != (Delta{}) && s.pendAt >= w.me.ackAt
	}
	if !asked || w.scanTook > slowScan && time.Since(w.scanned) < scanPause*w.scanTook {
		return nil
	}
	at := now()
	looked := w.scan()
	w.scanned, w.scanTook = time.Now(), time.Duration(now()-at)
	if err := w.read(); err != nil {
		return err
	}
	if !looked {
		return nil // the next Poll looks again
	}
	w.me.ackAt = at
	if err := w.write(); err != nil {
		return err
	}
	if err := answeredPoint.Hit(); err != nil {
		return err
	}
	return w.read()
}

// scan has the server visit its orphans, and counts those that nobody does. It
// reports whether it could look at all of them: what is being changed cannot be
// measured. mu is held, and released meanwhile: the server's own locks come first.
func (w *Writer) scan() bool {
	if w.o.Orphans == nil {
		return true
	}
	force := !w.hindered.IsZero() && time.Since(w.hindered) > inodePatience
	all := true
	w.mu.Unlock()
	w.o.Orphans(func(ino uint64, measure func() (Delta, bool)) {
		all = w.visit(ino, measure, force) && all
	})
	w.mu.Lock()
	switch {
	case all:
		w.hindered = time.Time{}
	case w.hindered.IsZero():
		w.hindered = time.Now()
	}
	return all
}

// visit counts one orphan unless somebody does already; false if it is being
// changed, which force does not care for.
func (w *Writer) visit(ino uint64, measure func() (Delta, bool), force bool) bool {
	w.mu.Lock()
	_, known := w.orphans[ino]
	w.mu.Unlock()
	if known {
		return true
	}
	held := w.TryHold(ino)
	if held {
		defer w.Unhold(ino)
	} else if !force {
		return false
	}
	charge, nameless := measure()
	if !nameless {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !held {
		w.me.deaths++ // a walk is needed
	}
	w.adopt(ino, charge)
	return true
}

// Nameless tells that an inode which the operation has locked, and is going to
// change, has no name, and what it is charged now. Somebody must count it before:
// who deleted it has freed, or is about to free, just that.
func (op *Op) Nameless(ino uint64, charge Delta) {
	op.w.mu.Lock()
	defer op.w.mu.Unlock()
	op.w.adopt(ino, charge)
}

// adopt charges an orphan that is open here, unless somebody does. mu is held.
func (w *Writer) adopt(ino uint64, charge Delta) {
	if _, known := w.orphans[ino]; known || !w.o.Server {
		return
	}
	ok, err := tryLock(w.l.fd, orphanLock+int64(ino)&inodeMask, 1)
	if err != nil || !ok {
		w.others[ino] = charge
		return
	}
	delete(w.others, ino)
	w.orphans[ino] = charge
	w.me.orphans = w.me.orphans.Plus(charge)
	w.me.use = w.me.use.Plus(charge)
	_ = w.write()
	_ = takenPoint.Hit()
}
