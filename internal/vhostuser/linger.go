package vhostuser

import "time"

// Lingering: after a batch the thread looks for the driver's next request for a
// moment before it asks to be kicked and sleeps. A kick that wakes a halted
// processor costs the driver several microseconds and the request 20 to 30;
// with 8 to 64 requests in flight on an idle machine, lingering gives a third
// more requests per second, up to twice as many, for about the same processor
// time of the server. One request at a time is not worth it: the driver has to
// be woken itself, and that takes longer.
const (
	lingerLeast = 4 // requests since the last sleep, below which it is not done
	lingerTime  = 50 * time.Microsecond
	lingerSkips = 256 // sleeps without lingering, at most, after failures in a row
)

// linger decides how long to linger. The zero value is ready.
type linger struct {
	taken  int // requests since the last decision
	skip   int // sleeps to go before the next attempt
	failed int // how many to skip after the next failure
}

// begin says whether to linger now.
func (l *linger) begin() bool {
	taken := l.taken
	l.taken = 0
	if taken < lingerLeast {
		return false
	}
	if l.skip > 0 {
		l.skip--
		return false
	}
	return true
}

// ended notes whether a request came. Where none does, as when the driver needs
// the processor that lingers, attempts become rare.
func (l *linger) ended(came bool) {
	if came {
		l.skip, l.failed = 0, 0
		return
	}
	l.skip = l.failed
	l.failed = min(max(1, 2*l.failed), lingerSkips)
}

// anotherComes lingers and reports whether a request came.
func (q *queue) anotherComes(v *view) bool {
	if !q.linger.begin() {
		return false
	}
	came := false
	for end := time.Now().Add(lingerTime); !came && time.Now().Before(end) && q.claim.Load() == q.seen; {
		for i := 0; i < 64 && !came; i++ {
			came = v.availIdx() != uint16(q.seen)
		}
	}
	q.linger.ended(came)
	return came
}
