package volumefs

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// replaced are the descriptors of files that were replaced and have no name any
// more. Closing the last one of a file frees its inode and its space, for which some
// file systems wait for the disk (ext4 mounted with discard). Where the last close
// took long, those of small files are gathered and closed together beside what comes
// next: one by one each would disturb the sync of the next write.
type replaced struct {
	slow atomic.Bool // the last close took long

	mu    sync.Mutex
	fds   []int       // guarded by mu
	bytes int64       // of all fds; guarded by mu
	timer *time.Timer // closes what is there; nil with no fds; guarded by mu

	closing sync.Mutex    // while some are closed
	closed  atomic.Uint64 // how many have been
}

const (
	smallFile   = 1 << 20               // how much may be gathered, in bytes
	closeAtOnce = 32                    // how many files
	closeWithin = 20 * time.Millisecond // after the first
	slowClose   = 40 * time.Microsecond // about what it costs to have another thread do it
)

// close closes a descriptor now.
func (r *replaced) close(fd int) {
	start := time.Now()
	_ = unix.Close(fd)
	r.closed.Add(1)
	r.slow.Store(time.Since(start) > slowClose)
}

// closeReplaced closes the descriptor of a small file that was replaced, now or soon.
func (f *FS) closeReplaced(fd int, size int64) {
	if f.replaced.slow.Load() || f.opts.CloseLater {
		f.replaced.add(fd, size)
	} else {
		f.replaced.close(fd)
	}
}

// add has a descriptor closed with others. While some are being closed, and there
// are enough for the next time, the caller waits.
func (r *replaced) add(fd int, size int64) {
	r.mu.Lock()
	r.fds, r.bytes = append(r.fds, fd), r.bytes+size
	full := len(r.fds) >= closeAtOnce || r.bytes > smallFile
	if !full && r.timer == nil {
		r.timer = time.AfterFunc(closeWithin, r.closeAll)
	}
	r.mu.Unlock()
	switch {
	case !full:
	case r.closing.TryLock():
		go func() {
			defer r.closing.Unlock()
			r.closeGathered()
		}()
	default:
		r.closeAll()
	}
}

func (r *replaced) closeAll() {
	r.closing.Lock()
	defer r.closing.Unlock()
	r.closeGathered()
}

// closeGathered is for who has closing.
func (r *replaced) closeGathered() {
	r.mu.Lock()
	fds := r.fds
	r.fds, r.bytes = nil, 0
	if r.timer != nil {
		r.timer.Stop()
		r.timer = nil
	}
	r.mu.Unlock()
	for _, fd := range fds {
		r.close(fd)
	}
}

// freed closes what is gathered, waits for others that do, and reports whether more
// has been closed, by anybody, than before.
func (r *replaced) freed(before uint64) bool {
	r.closeAll()
	return r.closed.Load() != before
}
