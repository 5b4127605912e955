package main

import (
	"fmt"
	"math/bits"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// program is the load of one row on one server: depth slots, each with a
// request in flight.
type program interface {
	// start returns the first request of a slot.
	start(slot int) *frontend.Chain
	// done looks at a completed request of a slot. It returns the slot's next
	// request and whether this one ended an operation.
	done(slot int, c *frontend.Chain) (next *frontend.Chain, finished bool, err error)
	// close gives back what the program holds.
	close() error
}

// sample is the outcome of one round of one row on one server.
type sample struct {
	Ops   int64         `json:"ops"`
	Span  time.Duration `json:"span_ns"`
	CPU   time.Duration `json:"server_cpu_ns"`
	Kicks int64         `json:"kicks"`
	Calls int64         `json:"calls"`
	P50   time.Duration `json:"p50_ns"`
	P99   time.Duration `json:"p99_ns"`
}

func (s sample) rate() float64 { return float64(s.Ops) / s.Span.Seconds() }

// cpuPerOp is the server's processor time per operation in microseconds.
func (s sample) cpuPerOp() float64 { return float64(s.CPU.Nanoseconds()) / 1e3 / float64(s.Ops) }

// warmUp precedes every measurement, so that both servers are in their stride.
const warmUp = 20 * time.Millisecond

// play keeps depth requests of p in flight for a warm-up and then for span,
// and drains what is left. It measures between the two.
func play(s *server, p program, depth int, span time.Duration) (sample, error) {
	q := s.c.Queue(1)
	l := &load{q: q, p: p, begun: make([]time.Time, depth)}
	now := time.Now()
	for i := range depth {
		l.begun[i] = now
		l.submit(i, p.start(i))
	}
	if err := l.run(now.Add(warmUp), true); err != nil {
		return sample{}, err
	}
	var out sample
	l.hist, l.ops = histogram{}, 0
	cpu, kicks, calls, start := s.cpu(), q.Kicks, q.Calls, time.Now()
	if err := l.run(start.Add(span), true); err != nil {
		return out, err
	}
	out = sample{Ops: l.ops, Span: time.Since(start), CPU: s.cpu() - cpu, Kicks: q.Kicks - kicks, Calls: q.Calls - calls,
		P50: l.hist.quantile(0.50), P99: l.hist.quantile(0.99)}
	return out, l.run(time.Now().Add(time.Minute), false)
}

// load is a program in flight.
type load struct {
	q        *frontend.Queue
	p        program
	begun    []time.Time
	inflight int
	ops      int64
	hist     histogram
}

func (l *load) submit(slot int, c *frontend.Chain) {
	c.Tag = slot
	l.inflight++
	l.q.Submit(c)
}

// run handles completions until an operation ends after the deadline, so that
// long operations are counted whole; without resubmission until nothing is in
// flight.
func (l *load) run(deadline time.Time, resubmit bool) error {
	for l.inflight > 0 {
		if !l.q.Wait() {
			return frontend.ErrDisconnected
		}
		for c := l.q.Poll(); c != nil; c = l.q.Poll() {
			now := time.Now()
			finished, err := l.complete(c, now, resubmit)
			if err != nil {
				return err
			}
			if finished && now.After(deadline) {
				return nil
			}
		}
	}
	return nil
}

func (l *load) complete(c *frontend.Chain, now time.Time, resubmit bool) (finished bool, err error) {
	l.inflight--
	slot := c.Tag
	next, finished, err := l.p.done(slot, c)
	if err != nil {
		return false, err
	}
	if finished {
		l.ops++
		l.hist.add(now.Sub(l.begun[slot]))
		l.begun[slot] = now
		if !resubmit {
			return true, nil
		}
	}
	l.submit(slot, next)
	return finished, nil
}

// replyError checks the header of a reply where it lies.
func replyError(c *frontend.Chain) error {
	if c.Written < fusewire.OutHeaderSize {
		return fmt.Errorf("reply of %d bytes", c.Written)
	}
	var h fusewire.OutHeader
	fusewire.Decode(c.Out[0], &h)
	if h.Error != 0 || h.Len != c.Written {
		return fmt.Errorf("reply error %d, length %d of %d", h.Error, h.Len, c.Written)
	}
	return nil
}

// histogram counts durations in buckets of about 3 %.
type histogram struct {
	n       int64
	buckets [64 * 32]int64
}

func bucketOf(d time.Duration) int {
	v := uint64(max(d, 32))
	e := bits.Len64(v) - 6
	return e*32 + int(v>>e)&31
}

func (h *histogram) add(d time.Duration) {
	h.n++
	h.buckets[bucketOf(d)]++
}

func (h *histogram) quantile(p float64) time.Duration {
	want := int64(p * float64(h.n))
	for i, n := range h.buckets {
		if want -= n; want < 0 {
			return time.Duration(uint64(32+i%32) << (i / 32))
		}
	}
	return 0
}
