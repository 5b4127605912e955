package vhostuser

import "runtime/debug"

// maxFreeIovecs bounds the segment arrays kept for reuse, 48 KiB each.
const maxFreeIovecs = 16

// publish makes completions visible to the driver and calls it if it asked for
// that. The queue's thread and the goroutines of detached requests all come
// through here, under one lock, so that the used index only moves forward.
func (q *queue) publish(l *life, done []usedElem) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.live == nil || q.live.life != l {
		l.late = append(l.late, done...)
		return
	}
	q.push(done)
}

// publishLate publishes what completed while the ring could not be written.
// Called with mu held.
func (q *queue) publishLate() {
	if q.live == nil || len(q.life.late) == 0 {
		return
	}
	late := q.life.late
	q.life.late = nil
	q.push(late)
}

// push writes completions to the live ring. Called with mu held.
func (q *queue) push(done []usedElem) {
	v := q.live
	for i, e := range done {
		v.putUsed(q.used+uint16(i), e)
	}
	q.used += uint16(len(done))
	v.setUsed(q.usedFlags, q.used)
	q.fence.Add(1) // the driver's wishes are read after the index is out
	if q.wantsCall(v) {
		q.call()
	}
}

// wantsCall reports whether the driver asked to be called for what has been
// published since the last time this was asked. Called with mu held.
func (q *queue) wantsCall(v *view) bool {
	old := q.signalled
	q.signalled = q.used
	if !v.eventIdx {
		return v.availFlags()&availNoInterrupt == 0
	}
	return needEvent(v.usedEvent(), q.used, old)
}

// call signals the driver. Called with mu held, which keeps the descriptor
// from being replaced meanwhile.
func (q *queue) call() {
	if q.callFD >= 0 {
		writeEventTo(q.callFD, q.callPoll)
	}
}

// newIovecs returns room for the segments of a chain, after the last one left
// with a detached request.
func (q *queue) newIovecs() *iovecs {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n := len(q.free); n > 0 {
		v := q.free[n-1]
		q.free = q.free[:n-1]
		return v
	}
	return &iovecs{}
}

// freeIovecs takes an array back for the next chain.
func (q *queue) freeIovecs(v *iovecs) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.free) < maxFreeIovecs {
		q.free = append(q.free, v)
	}
}

// completeDetached returns a detached request to the driver, or remembers it
// when its ring is not being served.
func (q *queue) completeDetached(d *Detached, n int) {
	t := d.ticket
	defer t.mem.release()
	defer q.guardPublish(debug.SetPanicOnFault(true), t)
	t.life.outstanding.Add(-1)
	if d.iov != nil {
		q.freeIovecs(d.iov)
	}
	q.publish(t.life, []usedElem{{head: t.head, n: uint32(n)}})
}

// guardPublish is deferred: it restores the goroutine's fault mode and breaks
// the queue after a fault on guest memory.
func (q *queue) guardPublish(old bool, t ticket) {
	debug.SetPanicOnFault(old)
	p := recover()
	if p == nil {
		return
	}
	q.mu.Lock()
	v := q.live
	q.mu.Unlock()
	if v == nil || !isFault(p, nil) {
		panic(p)
	}
	q.fail(v, errGuestMemory)
}
