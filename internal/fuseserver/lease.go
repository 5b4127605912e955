package fuseserver

import (
	"time"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// lease is the knowledge of a file's size, which nobody else can change. There is
// one only while a handle of the file is open that was written through, so that an
// inode's number cannot become another file's.
type lease struct {
	*ledger.Lease
	ino  uint64
	size int64 // unknown: somebody has to look; guarded by the stripe, as is held
	held bool
}

const unknown = -1

// maxLeases bounds the locks that are kept at a time: the kernel keeps those of one
// file in a list.
const maxLeases = 64

// covers reports whether a write up to end neither makes the file longer nor needs
// a look at it. The stripe is held.
func (l *lease) covers(end uint64) bool {
	return l != nil && l.held && l.size != unknown && end <= uint64(l.size)
}

// keep makes the lock of a change a lease, for a handle of the file that is size
// bytes long after it.
func (z *sizeChange) keep(h *handle, size int64) {
	q := z.q
	l := z.stripe.leases[z.n.key.ino]
	if l == nil {
		if !q.alone.Load() || z.st.Nlink == 0 || q.leases.Load() >= maxLeases {
			return
		}
		kept := z.op.Keep()
		if kept == nil {
			return
		}
		l = &lease{Lease: kept, ino: z.n.key.ino, held: true}
		if z.stripe.leases == nil {
			z.stripe.leases = map[uint64]*lease{}
		}
		z.stripe.leases[l.ino] = l
		q.leases.Add(1)
	}
	l.size = size
	h.lease = l
}

// endLeases drops all leases every now and then: another process may wait for one.
func (q *quota) endLeases() {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		select {
		case <-q.stop:
			return
		case <-tick.C:
			q.dropLeases()
		}
	}
}

func (q *quota) dropLeases() {
	if q.leases.Load() == 0 {
		return
	}
	var busy []*sizeStripe // by a slow write: the others need not wait for it
	for i := range q.sizes {
		if s := &q.sizes[i]; s.TryLock() {
			q.dropAll(s)
		} else {
			busy = append(busy, s)
		}
	}
	for _, s := range busy {
		s.Lock()
		q.dropAll(s)
	}
}

// dropAll ends the leases of a stripe and unlocks it.
func (q *quota) dropAll(s *sizeStripe) {
	for _, l := range s.leases {
		q.drop(s, l)
	}
	s.Unlock()
}

// dropLease ends a lease if it has not ended yet.
func (q *quota) dropLease(l *lease) {
	s := q.stripeOf(l.ino)
	s.Lock()
	defer s.Unlock()
	if l.held {
		q.drop(s, l)
	}
}

// drop ends a lease. Its stripe is held.
func (q *quota) drop(s *sizeStripe, l *lease) {
	delete(s.leases, l.ino)
	l.held = false
	l.Drop()
	q.leases.Add(-1)
}
