package fuseserver

import "time"

// closing is a node without a name that nobody uses any more, but that another
// process was changing when it was to be closed: what it is charged could not be
// measured.
type closing struct {
	n     *inode
	since time.Time
}

// closed is called with the last reference of a node.
func (q *quota) closed(n *inode) {
	if !q.counts(n) || n.isDir() || n.id == rootID {
		q.s.closeLater(n.fd, n)
		return
	}
	if _, nameless := q.nameless(n); !nameless {
		q.s.closeLater(n.fd, n)
		q.unpin(n.key.ino, nil)
		return
	}
	if q.w.TryHold(n.key.ino) {
		q.closeNameless(n)
		q.w.Unhold(n.key.ino)
		return
	}
	q.closingMu.Lock()
	q.closing = append(q.closing, closing{n, time.Now()})
	q.closingMu.Unlock()
}

// closeNameless closes a node that nobody is changing.
func (q *quota) closeNameless(n *inode) {
	charge, nameless := q.measure(n)
	q.s.closeLater(n.fd, n)
	if nameless {
		q.unpin(n.key.ino, &charge)
	} else {
		q.unpin(n.key.ino, nil)
	}
}

// closeHindered closes what could not be closed at once. What is being changed for
// longer than patience is closed all the same, and that asks for a walk.
func (q *quota) closeHindered(patience time.Duration) {
	q.closingMu.Lock()
	all := q.closing
	q.closing = nil
	q.closingMu.Unlock()
	for _, c := range all {
		ino := c.n.key.ino
		switch {
		case q.w.TryHold(ino):
			q.closeNameless(c.n)
			q.w.Unhold(ino)
		case time.Since(c.since) >= patience:
			_ = q.w.Doubt()
			q.closeNameless(c.n)
		default:
			q.closingMu.Lock()
			q.closing = append(q.closing, c)
			q.closingMu.Unlock()
		}
	}
}
