package vhostuser

import (
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// batchBound is the number of completions, and batchBytes the payload bytes,
// after which completions are published although the batch goes on. Without
// them a busy ring would never signal, and a reply would wait for all the
// requests behind it. A signal costs as much as several metadata requests: at
// 16 getattr needs an eighth more processor time than at 32.
const (
	batchBound = 32
	batchBytes = 128 << 10
)

// breathEvery is how often the thread passes through the scheduler; it must be
// below the 10 ms after which the runtime wants to preempt. The clock is looked
// at after about breathWork requests, a page of payload counting as one more.
const (
	breathEvery = 8 * time.Millisecond
	breathWork  = 256
)

// worker is the part of a queue that only its thread touches.
type worker struct {
	cur   *view  // with a reference to its memory; nil: nothing to serve
	seen  uint64 // queue.claim as the thread knows it; low 16 bits: next head
	req   Request
	chain chain
	batch [batchBound]usedElem
	nb    int    // completions in batch
	bytes uint64 // payload bytes of batch
	wait  [2]unix.EpollEvent

	breath time.Time // when the thread last passed through the scheduler
	work   uint64    // done since the clock was last looked at
	linger linger
}

// run is the queue's thread.
func (q *queue) run() {
	defer close(q.done)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	debug.SetPanicOnFault(true)
	q.req = Request{Queue: q.index, q: q}
	if m, ok := q.dev.handler.(StateMaker); ok {
		q.req.State = m.NewState(q.index)
	}
	for q.resync() {
		for q.serve() {
			q.sleep()
		}
	}
}

// resync takes the newest view and reports whether to go on. From then on the
// thread no longer touches what the last view pointed to.
func (q *queue) resync() bool {
	drainEvent(q.poke)
	q.mu.Lock()
	defer q.mu.Unlock()
	old := q.cur
	q.cur = q.live
	if q.cur != nil {
		q.cur.mem.retain()
	}
	if old != nil {
		old.mem.release()
	}
	q.seen = q.claim.Load()
	select {
	case q.acked <- struct{}{}:
	default:
	}
	return !q.exit
}

// sleep waits for a kick or a change.
func (q *queue) sleep() {
	_, _ = unix.EpollWait(q.ep, q.wait[:], -1) // EINTR is a spurious wake-up
}

// serve handles requests until there are none and the driver has been asked to
// kick for the next one; then it reports true. False means that the view is
// stale. A fault on guest memory, which its owner has truncated, breaks the
// queue.
func (q *queue) serve() (idle bool) {
	if q.claim.Load() != q.seen {
		return false
	}
	v := q.cur
	if v == nil {
		return true
	}
	defer q.recoverFault(v)
	for {
		if !v.eventIdx {
			q.setUsedFlags(v, usedNoNotify)
		}
		for {
			n, err := q.available(v)
			if err != nil {
				q.fail(v, err)
				return false
			}
			if n == 0 {
				break
			}
			q.linger.taken += int(n)
			if !q.drain(v, n) {
				return false
			}
		}
		if !q.anotherComes(v) && !q.arm(v) {
			return true
		}
	}
}

// available returns the number of requests waiting. It reads the index once;
// what the driver adds later is for the next batch.
func (q *queue) available(v *view) (uint16, error) {
	n := v.availIdx() - uint16(q.seen)
	if n != 0 && int(n)+int(v.life.outstanding.Load()) > int(v.size) {
		return 0, errBadAvail
	}
	return n, nil
}

// arm asks for a kick and reports whether a request came in between. The store
// of the event index and the load of the available index must not pass each
// other; the fence between them is an atomic operation on a word of our own,
// not another store of the used index, which workers may be moving.
func (q *queue) arm(v *view) (more bool) {
	if v.eventIdx {
		v.setAvailEvent(uint16(q.seen))
	} else {
		q.setUsedFlags(v, 0)
	}
	q.fence.Add(1)
	return v.availIdx() != uint16(q.seen)
}

// setUsedFlags writes the flags of the used ring, if the ring is still ours.
func (q *queue) setUsedFlags(v *view, flags uint16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.live == v && q.usedFlags != flags {
		q.usedFlags = flags
		v.setUsed(flags, q.used)
	}
}

// drain handles n requests and publishes what is done. It reports false when
// the view is stale or the queue is broken.
func (q *queue) drain(v *view, n uint16) bool {
	ok := true
	for ; n > 0 && ok; n-- {
		ok = q.one(v)
	}
	q.flush(v)
	q.breathe()
	return ok
}

// one takes the next head and handles it.
func (q *queue) one(v *view) bool {
	head := v.head(uint16(q.seen))
	next := q.seen&^0xffff | uint64(uint16(q.seen)+1)
	if !q.claim.CompareAndSwap(q.seen, next) {
		return false // something changed; nothing has been taken
	}
	q.seen = next
	if q.req.iov == nil {
		q.req.iov = q.newIovecs()
	}
	c := &q.chain
	c.iov, c.indirectOK = q.req.iov, v.indirect
	if err := c.parse(&v.ring, v.mem, head); err != nil {
		if !returnable(err) {
			q.flush(v) // what was done before the bad chain still counts
			q.fail(v, err)
			return false
		}
		q.complete(v, usedElem{head: head}, 0)
		return true
	}
	q.handle(v, head)
	return true
}

// handle passes the parsed chain to the handler.
func (q *queue) handle(v *view, head uint16) {
	c, r := &q.chain, &q.req
	r.In, r.Out = c.iov.in[:c.nin], c.iov.out[:c.nout]
	r.ticket = ticket{life: v.life, mem: v.mem, head: head}
	r.Flush = false
	q.work += 1 + (c.inBytes+c.outBytes)>>12
	n, done := q.dev.handler.Serve(r)
	switch {
	case done && r.iov != nil:
		q.complete(v, usedElem{head: head, n: uint32(n)}, c.inBytes+c.outBytes)
	case done == (r.iov == nil):
		panic("vhostuser: a handler must either be done or detach")
	}
}

// breathe passes through the scheduler now and then. A goroutine that has not
// done so for 10 ms and spends its time in system calls makes the runtime's
// monitor take its processor away in each of them, and wake every 20 µs to find
// out: measured, 5 to 8 % more processor time in streams.
func (q *queue) breathe() {
	if q.work < breathWork {
		return
	}
	q.work = 0
	if now := time.Now(); now.Sub(q.breath) > breathEvery {
		q.breath = now
		runtime.Gosched()
	}
}

// complete adds a completion to the batch.
func (q *queue) complete(v *view, e usedElem, bytes uint64) {
	q.batch[q.nb] = e
	q.nb++
	q.bytes += bytes
	if q.nb == batchBound || q.bytes >= batchBytes || q.req.Flush {
		q.flush(v)
	}
}

// flush publishes the batch.
func (q *queue) flush(v *view) {
	n := q.nb
	q.nb, q.bytes = 0, 0
	if n > 0 {
		q.publish(v.life, q.batch[:n])
	}
}

// recoverFault is deferred by serve.
func (q *queue) recoverFault(v *view) {
	p := recover()
	if p == nil {
		return
	}
	if !isFault(p, v.mem) {
		panic(p)
	}
	q.nb, q.bytes = 0, 0
	q.fail(v, errGuestMemory)
}
