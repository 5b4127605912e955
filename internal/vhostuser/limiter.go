package vhostuser

import (
	"sync"
	"time"
)

// limiter passes on one note a second: a guest or front end can cause them at
// will. It counts the ones it drops.
type limiter struct {
	to func(format string, args ...any)

	mu      sync.Mutex
	last    time.Time
	dropped int
}

func (l *limiter) printf(format string, args ...any) {
	if l.to == nil {
		return
	}
	l.mu.Lock()
	now := time.Now()
	if now.Sub(l.last) < time.Second {
		l.dropped++
		l.mu.Unlock()
		return
	}
	dropped := l.dropped
	l.last, l.dropped = now, 0
	l.mu.Unlock()
	if dropped > 0 {
		l.to("%d notes dropped", dropped)
	}
	l.to(format, args...)
}
