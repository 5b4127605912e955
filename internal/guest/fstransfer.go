package guest

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

func statOf(fi os.FileInfo) (*syscall.Stat_t, bool) {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return st, ok
}

// transferChunk is how much of a file is read at a time.
const transferChunk = 56 << 10

// read streams a file to the client as fast as it takes it.
func (s *fsSession) read(h *handle, t *agentproto.FSTransfer) error {
	if h.dir {
		return unix.EISDIR
	}
	off, left := int64(t.Offset), int64(math.MaxInt64)
	if t.Offset > math.MaxInt64 || t.Len != nil && *t.Len > math.MaxInt64 {
		return unix.EINVAL
	}
	if t.Len != nil {
		left = int64(*t.Len)
	}
	buf := make([]byte, min(left, transferChunk))
	for left > 0 {
		n, err := h.f.ReadAt(buf[:min(left, int64(len(buf)))], off)
		if n > 0 {
			if err := s.out.Data(agentproto.MsgFSData, buf[:n]); err != nil {
				return err
			}
			off, left = off+int64(n), left-int64(n)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// write takes the client's data until its empty frame, or until t.Len bytes
// have come, whichever is first.
func (s *fsSession) write(h *handle, t *agentproto.FSTransfer) error {
	if h.dir {
		return unix.EISDIR
	}
	if t.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	off := int64(t.Offset)
	var meter agentproto.Meter
	for {
		c, err := s.in.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		// On a file opened for appending pwrite(2) ignores the offset.
		if _, err := h.f.WriteAt(c.data, off); err != nil {
			return err
		}
		off += int64(len(c.data))
		if n := meter.Add(c.cost); n > 0 {
			tell(s.out, agentproto.MsgCredit, agentproto.Credit{N: n})
		}
	}
}

var errAbandoned = errors.New("client is gone")

// fsInput holds data of a write that the file system has not taken yet, at most
// a window of it.
type fsInput struct {
	mu    sync.Mutex
	more  sync.Cond
	queue []inChunk // guarded by mu
	err   error     // guarded by mu: io.EOF after the last chunk, errAbandoned
}

func newFSInput() *fsInput {
	i := &fsInput{}
	i.more.L = &i.mu
	return i
}

func (i *fsInput) push(data []byte, cost int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err != nil {
		return
	}
	if len(data) == 0 {
		i.err = io.EOF
	} else {
		i.queue = append(i.queue, inChunk{data, cost})
	}
	i.more.Signal()
}

func (i *fsInput) next() (inChunk, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(i.queue) == 0 && i.err == nil {
		i.more.Wait()
	}
	if i.err == errAbandoned || len(i.queue) == 0 {
		return inChunk{}, i.err
	}
	c := i.queue[0]
	i.queue = i.queue[1:]
	return c, nil
}

func (i *fsInput) abort() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = errAbandoned
	i.more.Broadcast()
}
