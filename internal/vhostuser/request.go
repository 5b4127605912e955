package vhostuser

import (
	"runtime/debug"
	"sync/atomic"
)

// Handler serves the requests of all queues of one device. Serve is called
// from one locked thread per queue, so calls for different queues run at the
// same time and calls for one queue never do.
type Handler interface {
	// Serve handles one request. It returns done=true after filling r.Out,
	// with n the number of bytes written to the device-writable buffers (the
	// used length), or it calls r.Detach and returns done=false; then
	// Detached.Complete must be called exactly once, from any goroutine.
	//
	// r and the slices in it are valid only until Serve returns.
	Serve(r *Request) (n int, done bool)
}

// StateMaker is an optional part of a Handler: state that belongs to one
// queue's thread (scratch buffers, iovec arrays) and needs no lock.
type StateMaker interface {
	// NewState returns the Request.State of every request of this queue.
	NewState(queue int) any
}

// Request is one descriptor chain. In and Out alias guest memory, which the
// guest may change at any time: copy first, then validate, never read twice.
type Request struct {
	Queue int      // 0 is the high-priority queue of a file system device
	In    [][]byte // device-readable segments, in guest memory
	Out   [][]byte // device-writable segments, in guest memory
	State any      // what StateMaker.NewState returned for this queue

	// Flush may be set by Serve to have this completion and the ones before it
	// published at once: for requests that took long compared with a wake-up,
	// so that their replies do not wait for the requests behind them.
	Flush bool

	q        *queue
	ticket   ticket
	iov      *iovecs
	complete func(n int) // of a request made by NewRequest
}

// NewRequest makes a request without a ring, of ordinary memory, to drive a
// Handler in a test. complete is called if it is detached and completed.
func NewRequest(queue int, in, out [][]byte, state any, complete func(n int)) *Request {
	return &Request{Queue: queue, In: in, Out: out, State: state, complete: complete}
}

// InLen returns the number of device-readable bytes.
func (r *Request) InLen() int { return totalLen(r.In) }

// OutLen returns the number of device-writable bytes.
func (r *Request) OutLen() int { return totalLen(r.Out) }

// CopyIn copies the first len(dst) device-readable bytes to dst, or fewer if
// there are not so many, and returns the number copied.
func (r *Request) CopyIn(dst []byte) int { return gather(dst, r.In) }

// CopyOut copies src to the start of the device-writable bytes and returns the
// number copied, less than len(src) if they are too few.
func (r *Request) CopyOut(src []byte) int { return scatter(r.Out, src) }

// Detach takes the request out of its queue's hands, so that the queue goes on
// while another goroutine works on it. The guest memory it points to stays
// mapped until Complete.
func (r *Request) Detach() *Detached {
	d := &Detached{In: r.In, Out: r.Out, q: r.q, ticket: r.ticket, iov: r.iov, complete: r.complete}
	if r.q != nil {
		r.iov = nil
		if len(d.In)+len(d.Out) <= fewSegments {
			d.keepFew()
		}
		r.ticket.mem.retain()
		r.ticket.life.outstanding.Add(1)
	}
	return d
}

// fewSegments is the size of a request whose segments are copied when it is
// detached: it may wait for long, and there may be many of them, each of which
// would keep an array of 48 KiB.
const fewSegments = 8

// keepFew moves the segments to an array of their own and gives the queue its
// large one back.
func (d *Detached) keepFew() {
	few := make([][]byte, 0, fewSegments)
	few = append(append(few, d.In...), d.Out...)
	n := len(d.In)
	d.In, d.Out = few[:n:n], few[n:]
	d.q.freeIovecs(d.iov)
	d.iov = nil
}

// Detached is a request that is completed outside its queue's thread.
type Detached struct {
	In, Out [][]byte // as in Request, valid until Complete

	q      *queue
	ticket ticket
	iov    *iovecs
	done   atomic.Bool

	complete func(n int)
}

// CopyOut is Request.CopyOut for a detached request. It survives guest memory
// that its owner has truncated: then it returns 0.
func (d *Detached) CopyOut(src []byte) (n int) {
	defer guardFault(debug.SetPanicOnFault(true), &n)
	return scatter(d.Out, src)
}

// Complete returns the request to the driver with n bytes written. A second
// call is a programming error and panics.
func (d *Detached) Complete(n int) {
	if d.done.Swap(true) {
		panic("vhostuser: request completed twice")
	}
	if d.q != nil {
		d.q.completeDetached(d, n)
	} else if d.complete != nil {
		d.complete(n)
	}
	d.In, d.Out = nil, nil
}

// guardFault is deferred: it restores the goroutine's fault mode and turns a
// memory fault into *n = 0. Other panics go on.
func guardFault(old bool, n *int) {
	debug.SetPanicOnFault(old)
	if p := recover(); p != nil {
		if !isFault(p, nil) {
			panic(p)
		}
		*n = 0
	}
}

// isFault reports whether p is the panic of an unexpected memory fault at a
// known address, as debug.SetPanicOnFault makes of SIGBUS and SIGSEGV, and,
// unless m is nil, whether the address is guest memory.
func isFault(p any, m *memory) bool {
	f, ok := p.(interface {
		error
		Addr() uintptr
	})
	return ok && (m == nil || m.contains(f.Addr()))
}

func totalLen(v [][]byte) int {
	n := 0
	for _, b := range v {
		n += len(b)
	}
	return n
}

func gather(dst []byte, src [][]byte) int {
	n := 0
	for _, b := range src {
		if n == len(dst) {
			break
		}
		n += copy(dst[n:], b)
	}
	return n
}

func scatter(dst [][]byte, src []byte) int {
	n := 0
	for _, b := range dst {
		if n == len(src) {
			break
		}
		n += copy(b, src[n:])
	}
	return n
}
