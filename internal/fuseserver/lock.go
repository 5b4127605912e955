package fuseserver

import (
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// Limits of one mount; beyond them the guest gets ENOLCK.
const (
	maxOwners = 1024 // owners of fcntl locks, each with a descriptor of its own
	maxWaits  = 256  // blocking requests that wait for a lock
)

// lockTable is the locks of one session as far as this server must know them.
// The host's kernel has the locks; they exclude other sandboxes and programs of
// the host:
//
//   - flock is taken on the handle's descriptor, because a handle is to the
//     guest what an open file is to the host;
//   - POSIX and OFD locks are OFD locks on a descriptor that belongs to one
//     inode and one owner, so that owners exclude each other, and one owner's
//     locks are merged and split as the guest expects. Closing the descriptor
//     drops them all.
//
// The guest keeps no list of such locks: closing a file says so with FLUSH
// (POSIX locks of that process) or RELEASE (all others), and both must arrive.
type lockTable struct {
	srv  *Server
	busy atomic.Int32 // owners; lets FLUSH pass without the mutex

	mu      sync.Mutex
	owners  map[lockKey]*lockOwner // guarded by mu
	waits   []*lockWait            // guarded by mu; in the order of arrival
	lines   map[*inode]*lockLine   // guarded by mu
	ending  bool                   // guarded by mu: nobody waits any more
	closed  bool                   // guarded by mu
	running bool                   // guarded by mu: retry has a goroutine
	wake    chan struct{}          // capacity 1: look at the waits again

	early      [16]uint64 // guarded by mu: the last requests that were interrupted and not found
	interrupts int        // guarded by mu: so many were
	done       sync.WaitGroup
}

// lockKey names an owner: the same process is another owner for another inode.
type lockKey struct{ node, owner uint64 }

// lockOwner has the fcntl locks of one owner on one inode.
type lockOwner struct {
	key   lockKey
	node  *inode // held
	fd    int    // charged to the budget
	via   map[uint64]struct{}
	held  bool // has got a lock since it exists
	waits int  // requests of this owner that wait
}

func newLockTable(s *Server) *lockTable {
	return &lockTable{srv: s, owners: map[lockKey]*lockOwner{}, lines: map[*inode]*lockLine{}, wake: make(chan struct{}, 1)}
}

// lockRequest is a request for a lock, judged.
type lockRequest struct {
	h     *handle
	owner uint64
	flock bool
	lk    unix.Flock_t
}

// takeLock decodes and judges the arguments of the three lock requests. The
// handle comes with a reference.
func (c *call) takeLock() (r lockRequest, err errno) {
	var in w.LkIn
	w.Decode(c.args, &in)
	if in.Flags&^w.LkFlock != 0 || in.Lk.Start > in.Lk.End || in.Lk.End > math.MaxInt64 {
		return r, unix.EINVAL
	}
	switch in.Lk.Type {
	case unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK:
	default:
		return r, unix.EINVAL
	}
	r = lockRequest{owner: in.Owner, flock: in.Flags&w.LkFlock != 0}
	r.lk = unix.Flock_t{Type: int16(in.Lk.Type), Whence: unix.SEEK_SET, Start: int64(in.Lk.Start)}
	if in.Lk.End != math.MaxInt64 {
		r.lk.Len = int64(in.Lk.End-in.Lk.Start) + 1
	}
	r.h, err = c.se.handles.get(in.Fh, c.h.NodeID, false)
	return r, err
}

// whole reports whether the range is all of the file.
func (r *lockRequest) whole() bool { return r.lk.Start == 0 && r.lk.Len == 0 }

func (r *lockRequest) key() lockKey { return lockKey{r.h.node.id, r.owner} }

// opGetlk says which lock would be in the way. Whose it is stays unknown: the
// holder may be in another sandbox, and the host knows OFD locks only.
func (c *call) opGetlk() errno {
	r, err := c.takeLock()
	if err != 0 {
		return err
	}
	defer r.h.drop()
	if r.flock || r.lk.Type == unix.F_UNLCK {
		return unix.EINVAL
	}
	if err := c.se.locks.test(&r); err != 0 {
		return err
	}
	out := w.LkOut{Lk: w.FileLock{Start: uint64(r.lk.Start), End: math.MaxInt64, Type: uint32(r.lk.Type)}}
	if r.lk.Len > 0 {
		out.Lk.End = uint64(r.lk.Start + r.lk.Len - 1)
	}
	c.body = w.Put(c.reply[replySize:], &out)
	return 0
}

// test replaces r.lk by a lock that excludes it, or its type by F_UNLCK.
func (t *lockTable) test(r *lockRequest) errno {
	t.mu.Lock()
	defer t.mu.Unlock()
	fd := r.h.fd // nobody takes fcntl locks on a handle's descriptor
	if o := t.owners[r.key()]; o != nil {
		fd = o.fd
	}
	return fcntlLock(fd, unix.F_OFD_GETLK, &r.lk)
}

func (c *call) opSetlk() errno { return c.setlk(false) }

// opSetlkw waits for the lock without a thread: the request is put aside and
// answered when the lock is there.
func (c *call) opSetlkw() errno { return c.setlk(true) }

func (c *call) setlk(wait bool) errno {
	r, err := c.takeLock()
	if err != 0 {
		return err
	}
	defer r.h.drop()
	return c.se.locks.set(c, &r, wait)
}

// set takes, changes or drops a lock, or makes the request wait for it.
// F_UNLCK never waits, whatever the opcode: the guest sends flock(LOCK_UN) as
// SETLKW.
func (t *lockTable) set(c *call, r *lockRequest, wait bool) errno {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || r.h.locksGone {
		return unix.EBADF
	}
	r.h.locked = true
	if !r.flock && r.lk.Type == unix.F_UNLCK {
		return t.unlock(r)
	}
	o, err := t.enter(c, r)
	if err != 0 {
		return err
	}
	err = t.try(r, o)
	// A lock that changed its kind may let others in. A flock may do so even
	// if it did not get the new kind: the host drops the old one first.
	if r.flock || r.lk.Type == unix.F_RDLCK {
		t.notify(r.h.node)
	}
	if err == unix.EAGAIN && wait {
		if err = t.park(c, r, o); err == 0 {
			return 0
		}
	}
	t.leave(o)
	return err
}

// enter returns the owner of a lock to be, nil for flock. Called with mu held.
func (t *lockTable) enter(c *call, r *lockRequest) (*lockOwner, errno) {
	if r.flock {
		return nil, 0
	}
	o := t.owners[r.key()]
	if o == nil {
		if len(t.owners) >= maxOwners || !t.srv.reserve(t.srv.budget) {
			return nil, unix.ENOLCK
		}
		fd, err := c.openLock(r.h.node)
		if err != 0 {
			t.srv.release()
			return nil, err
		}
		o = &lockOwner{key: r.key(), node: r.h.node.hold(), fd: fd, via: map[uint64]struct{}{}}
		t.owners[o.key] = o
		t.busy.Add(1)
	}
	o.via[r.h.id] = struct{}{}
	return o, 0
}

// leave drops an owner that got no lock and waits for none. Called with mu held.
func (t *lockTable) leave(o *lockOwner) {
	if o != nil && !o.held && o.waits == 0 {
		t.discard(o)
	}
}

// openLock opens the descriptor of an owner: for writing if the host lets us,
// because only such a one takes exclusive locks.
func (c *call) openLock(n *inode) (int, errno) {
	for _, mode := range []int{unix.O_RDWR, unix.O_RDONLY, unix.O_WRONLY} {
		if fd, err := c.openNode(n, mode); err == 0 {
			return fd, 0
		}
	}
	return -1, unix.ENOLCK
}

// try asks the host once; EAGAIN if the lock is not free. Called with mu held.
func (t *lockTable) try(r *lockRequest, o *lockOwner) errno {
	var err errno
	if r.flock {
		err = flock(r.h.fd, flockOps[r.lk.Type]|unix.LOCK_NB)
	} else {
		lk := r.lk
		err = fcntlLock(o.fd, unix.F_OFD_SETLK, &lk)
		o.held = o.held || err == 0
	}
	switch err {
	case unix.EACCES:
		return unix.EAGAIN
	case unix.EBADF: // exclusive, on a file that the host lets us only read
		return unix.ENOLCK
	}
	return err
}

var flockOps = map[int16]int{unix.F_RDLCK: unix.LOCK_SH, unix.F_WRLCK: unix.LOCK_EX, unix.F_UNLCK: unix.LOCK_UN}

// unlock drops fcntl locks. An owner without locks gives its descriptor back.
// Called with mu held.
func (t *lockTable) unlock(r *lockRequest) errno {
	o := t.owners[r.key()]
	if o == nil {
		return 0
	}
	if r.whole() && o.waits == 0 {
		t.discard(o)
		return 0
	}
	t.notify(o.node)
	return t.try(r, o)
}

// discard drops an owner with all its locks. Called with mu held.
func (t *lockTable) discard(o *lockOwner) {
	t.clear(o)
	delete(t.owners, o.key)
	t.busy.Add(-1)
	t.srv.closeLater(o.fd, o.node)
	o.node.drop()
}

// clear drops an owner's locks at once, although its descriptor may be closed
// by a worker later. Called with mu held.
func (t *lockTable) clear(o *lockOwner) {
	if o.held {
		_ = fcntlLock(o.fd, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Whence: unix.SEEK_SET})
		t.notify(o.node)
	}
}

// flush drops the locks that a process has on an inode: it has closed one of
// its files. A thread of it that still waits goes on waiting, as on any host.
func (t *lockTable) flush(node, owner uint64) {
	if t.busy.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if o := t.owners[lockKey{node, owner}]; o != nil {
		t.drop(o)
	}
}

// drop drops an owner's locks, and the owner unless it waits for one. Called
// with mu held.
func (t *lockTable) drop(o *lockOwner) {
	if o.waits > 0 {
		t.clear(o)
	} else {
		t.discard(o)
	}
}

// release drops everything that was locked through a handle, and ends what
// waits through it.
func (t *lockTable) release(h *handle) {
	t.mu.Lock()
	h.locksGone = true
	var gone []*lockWait
	if h.locked {
		gone = t.take(unix.EBADF, func(l *lockWait) bool { return l.h == h })
		_ = flock(h.fd, unix.LOCK_UN) // a request in flight may keep the descriptor open
		for _, o := range t.owners {
			if _, ok := o.via[h.id]; ok {
				t.drop(o)
			}
		}
		t.notify(h.node)
	}
	t.mu.Unlock()
	answerAll(gone)
}

// close drops all locks and ends all waits, for good.
func (t *lockTable) close() {
	t.mu.Lock()
	t.closed = true
	gone := t.take(unix.EINTR, func(*lockWait) bool { return true })
	for _, o := range t.owners {
		t.discard(o)
	}
	t.poke()
	t.mu.Unlock()
	answerAll(gone)
	t.done.Wait()
}

// endWaitsName is the attribute that endWaits is told through.
var endWaitsName = append([]byte(overlayPrefix+"end_waits"), 0)

// endWaits is told by the guest's agent through an attribute of the root that
// exists for nothing else: no other request says that a thread will not take
// its lock any more. "stop" ends all waits, and from then on nobody waits, so
// that processes can be ended. Otherwise the value lists threads that have a
// signal to attend to, as decimal numbers with spaces between them.
func (t *lockTable) endWaits(value []byte) errno {
	stop := string(value) == "stop"
	threads := map[uint32]bool{}
	if !stop {
		for _, f := range splitFields(value) {
			n, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return unix.EINVAL
			}
			threads[uint32(n)] = true
		}
	}
	t.mu.Lock()
	t.ending = t.ending || stop
	gone := t.take(unix.EINTR, func(l *lockWait) bool { return stop || threads[l.thread] })
	t.mu.Unlock()
	answerAll(gone)
	return 0
}

// interrupt ends the wait of one request, or keeps it from waiting if that one is
// still on its way on another queue. Linux's virtiofs never asks for it; other
// front ends and /dev/fuse do.
func (t *lockTable) interrupt(unique uint64) {
	t.mu.Lock()
	gone := t.take(unix.EINTR, func(l *lockWait) bool { return l.unique == unique })
	if len(gone) == 0 {
		t.early[t.interrupts%len(t.early)] = unique
		t.interrupts++
	}
	t.mu.Unlock()
	answerAll(gone)
}

// notify has the waits for locks of an inode looked at. Called with mu held.
func (t *lockTable) notify(n *inode) {
	if line := t.lines[n]; line != nil {
		line.due = time.Time{}
		t.poke()
	}
}

func (t *lockTable) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}
