package fuseserver

import (
	"time"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// closing is a node without a name that nobody uses any more, but that another
// process was changing when it was to be closed: what it is charged could not be
// measured.
type closing struct {
	n     *inode
	since time.Time
}

// closed is called with the last reference of a node.
func (q *quota) closed(n *inode) {
	if !q.pinned(n) {
		q.s.closeLater(n.fd, n)
		return
	}
	if _, nameless := q.nameless(n); !nameless {
		q.closeCounted(n, nil)
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
	if charge, nameless := q.measure(n); nameless {
		q.closeCounted(n, &charge)
	} else {
		q.closeCounted(n, nil)
	}
}

// closeCounted closes a node and takes it out of the count. charge is what the
// inode has if it has no name, else nil. Nobody can pin its number in between, which
// is another file's as soon as it is closed.
func (q *quota) closeCounted(n *inode, charge *ledger.Delta) {
	p := q.pinShard(n.key.ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	q.s.closeLater(n.fd, n)
	q.unpinLocked(p, n.key.ino, charge)
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
