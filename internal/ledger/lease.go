package ledger

import "time"

// Lease is the lock of one inode, kept over many operations: who has it knows the
// inode's size without looking, and others wait until it is dropped.
type Lease struct {
	w      *Writer
	ino    uint64
	begun  time.Time
	deaths uint64 // of other writers, when it began
}

// Keep keeps the lock of the operation's only inode when the operation is done,
// until Drop. Whoever calls it must drop the lease within a fraction of a second:
// others wait for it as for an operation. It returns nil where the lock was not
// got; where it is kept already, that lease.
func (op *Op) Keep() *Lease {
	if op.late || op.err != nil || op.n != 1 {
		return nil
	}
	s := op.w.stripe(op.inos[0])
	l := s.kept[op.inos[0]]
	if l == nil {
		l = &Lease{w: op.w, ino: op.inos[0], begun: op.begun, deaths: op.deaths}
		if s.kept == nil {
			s.kept = map[uint64]*Lease{}
		}
		s.kept[l.ino] = l
	}
	return l
}

// Drop ends the lease. It must be called once, before the writer is closed.
func (l *Lease) Drop() {
	s := l.w.stripe(l.ino)
	s.Lock()
	defer s.Unlock()
	delete(s.kept, l.ino)
	unlock(l.w.l.fd, inodeLock+int64(l.ino)&inodeMask, 1)
}

// Used tells that something was just done that relied on the lease alone. If it
// is so old that others may have stopped waiting for it, and one did, that asks
// for a walk.
func (l *Lease) Used() {
	if time.Since(l.begun) < inodePatience {
		return
	}
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	if l.w.overrun(l.begun, l.deaths) {
		_ = l.w.write()
	}
}

// TryHold keeps everybody else from an inode until Unhold, if nobody is changing
// it: for a look at it that is no operation.
func (w *Writer) TryHold(ino uint64) bool {
	s := w.stripe(ino)
	if !s.TryLock() {
		return false
	}
	if s.kept[ino] != nil {
		return true
	}
	if ok, err := tryLock(w.l.fd, inodeLock+int64(ino)&inodeMask, 1); ok && err == nil {
		return true
	}
	s.Unlock()
	return false
}

// Unhold ends TryHold.
func (w *Writer) Unhold(ino uint64) {
	s := w.stripe(ino)
	if s.kept[ino] == nil {
		unlock(w.l.fd, inodeLock+int64(ino)&inodeMask, 1)
	}
	s.Unlock()
}
