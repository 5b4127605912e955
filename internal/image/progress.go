package image

import "sync"

// reporter hands reports of several goroutines to one callback, one at a time.
type reporter struct {
	mu sync.Mutex
	fn func(Progress) // nil: nobody listens
}

func newReporter(fn func(Progress)) *reporter { return &reporter{fn: fn} }

func (r *reporter) send(p Progress) {
	if r.fn == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fn(p)
}

// layer returns the callback for the bytes of one layer, nil if nobody listens.
func (r *reporter) layer(phase Phase, d descriptor, n, of int) func(int64) {
	if r.fn == nil {
		return nil
	}
	return func(current int64) {
		r.send(Progress{Phase: phase, Digest: d.Digest, Layer: n, Layers: of, Current: current, Total: d.Size})
	}
}
