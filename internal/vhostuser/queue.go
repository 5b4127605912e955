package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// stopGrace bounds how long the answer to GET_VRING_BASE waits for the request
// that the queue's thread is in, so that a device reset normally finds no write
// to guest memory under way. The front end holds its big lock meanwhile.
const stopGrace = 100 * time.Millisecond

// life is a ring's life from SET_VRING_KICK to GET_VRING_BASE. Completions that
// come after its end wait in late: a paused machine goes on with the same ring
// and gets them then; after a reset the life is forgotten and they with it.
type life struct {
	late        []usedElem   // guarded by queue.mu
	outstanding atomic.Int32 // detached and not yet completed
}

// view is what a queue works with: immutable, replaced as a whole. Each place
// it is kept in holds one reference to mem.
type view struct {
	ring
	mem      *memory
	life     *life
	eventIdx bool
	indirect bool
}

// ticket says where a completion belongs.
type ticket struct {
	life *life
	mem  *memory // referenced while detached
	head uint16
}

// ringState is where a ring is in its life.
//
//	ringStopped -> ringStarted (SET_VRING_KICK) -> ringStopped (GET_VRING_BASE)
//	ringStarted -> ringBroken (malformed chain) -> ringStopped
type ringState uint8

const (
	ringStopped ringState = iota
	ringStarted
	ringBroken
)

// queue is one virtqueue: what the control loop has set, and its thread.
//
// claim couples "this head is mine" with "nothing has changed": the thread
// takes a head by compare-and-swap from n to n+1 in the low 16 bits, and the
// control loop announces a change by adding to the bits above. So the number
// that GET_VRING_BASE returns is exact even while a request runs.
type queue struct {
	dev   *device
	index int
	ep    int // epoll of the kick and of poke, both edge triggered
	poke  int // our own eventfd: something has changed
	claim atomic.Uint64
	fence atomic.Uint32
	acked chan struct{} // capacity 1: the thread has seen the last change
	done  chan struct{} // closed when the thread has ended

	mu        sync.Mutex
	state     ringState
	exit      bool
	enabled   bool
	num       uint16
	base      uint16
	addr      ringAddr
	addrSet   bool
	live      *view // nil while the ring may not be served
	life      *life // of the started ring, or of the last one
	used      uint16
	signalled uint16 // used index at the last look at whether to call
	usedFlags uint16
	kickFD    int
	callFD    int
	errFD     int
	callPoll  bool // the call descriptor may block: ask before writing
	free      []*iovecs

	worker // the thread's own
}

func newQueue(d *device, index int) (*queue, error) {
	q := &queue{
		dev: d, index: index, ep: -1, poke: -1, kickFD: -1, callFD: -1, errFD: -1,
		acked: make(chan struct{}, 1), done: make(chan struct{}),
	}
	var err error
	if q.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if q.poke, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = q.watch(q.poke)
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("eventfd", err), unix.Close(q.ep))
	}
	return q, nil
}

// watch adds fd to the queue's epoll set. Edge triggered, a kick wakes the
// thread each time it is written although nobody ever reads it: the descriptor
// and its flags are shared with the front end, which reads it itself.
func (q *queue) watch(fd int) error {
	return unix.EpollCtl(q.ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)})
}

// end tells the thread to leave.
func (q *queue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.exit = true
	q.state = ringStopped
	q.changed()
}

// join waits until the thread has left and closes every descriptor.
func (q *queue) join() {
	<-q.done
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, fd := range []*int{&q.kickFD, &q.callFD, &q.errFD, &q.poke, &q.ep} {
		replaceFD(fd, -1)
	}
}

// changed rebuilds the view from what is set and makes the thread look at it.
// Called with mu held. It does not wait.
func (q *queue) changed() {
	old := q.live
	q.live = nil
	if q.state == ringStarted && q.serving() {
		q.live = q.build()
	}
	if old != nil {
		old.mem.release()
	}
	select {
	case <-q.acked:
	default:
	}
	q.claim.Add(1 << 16)
	writeEvent(q.poke)
}

// serving reports whether an otherwise ready ring is enabled. Without the
// protocol features there is no SET_VRING_ENABLE and rings start enabled.
func (q *queue) serving() bool {
	return !q.exit && (q.enabled || !q.dev.enables)
}

// build makes a view, or nil while memory does not hold the ring: the memory
// table may change in several messages. Called with mu held.
func (q *queue) build() *view {
	mem := q.dev.memory()
	r, err := mapRing(mem, q.addr, q.num)
	if err != nil {
		mem.release()
		return nil
	}
	f := q.dev.features
	return &view{ring: r, mem: mem, life: q.life, eventIdx: f&featEventIdx != 0, indirect: f&featIndirect != 0}
}

// mapRing finds a ring in guest memory and checks its full extent.
func mapRing(mem *memory, a ringAddr, num uint16) (ring, error) {
	return checkRing(
		mem.user(a.desc, descSize*uint64(num)),
		mem.user(a.avail, availLen(num)),
		mem.user(a.used, usedLen(num)), num)
}

// setNum sets the ring's size.
func (q *queue) setNum(num uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if num == 0 || num > uint32(q.dev.opts.QueueSize) || num&(num-1) != 0 {
		return fmt.Errorf("ring size %d is not a power of two up to %d", num, q.dev.opts.QueueSize)
	}
	if q.state != ringStopped && uint16(num) != q.num {
		return fmt.Errorf("queue %d is started", q.index)
	}
	q.num = uint16(num)
	return nil
}

// setBase sets the index of the next head to take.
func (q *queue) setBase(base uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if base > 0xffff {
		return fmt.Errorf("ring base %d", base)
	}
	if q.state != ringStopped {
		return fmt.Errorf("queue %d is started", q.index)
	}
	q.base = uint16(base)
	return nil
}

// setAddr sets where the ring is, after checking that it is all there.
func (q *queue) setAddr(a ringAddr) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state != ringStopped {
		if a == q.addr {
			return nil
		}
		return fmt.Errorf("queue %d is started", q.index)
	}
	mem := q.dev.memory()
	defer mem.release()
	if _, err := mapRing(mem, a, q.num); err != nil {
		return err
	}
	q.addr, q.addrSet = a, true
	return nil
}

// setKick takes the kick descriptor; the first one starts the ring.
func (q *queue) setKick(fd int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if fd < 0 {
		return errors.New("a queue without kick descriptor is not served")
	}
	if err := q.watch(fd); err != nil {
		return errors.Join(os.NewSyscallError("epoll_ctl", err), unix.Close(fd))
	}
	q.dropKick()
	q.kickFD = fd
	if q.state == ringStopped {
		if !q.addrSet {
			return fmt.Errorf("queue %d is kicked before it has a ring", q.index)
		}
		q.begin()
	}
	return nil
}

// begin starts the ring: either the one that was stopped last goes on, then
// its late completions are published, or a new life begins. They differ in the
// indices: a driver that has reset its ring cannot have unanswered requests at
// the same indices. Called with mu held.
func (q *queue) begin() {
	q.state = ringStarted
	used := q.usedInMemory()
	l := q.life
	resumed := l != nil && q.base == uint16(q.claim.Load()) && used == q.used
	if !resumed {
		l = &life{}
		q.used = used
	}
	q.life = l
	q.signalled = q.used
	q.usedFlags = 0
	q.claim.Store(q.claim.Load()&^0xffff | uint64(q.base))
	q.changed()
	q.publishLate()
}

// usedInMemory reads the index that the used ring starts from.
func (q *queue) usedInMemory() uint16 {
	mem := q.dev.memory()
	defer mem.release()
	r, err := mapRing(mem, q.addr, q.num)
	if err != nil {
		return q.used
	}
	return r.usedIdx()
}

// setCall takes the call descriptor, or none. The driver is called once: an
// earlier call may have been lost between two descriptors.
func (q *queue) setCall(fd int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	replaceFD(&q.callFD, fd)
	q.callPoll = fd >= 0 && mayBlock(fd)
	if q.state == ringStarted {
		q.call()
	}
	return nil
}

// setErr takes the descriptor that says that the queue is broken, or none.
func (q *queue) setErr(fd int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	replaceFD(&q.errFD, fd)
	return nil
}

// setEnabled lets the ring be served (1) or not (0).
func (q *queue) setEnabled(on uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if on > 1 {
		return fmt.Errorf("ring enabled %d", on)
	}
	if q.enabled != (on == 1) {
		q.enabled = on == 1
		q.changed()
		q.publishLate()
	}
	return nil
}

// refresh follows a change of memory or features.
func (q *queue) refresh() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.state == ringStarted {
		q.changed()
		q.publishLate()
	}
}

// stop ends the ring and returns the index of the next head. It waits for the
// thread to leave the ring, but no longer than grace.
func (q *queue) stop(grace time.Duration) (base uint16) {
	q.mu.Lock()
	started := q.state != ringStopped
	q.state = ringStopped
	q.changed()
	if started {
		q.base = uint16(q.claim.Load())
	}
	base = q.base
	q.dropKick()
	replaceFD(&q.callFD, -1)
	q.mu.Unlock()

	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-q.acked:
	case <-t.C:
		q.dev.logf("queue %d: stopped while a request was running", q.index)
	}
	return base
}

// fail breaks the queue: no more requests until the front end restarts it.
func (q *queue) fail(v *view, err error) {
	q.mu.Lock()
	if q.state != ringStarted || q.life != v.life {
		q.mu.Unlock()
		return
	}
	q.state = ringBroken
	q.changed()
	q.dropKick()
	if q.errFD >= 0 {
		writeEventTo(q.errFD, mayBlock(q.errFD))
	}
	q.mu.Unlock()
	q.dev.logf("queue %d is broken: %v", q.index, err)
}

// dropKick forgets the kick descriptor. Closing it is not enough to end the
// watch: that lives as long as the front end holds the same eventfd.
func (q *queue) dropKick() {
	if q.kickFD >= 0 {
		_ = unix.EpollCtl(q.ep, unix.EPOLL_CTL_DEL, q.kickFD, nil)
	}
	replaceFD(&q.kickFD, -1)
}

func replaceFD(p *int, fd int) {
	if *p >= 0 {
		_ = unix.Close(*p)
	}
	*p = fd
}
