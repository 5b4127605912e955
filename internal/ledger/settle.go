package ledger

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// ErrBusy says that the volume changed while it was walked.
var ErrBusy = errors.New("the volume is being changed")

const (
	// settleTries is how often a walk is repeated when the volume changed.
	settleTries = 3
	// quietPatience is how long a walk waits for writers to be idle.
	quietPatience = 500 * time.Millisecond
)

// Walked is what a walk found.
type Walked struct {
	Before State // what the ledger said
	Found  Delta // the sum of charges of everything that has a name
	Exact  bool  // the ledger says so now
}

// Settle makes the ledger say what is there: it waits until no writer is at work,
// calls walk, which returns the sum of charges, and adopts it if nothing changed
// meanwhile; otherwise it starts again, a few times. Writers are not kept out and
// may be attached, what they have open without a name is counted as they say.
//
// Errors: ErrBusy when the volume never was quiet, and the ledger is as it was;
// those of walk and of the ledger's file. Killed at any time, the ledger is as it
// was or as it will be.
func (l *Ledger) Settle(ctx context.Context, walk func(context.Context) (Delta, error)) (Walked, error) {
	release, err := l.lockWalk(ctx)
	if err != nil {
		return Walked{}, err
	}
	defer release()
	var out Walked
	if out.Before, err = l.State(); err != nil {
		return out, err
	}
	for range settleTries {
		var p page
		if err := l.waitQuiet(ctx, &p); err != nil {
			return out, err
		}
		if out.Found, err = walk(ctx); err != nil {
			return out, err
		}
		ok, err := l.adopt(&p, out.Found)
		if err != nil {
			return out, err
		}
		if ok {
			out.Exact = true
			return out, nil
		}
	}
	return out, errdefs.Wrap(errdefs.Filesystem, ErrBusy, "count what a volume holds")
}

// lockWalk keeps others from walking for the same end: they need not wait for a
// lock that is held as long as a walk takes.
func (l *Ledger) lockWalk(ctx context.Context) (release func(), err error) {
	patience := basePatience
	if end, ok := ctx.Deadline(); ok {
		patience = min(patience, time.Until(end))
	}
	ok, err := lockWithin(l.fd, walkLock, 1, patience)
	if err == nil && !ok {
		err = ErrBusy
	}
	if err != nil {
		return nil, errdefs.Wrap(errdefs.Filesystem, err, "count what a volume holds, as another process does")
	}
	return func() { unlock(l.fd, walkLock, 1) }, nil
}

// Compare walks and compares, and changes nothing. Exact says that nothing
// changed meanwhile.
func (l *Ledger) Compare(ctx context.Context, walk func(context.Context) (Delta, error)) (out Walked, err error) {
	for range settleTries {
		var p, q page
		if err := l.waitQuiet(ctx, &p); err != nil && !errors.Is(err, ErrBusy) {
			return out, err
		}
		if out.Before, err = l.State(); err != nil {
			return out, err
		}
		if out.Found, err = walk(ctx); err != nil {
			return out, err
		}
		if err := l.read(&q); err != nil {
			return out, err
		}
		if out.Exact = p.same(&q); out.Exact {
			return out, nil
		}
	}
	return out, nil
}

// waitQuiet reads the ledger when no living writer is at work.
func (l *Ledger) waitQuiet(ctx context.Context, p *page) error {
	deadline := time.Now().Add(quietPatience)
	for {
		if err := l.read(p); err != nil {
			return err
		}
		v := l.look(p, -1)
		if !v.busy && v.pending == (Delta{}) {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return errdefs.Wrap(errdefs.Filesystem, ErrBusy, "count what a volume holds")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// same reports whether no slot was written between two readings.
func (p *page) same(q *page) bool {
	if p.base.seq != q.base.seq {
		return false
	}
	for i := range MaxWriters {
		if p.slots[i].seq != q.slots[i].seq {
			return false
		}
	}
	return true
}

// adopt takes what a walk found, if nothing changed since p was read. With no
// writer alive it starts the slots anew; else only the base moves.
func (l *Ledger) adopt(p *page, found Delta) (bool, error) {
	release, err := l.lockBase()
	if err != nil {
		return false, err
	}
	defer release()
	alone, err := tryLock(l.fd, slotLock, MaxWriters) // nobody can join meanwhile
	if err != nil {
		return false, errdefs.Wrap(errdefs.Filesystem, err, "lock the ledger of a volume")
	}
	if alone {
		defer unlock(l.fd, slotLock, MaxWriters)
	}
	var q page
	if err := l.read(&q); err != nil {
		return false, err
	}
	if !p.same(&q) {
		return false, nil
	}
	b := q.base
	b.seq, b.unsettled, b.uncounted = b.seq+1, found.full(), false
	if alone {
		b.gen, b.deaths = b.gen+1, 0
		b.ceiling, b.use = q.promised(true), found
		return true, l.writeCounted(&b, found)
	}
	q.base.use = Delta{} // what the slots say, and nothing else
	v := l.look(&q, -1)
	if v.busy {
		return false, nil
	}
	if v.dead { // its slot can be taken care of only when it is free
		if ok, err := l.bury(&q); !ok || err != nil {
			return false, err
		}
	}
	b.deaths = q.deaths()
	b.use = found.Plus(v.orphans).Minus(v.used)
	return true, l.writeCounted(&b, found.Plus(v.orphans))
}

// writeCounted writes a base, and syncs it if use is beyond the ceiling: somebody
// wrote to the directory behind our back, or before there was a ledger.
func (l *Ledger) writeCounted(b *base, use Delta) error {
	if use.Bytes <= b.ceiling.Bytes && use.Inodes <= b.ceiling.Inodes {
		return l.writeBase(b)
	}
	b.ceiling = higher(b.ceiling, ceilingFor(use))
	if err := l.writeBase(b); err != nil {
		return err
	}
	return l.f.Sync()
}

// bury takes the slots of killed writers: from then on they count as left. It
// reports whether all are buried; their death must be walked for again.
func (l *Ledger) bury(p *page) (bool, error) {
	for i := range p.n {
		s := p.slots[i]
		if !s.lost() {
			continue
		}
		ok, err := tryLock(l.fd, slotLock+int64(i), 1)
		if err != nil || !ok {
			continue // alive
		}
		s.seq++
		s.flags, s.deaths = 0, s.deaths+1
		s.reserve, s.orphans = Delta{}, Delta{}
		var b [slotSize]byte
		s.encode(b[:])
		err = pwriteAll(l.fd, b[:], place(slotOff(i), slotSize, s.seq))
		unlock(l.fd, slotLock+int64(i), 1)
		if err != nil {
			return false, err
		}
		p.slots[i] = s
	}
	return true, nil
}

// LowerCeiling makes the ceiling what is used now, after a walk: it first makes
// everything durable that was deleted on the file system of dir. A high ceiling
// does no harm before a power cut.
func (l *Ledger) LowerCeiling(dir int) error {
	release, err := l.lockBase()
	if err != nil {
		return err
	}
	defer release()
	alone, err := tryLock(l.fd, slotLock, MaxWriters)
	if err != nil || !alone {
		return err
	}
	defer unlock(l.fd, slotLock, MaxWriters)
	if err := unix.Syncfs(dir); err != nil {
		return err
	}
	var p page
	if err := l.read(&p); err != nil {
		return err
	}
	if v := l.look(&p, -1); v.dead || p.base.unsettled || p.deaths() != p.base.deaths {
		return nil
	}
	b := p.base
	b.seq, b.gen, b.deaths = b.seq+1, b.gen+1, 0
	b.use = clamp(p.sum())
	b.ceiling = b.use
	if err := l.writeBase(&b); err != nil {
		return err
	}
	return l.f.Sync()
}
