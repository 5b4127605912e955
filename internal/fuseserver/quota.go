package fuseserver

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// pollEvery is how often the ledger's owner must look at it, and how long a lease
// of a file's size lasts.
const pollEvery = 100 * time.Millisecond

// quota charges what this server changes to the volume's ledger. A nil one
// counts nothing.
//
// Sizes are guarded by stripes of its own; whatever changes a size holds its stripe
// for writing, and the ledger's lock of the inode, which keeps other processes out.
// While no other server lives, that lock is kept for a while, as a lease: who has it
// knows the size. A write inside of that holds the stripe for reading and costs no
// system call more, nor does one that appends.
type quota struct {
	s     *Server
	w     *ledger.Writer
	rules ledger.Rules
	dev   uint64
	sizes [64]sizeStripe
	pins  [64]pinShard
	alone atomic.Bool // no other server lived when last looked
	calls sync.Pool   // of *call
	stop  chan struct{}
	done  sync.WaitGroup

	looking sync.Mutex // one look at the ledger at a time

	leases atomic.Int32 // how many there are

	closingMu sync.Mutex
	closing   []closing // guarded by closingMu
}

// sizeStripe guards the sizes of some inodes.
type sizeStripe struct {
	sync.RWMutex
	leases map[uint64]*lease // by inode, guarded by the stripe
}

// pinShard counts the nodes of inodes: who has one keeps its bytes on the disk.
type pinShard struct {
	mu sync.Mutex
	m  map[uint64]int32 // by inode number, guarded by mu
}

// newQuota takes a place in the ledger that f is. It owns f from then on.
func newQuota(s *Server, f *os.File) (*quota, error) {
	q := &quota{s: s, dev: s.rootDev, stop: make(chan struct{})}
	for i := range q.pins {
		q.pins[i].m = map[uint64]int32{}
	}
	var err error
	if q.rules, err = ledger.RulesOf(s.root); err != nil {
		return nil, os.NewSyscallError("fstatfs share", err)
	}
	if q.w, err = ledger.NewWriter(f, ledger.Options{Server: true, Orphans: q.orphans}); err != nil {
		return nil, err
	}
	q.done.Go(q.poll)
	q.done.Go(q.endLeases)
	return q, nil
}

// close gives the place up. No request may be running.
func (q *quota) close() {
	close(q.stop)
	q.done.Wait()
	q.dropLeases()
	q.closeHindered(0)
	if err := q.w.Close(); err != nil {
		q.s.logf("ledger: %v", err)
	}
}

// poll looks at the ledger as it must be, and learns who else writes.
func (q *quota) poll() {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	var last error
	for {
		select {
		case <-q.stop:
			return
		case <-tick.C:
		}
		err := q.look()
		if err != nil && (last == nil || err.Error() != last.Error()) {
			q.s.logf("ledger: %v", err)
		}
		last = err
		st, err := q.w.Usage()
		q.alone.Store(err == nil && st.Writers <= 1)
		q.lookAtOrphans()
		q.closeHindered(time.Second)
	}
}

// lookAtOrphans looks again at what this server counts without a name: another one
// may have changed its size, or nobody uses it any more. What is seen through
// another mount of the same file system is left to its closing.
func (q *quota) lookAtOrphans() {
	counted, se := q.w.Counted(), q.s.session.Load()
	if se == nil {
		return
	}
	se.nodes.time.Add(1)
	for ino := range counted {
		n := se.nodes.find(identity{dev: q.dev, ino: ino, mnt: se.mnt})
		if n == nil {
			continue
		}
		if se.nodes.retire(n) {
			n.drop() // for the table
		} else {
			q.recount(n)
		}
		n.drop()
	}
}

// look looks at the ledger: it answers others, and tells them what was deleted.
func (q *quota) look() error {
	q.looking.Lock()
	defer q.looking.Unlock()
	return q.w.Poll()
}

func (q *quota) stripe(n *inode) *sizeStripe { return q.stripeOf(n.key.ino) }

func (q *quota) stripeOf(ino uint64) *sizeStripe { return &q.sizes[ino%uint64(len(q.sizes))] }

// counts reports whether an inode is one of the volume: other file systems may be
// mounted below it.
func (q *quota) counts(n *inode) bool { return q != nil && n.key.dev == q.dev }

// pinned reports whether a node is counted as long as it is open: any of the volume
// but a directory.
func (q *quota) pinned(n *inode) bool { return q.counts(n) && !n.isDir() }

// refusal turns an error of the ledger into what the guest is told.
func refusal(err error) errno {
	var full *errdefs.QuotaError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &full):
		return unix.ENOSPC
	}
	return unix.EIO
}

// limitSpace shows the limits instead of the host's file system, as far as they
// leave less.
func (q *quota) limitSpace(out *fusewire.StatfsOut) {
	u, err := q.w.Usage()
	if err != nil {
		return
	}
	if u.Limits.Bytes > 0 {
		unit := int64(out.Frsize)
		free := uint64(max(0, u.Limits.Bytes-u.Used.Bytes) / unit)
		out.Blocks = uint64(u.Limits.Bytes / unit)
		out.Bfree, out.Bavail = min(free, out.Bfree), min(free, out.Bavail)
	}
	if u.Limits.Inodes > 0 {
		out.Files = uint64(u.Limits.Inodes)
		out.Ffree = min(uint64(max(0, u.Limits.Inodes-u.Used.Inodes)), out.Ffree)
	}
}

// pin counts a new node.
func (q *quota) pin(ino uint64) {
	p := q.pinShard(ino)
	p.mu.Lock()
	p.m[ino]++
	p.mu.Unlock()
}

func (q *quota) pinShard(ino uint64) *pinShard { return &q.pins[ino%uint64(len(q.pins))] }

// unpin takes a node back that has not been used.
func (q *quota) unpin(ino uint64) {
	p := q.pinShard(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	q.unpinLocked(p, ino, nil)
}

// unpinLocked takes a node back. charge is what the inode has if it has no name,
// else nil. Its shard is locked.
func (q *quota) unpinLocked(p *pinShard, ino uint64, charge *ledger.Delta) {
	if p.m[ino]--; p.m[ino] > 0 {
		return
	}
	delete(p.m, ino)
	if charge != nil {
		q.w.Recount(ino, *charge)
	}
	q.w.Released(ino) // it may have lost its name since it was looked at
}

// orphaned tells the ledger that an inode lost its last name, or was made without
// one.
func (q *quota) orphaned(op *ledger.Op, ino uint64, charge ledger.Delta) {
	p := q.pinShard(ino)
	p.mu.Lock()
	defer p.mu.Unlock()
	op.Orphan(ino, charge, p.m[ino] > 0)
}

// recount tells the ledger what an inode without a name counts by now: a walk of
// the volume does not find it.
func (q *quota) recount(n *inode) {
	if charge, nameless := q.measure(n); nameless {
		q.w.Recount(n.key.ino, charge)
	}
}

// orphans visits all inodes that are open here and have no name. What the guest
// merely remembers, because it has listed it once, is let go: it would keep the
// space for as long as the guest's kernel likes.
func (q *quota) orphans(visit func(ino uint64, measure func() (ledger.Delta, bool))) {
	se := q.s.session.Load()
	if se == nil {
		return
	}
	for _, n := range se.nodes.hold() {
		if _, nameless := q.nameless(n); nameless {
			if se.nodes.retire(n) {
				n.drop() // for the table
			} else {
				visit(n.key.ino, func() (ledger.Delta, bool) { return q.measure(n) })
			}
		}
		n.drop()
	}
}

// nameless reports whether a node is one of the volume that has no name left.
func (q *quota) nameless(n *inode) (st unix.Stat_t, is bool) {
	if !q.pinned(n) {
		return st, false
	}
	err := fstat(n.quick, n.fd, &st)
	return st, err == 0 && st.Nlink == 0
}

// measure returns the charge of a node that has no name.
func (q *quota) measure(n *inode) (ledger.Delta, bool) {
	st, is := q.nameless(n)
	if !is {
		return ledger.Delta{}, false
	}
	return q.charge(n.fd, &st), true
}

// charge is that of an open inode, with one name.
func (q *quota) charge(fd int, st *unix.Stat_t) ledger.Delta {
	c, _ := q.calls.Get().(*call) // for its arguments of system calls
	if c == nil {
		c = &call{s: q.s}
	}
	defer q.calls.Put(c)
	d := q.rules.Inode(st, q.standIn(c, fd, st), c.countXattrs(fd, st.Mode))
	d.Inodes = 1
	return d
}

// file is the charge of a regular file's content.
func (q *quota) file(c *call, fd int, st *unix.Stat_t) int64 {
	if q.standIn(c, fd, st) {
		return q.rules.Link(st.Size)
	}
	return q.rules.File(st.Size)
}

// standIn reports whether a file counts as a symlink, which only matters if its
// target is short.
func (q *quota) standIn(c *call, fd int, st *unix.Stat_t) bool {
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size <= 0 || st.Size > ledger.InlineLink {
		return false
	}
	var b [overlaySize + 1]byte
	n, err := c.fdGetxattr(fd, &overlayName[0], b[:])
	if err != 0 {
		return false
	}
	return n == overlaySize && binary.LittleEndian.Uint32(b[12:])&unix.S_IFMT == unix.S_IFLNK
}

// countXattrs is the sum of the lengths of an inode's attributes that count.
func (c *call) countXattrs(fd int, mode uint32) (sum int64) {
	if t := mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return 0
	}
	b := make([]byte, 256)
	n, err := c.fdListxattr(fd, b)
	if err == unix.ERANGE {
		b = make([]byte, 64<<10)
		n, err = c.fdListxattr(fd, b)
	}
	if err != 0 || n <= 0 {
		return 0
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(b[:n]), "\x00"), "\x00") {
		if !ledger.CountedXattr(name) {
			continue
		}
		z := append([]byte(name), 0)
		if size, err := c.fdGetxattr(fd, &z[0], nil); err == 0 {
			sum += int64(len(name) + size)
		}
	}
	return sum
}

// fdGetxattr and fdListxattr are for any descriptor of a file or directory.
func (c *call) fdGetxattr(fd int, name *byte, b []byte) (int, errno) {
	n := inode{srv: c.s, fd: fd, format: unix.S_IFREG}
	return c.nodeGetxattr(&n, name, b)
}

func (c *call) fdListxattr(fd int, b []byte) (int, errno) {
	n := inode{srv: c.s, fd: fd, format: unix.S_IFREG}
	return c.nodeListxattr(&n, b)
}

// hold returns all nodes, each with a reference.
func (t *nodeTable) hold() (all []*inode) {
	for i := range t.byKey {
		s := &t.byKey[i]
		s.mu.Lock()
		for _, n := range s.nodes.all() {
			all = append(all, n.hold())
		}
		s.mu.Unlock()
	}
	return all
}
