package fuseserver

import (
	"sync"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
)

const (
	maxWorkers = 8   // threads that may sleep in the kernel for this share
	maxJobs    = 256 // waiting for one of them
)

// job is a request that left its queue, or a descriptor to close.
type job struct {
	from    completion // nil: close closeFd
	in, out [][]byte
	header  fusewire.InHeader
	args    []byte // a private copy
	op      *operation
	session *session
	closeFd int
}

// completion is how a request ends outside its queue.
type completion interface {
	CopyOut([]byte) int
	Complete(n int)
}

// origin is where a request came from: a virtqueue or a test.
type origin interface {
	detach() (from completion, in, out [][]byte)
}

// queued is a request of a virtqueue.
type queued struct{ r *vhostuser.Request }

func (q queued) detach() (completion, [][]byte, [][]byte) {
	d := q.r.Detach()
	return d, d.In, d.Out
}

// workers run what may block. They are started one by one as long as all
// others are busy, up to maxWorkers, and parked when idle.
type workers struct {
	srv  *Server
	jobs chan job
	wg   sync.WaitGroup

	mu      sync.Mutex
	started int  // guarded by mu
	idle    int  // guarded by mu: parked, or about to take a queued job
	closed  bool // guarded by mu
}

func newWorkers(s *Server) *workers {
	return &workers{srv: s, jobs: make(chan job, maxJobs)}
}

// admit makes sure that a worker will come for one more job; false if too
// many jobs wait already, or after close.
func (w *workers) admit() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || len(w.jobs) >= maxJobs/2 {
		return false
	}
	if w.idle > len(w.jobs) || w.started == maxWorkers {
		return true
	}
	w.started++
	w.idle++
	w.wg.Add(1)
	go w.run()
	return true
}

// put hands over a job that was admitted. The margin of admit covers every
// queue thread between admit and put, so it does not block.
func (w *workers) put(j job) { w.jobs <- j }

// try is admit and put.
func (w *workers) try(j job) bool {
	if !w.admit() {
		return false
	}
	w.put(j)
	return true
}

func (w *workers) run() {
	defer w.wg.Done()
	var c *call
	for j := range w.jobs {
		w.mark(-1)
		if j.from == nil {
			closeFd(j.closeFd)
		} else {
			if c == nil {
				c = newCall(w.srv)
			}
			c.finishJob(j)
		}
		w.mark(1)
	}
}

func (w *workers) mark(delta int) {
	w.mu.Lock()
	w.idle += delta
	w.mu.Unlock()
}

// close waits for the jobs that were taken; none may be put any more.
func (w *workers) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	close(w.jobs)
	w.wg.Wait()
}
