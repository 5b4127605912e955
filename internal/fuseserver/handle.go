package fuseserver

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// handle is an open file or directory of one node.
type handle struct {
	id    uint64
	node  *inode // held
	fd    int
	sync  uintptr       // flags for every write: the file was opened with O_SYNC or O_DSYNC
	dir   *listing      // nil for files
	dirs  *atomic.Int32 // counts the session's directory handles; nil for files
	waits atomic.Bool   // the file system cannot read without waiting

	lease *lease // of the file's size, nil if there never was one; see sizeStripe

	locked    bool // was used for a lock; guarded by lockTable.mu
	locksGone bool // is released: no lock may be taken any more; guarded by lockTable.mu

	refs atomic.Int32 // one for the table, one per user
}

func (h *handle) drop() {
	if h.refs.Add(-1) == 0 {
		h.node.srv.closeHandle(h)
	}
}

// handleTable finds handles by number. A closed table takes nothing in.
type handleTable struct {
	shards [nodeShards]handleShard
	dirs   atomic.Int32
}

type handleShard struct {
	mu     sync.RWMutex
	m      map[uint64]*handle // guarded by mu
	closed bool               // guarded by mu
	_      [64 - 40]byte
}

func newHandleTable() *handleTable {
	t := &handleTable{}
	for i := range t.shards {
		t.shards[i].m = map[uint64]*handle{}
	}
	return t
}

// get returns a handle with a reference if it exists, belongs to the node and
// is of the kind wanted.
func (t *handleTable) get(fh, node uint64, dir bool) (*handle, errno) {
	s := &t.shards[fh%nodeShards]
	s.mu.RLock()
	h := s.m[fh]
	if h == nil || h.node.id != node || (h.dir != nil) != dir {
		s.mu.RUnlock()
		return nil, unix.EBADF
	}
	h.refs.Add(1)
	s.mu.RUnlock()
	return h, 0
}

// add takes a handle in; false if the table is closed.
func (t *handleTable) add(h *handle) bool {
	s := &t.shards[h.id%nodeShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	h.refs.Store(1)
	s.m[h.id] = h
	return true
}

// remove takes a handle out; requests that use it keep it open until they end.
func (t *handleTable) remove(fh, node uint64, dir bool) errno {
	h, err := t.get(fh, node, dir)
	if err != 0 {
		return err
	}
	defer h.drop()
	s := &t.shards[fh%nodeShards]
	s.mu.Lock()
	_, mine := s.m[fh]
	delete(s.m, fh)
	s.mu.Unlock()
	if !mine { // two requests release one handle
		return unix.EBADF
	}
	h.drop()
	return 0
}

// close empties the table for good.
func (t *handleTable) close() {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		s.closed = true
		gone := s.m
		s.m = map[uint64]*handle{}
		s.mu.Unlock()
		for _, h := range gone {
			h.drop()
		}
	}
}

// size returns the number of handles.
func (t *handleTable) size() int {
	total := 0
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		total += len(s.m)
		s.mu.RUnlock()
	}
	return total
}
