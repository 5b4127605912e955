package fuseserver

import (
	"bytes"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// A lock that is not free is asked for again after firstRetry, then after twice
// as long, up to lastRetry: the holder may be another process of the host, which
// tells nobody when it lets go. A lock let go by this guest is asked for at once.
const (
	firstRetry = time.Millisecond
	lastRetry  = 50 * time.Millisecond
)

// lockWait is a request that waits for a lock.
type lockWait struct {
	lockRequest            // its handle is held
	o           *lockOwner // nil for flock
	line        *lockLine
	from        completion
	unique      uint64
	thread      uint32 // of the guest
	err         errno  // the answer, once it is known
}

// lockLine is all the waits for locks of one inode. They are asked for together,
// in the order of arrival, so that none overtakes another for having come at a
// luckier moment.
type lockLine struct {
	waits int
	delay time.Duration
	due   time.Time // when to ask again; zero: at once
	moved bool      // somebody got a lock in this round
}

// park puts a request aside. Called with mu held.
func (t *lockTable) park(c *call, r *lockRequest, o *lockOwner) errno {
	if t.ending || len(t.waits) >= maxWaits || c.from == nil {
		return unix.ENOLCK
	}
	if slices.Contains(t.early[:], c.h.Unique) {
		return unix.EINTR
	}
	line := t.lines[r.h.node]
	if line == nil {
		line = new(lockLine)
		t.lines[r.h.node] = line
	}
	line.waits++
	line.delay, line.due = firstRetry, time.Now().Add(firstRetry)
	l := &lockWait{lockRequest: *r, o: o, line: line, unique: c.h.Unique, thread: c.h.PID}
	l.h.refs.Add(1)
	if o != nil {
		o.waits++
	}
	l.from, _, _ = c.from.detach()
	c.parked = true
	t.waits = append(t.waits, l)
	if !t.running {
		t.running = true
		t.done.Add(1)
		go t.retry()
	}
	t.poke()
	return 0
}

// retry asks for the locks that requests wait for until none does. It is the
// only goroutine that does so, and takes them in the order of arrival.
func (t *lockTable) retry() {
	defer t.done.Done()
	timer := time.NewTimer(firstRetry)
	defer timer.Stop()
	for {
		granted, next, more := t.round()
		answerAll(granted)
		if !more {
			return
		}
		timer.Reset(max(0, time.Until(next)))
		select {
		case <-t.wake:
		case <-timer.C:
		}
	}
}

// round asks once for every lock that is due. It returns the waits that ended,
// when the next one is due, and false if there is none.
func (t *lockTable) round() (ended []*lockWait, next time.Time, more bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	ended = t.takeFunc(func(l *lockWait) bool {
		if l.line.due.After(now) {
			return false
		}
		l.err = t.try(&l.lockRequest, l.o)
		l.line.moved = l.line.moved || l.err == 0
		return l.err != unix.EAGAIN
	})
	for _, line := range t.lines {
		if !line.due.After(now) {
			line.again(now)
		}
		if next.IsZero() || line.due.Before(next) {
			next = line.due
		}
	}
	t.running = len(t.waits) > 0
	return ended, next, t.running
}

// again sets when to ask next: soon, while locks change hands.
func (l *lockLine) again(now time.Time) {
	if l.moved {
		l.delay = firstRetry
	}
	l.moved = false
	l.due = now.Add(l.delay)
	l.delay = min(2*l.delay, lastRetry)
}

// take removes the waits that match and gives them err as their answer. They
// are answered without mu. Called with mu held.
func (t *lockTable) take(err errno, match func(*lockWait) bool) []*lockWait {
	return t.takeFunc(func(l *lockWait) bool {
		if !match(l) {
			return false
		}
		l.err = err
		return true
	})
}

// takeFunc removes the waits that have ended, and the owners that only waited.
// Called with mu held.
func (t *lockTable) takeFunc(ended func(*lockWait) bool) (gone []*lockWait) {
	kept := t.waits[:0]
	for _, l := range t.waits {
		if !ended(l) {
			kept = append(kept, l)
			continue
		}
		gone = append(gone, l)
		if l.line.waits--; l.line.waits == 0 {
			delete(t.lines, l.h.node)
		}
		if l.o != nil {
			l.o.waits--
			t.leave(l.o)
		}
	}
	clear(t.waits[len(kept):])
	t.waits = kept
	return gone
}

// answerAll completes requests that waited. No lock is held: it writes to guest
// memory.
func answerAll(gone []*lockWait) {
	for _, l := range gone {
		var b [replySize]byte
		w.Put(b[:], &w.OutHeader{Len: replySize, Error: -int32(toErrno(l.err)), Unique: l.unique})
		l.from.Complete(l.from.CopyOut(b[:]))
		l.h.drop()
	}
}

// splitFields returns the words of a value.
func splitFields(b []byte) []string {
	var words []string
	for _, f := range bytes.Fields(b) {
		words = append(words, string(f))
	}
	return words
}
