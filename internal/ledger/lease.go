package ledger

import "time"

// Lease is the lock of one inode, kept over many operations: who has it knows the
// inode's size without looking, and others wait until it is dropped. While there is
// one the writer is at work, so that no walk believes what it finds: one who did not
// get the lock in time may have changed the size.
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
		op.w.mu.Lock()
		op.w.leases++
		op.w.mu.Unlock()
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
	l.w.mu.Lock()
	l.w.leases--
	l.w.mu.Unlock()
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
