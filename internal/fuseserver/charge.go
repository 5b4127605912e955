package fuseserver

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// sizeChange is a change of a file's size, from look to look.
type sizeChange struct {
	q      *quota
	n      *inode
	stripe *sizeStripe
	op     ledger.Op
	before int64 // charge
	st     unix.Stat_t
	fd     int
}

// changeSize begins a change of the size of what fd has open.
func (c *call) changeSize(n *inode, fd int) (*sizeChange, errno) {
	q := c.s.quota
	if !q.counts(n) {
		return nil, 0
	}
	z := &c.size // a request changes one size at a time
	z.q, z.n, z.stripe, z.fd, z.before = q, n, q.stripe(n), fd, 0
	z.stripe.Lock()
	z.op = q.w.Lock(n.key.ino) // also without another server: programs on the host come and go
	if l := z.stripe.leases[n.key.ino]; l != nil && l.size != unknown {
		z.st = unix.Stat_t{Size: l.size, Nlink: 1}
		z.before = q.rules.File(l.size) // a stand-in is not written to
		return z, 0
	}
	if err := fstat(n.quick, fd, &z.st); err != 0 {
		z.abandon()
		return nil, err
	}
	if z.st.Nlink == 0 { // before it changes, somebody has to count it as it was
		z.op.Nameless(n.key.ino, q.charge(fd, &z.st))
	}
	if !z.op.Late() {
		z.before = q.file(c, fd, &z.st)
	}
	return z, 0
}

// grow charges what it costs that the file reaches to end. ENOSPC: it does not
// fit, and nothing may be done.
func (z *sizeChange) grow(end uint64) errno {
	if z == nil || end <= uint64(z.st.Size) {
		return 0
	}
	return z.q.grow(&z.op, ledger.Delta{Bytes: z.q.rules.File(int64(min(end, math.MaxInt64))) - z.before})
}

// grow charges what an operation may add. Where that is too much, others may have
// deleted something and wait for our word that it is not open here.
func (q *quota) grow(op *ledger.Op, d ledger.Delta) errno {
	err := refusal(op.Grow(d))
	if err == unix.ENOSPC && !q.alone.Load() && q.look() == nil {
		err = refusal(op.Grow(d))
	}
	return err
}

// reserves reports whether space up to end would be reserved beyond the file's
// end, which nothing here counts, on a volume that has a limit.
func (z *sizeChange) reserves(end uint64) bool {
	return z != nil && end > uint64(z.st.Size) && z.q.w.Limited()
}

// done looks again and ends the change.
func (z *sizeChange) done(c *call) {
	if z == nil {
		return
	}
	var st unix.Stat_t
	after, size := z.before, int64(unknown)
	if fstat(z.n.quick, z.fd, &st) == 0 {
		after, size = z.q.file(c, z.fd, &st), st.Size
	}
	if l := z.stripe.leases[z.n.key.ino]; l != nil {
		l.size = size
	}
	z.end(after)
}

func (z *sizeChange) end(after int64) {
	if z.st.Nlink == 0 {
		z.q.recount(z.n)
	}
	_ = z.op.Done(ledger.Delta{Bytes: after - z.before})
	z.stripe.Unlock()
}

// abandon ends a change that did nothing.
func (z *sizeChange) abandon() {
	if z != nil {
		_ = z.op.Done(ledger.Delta{})
		z.stripe.Unlock()
	}
}

// countedWrite is writeAll on a volume whose use is counted. A write inside the
// file is never refused.
func (c *call) countedWrite(h *handle, off uint64, size int, flags uintptr) (done int, err errno) {
	q := c.s.quota
	if flags&rwfAppend == 0 {
		stripe := q.stripe(h.node)
		stripe.RLock()
		if l := h.lease; l.covers(off + uint64(size)) {
			done, err = c.writeAll(h.fd, off, size, flags)
			stripe.RUnlock()
			return done, err
		}
		stripe.RUnlock()
	}
	z, err := c.changeSize(h.node, h.fd)
	if err != 0 {
		return 0, err
	}
	before, end := uint64(z.st.Size), off+uint64(size)
	if flags&rwfAppend != 0 {
		end = before + uint64(size)
	}
	if size == 0 {
		end = 0
	}
	if err := z.grow(end); err != 0 {
		z.abandon()
		return 0, err
	}
	done, err = c.writeAll(h.fd, off, size, flags)
	if err != 0 || done != size || z.op.Late() {
		z.done(c)
		return done, err
	}
	now := int64(max(before, end))
	z.keep(h, now)
	z.end(q.rules.File(now))
	return done, 0
}

// nameChange is a change of names in one or two directories, by which a victim
// may lose one.
type nameChange struct {
	q      *quota
	op     ledger.Op
	dirs   [2]*inode
	before [2]int64
	victim int // O_PATH descriptor, -1: none
	st     unix.Stat_t
	charge ledger.Delta // of the victim, with one name
	actual ledger.Delta

	deleted bool // the victim has no name left
}

// changeNames begins a change of names in dir and, if it is not nil, other. more
// is a further inode that changes, 0 for none.
func (c *call) changeNames(dir, other *inode, more uint64) *nameChange {
	q := c.s.quota
	if !q.counts(dir) {
		return nil
	}
	x := &nameChange{q: q, dirs: [2]*inode{dir, other}, victim: -1}
	x.lock(more)
	return x
}

// lock begins the operation and looks at the directories.
func (x *nameChange) lock(more uint64) {
	inos := []uint64{x.dirs[0].key.ino}
	if x.dirs[1] != nil {
		inos = append(inos, x.dirs[1].key.ino)
	}
	if more != 0 {
		inos = append(inos, more)
	}
	x.op = x.q.w.Lock(inos...)
	for i, d := range x.dirs {
		x.before[i] = x.dirSize(d)
	}
}

func (x *nameChange) dirSize(d *inode) int64 {
	var st unix.Stat_t
	if d == nil || !x.q.rules.DirSizes || fstat(d.quick, d.fd, &st) != 0 {
		return 0
	}
	return x.q.rules.Dir(st.Size)
}

// takeName is changeNames for a change that takes what a name in at means, if it
// means anything: dir, or other, is at.
func (c *call) takeName(dir, other, at *inode, name judged) (*nameChange, errno) {
	q := c.s.quota
	if !q.counts(dir) {
		return nil, 0
	}
	for range 100 { // somebody else may be faster, but not for ever
		x := &nameChange{q: q, dirs: [2]*inode{dir, other}, victim: -1}
		fd, err := openat(at.fd, name.Ptr(), unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err != 0 && err != unix.ENOENT {
			return nil, err
		}
		if err == 0 {
			x.victim = fd
			if err := fstat(false, fd, &x.st); err != 0 {
				closeFd(fd)
				return nil, err
			}
		}
		x.lock(x.st.Ino)
		if x.settled(at, name) {
			return x, 0
		}
		x.done()
	}
	return nil, unix.EBUSY
}

// settled reports whether the name means what is locked, and looks at that.
func (x *nameChange) settled(at *inode, name judged) bool {
	var now unix.Stat_t
	err := unix.Fstatat(at.fd, name.String(), &now, unix.AT_SYMLINK_NOFOLLOW)
	if x.victim < 0 {
		return err != nil
	}
	if err != nil || now.Ino != x.st.Ino || now.Dev != x.st.Dev || fstat(false, x.victim, &x.st) != 0 {
		return false
	}
	x.charge = x.q.charge(x.victim, &x.st)
	return true
}

// grow charges one more name, and d.
func (x *nameChange) grow(at *inode, name judged, d ledger.Delta) errno {
	if x == nil {
		return 0
	}
	most := d
	most.Bytes += x.q.rules.DirGrowth(at.fd, len(name.Bytes()), false)
	err := x.q.grow(&x.op, most)
	if err == unix.ENOSPC && most != d {
		d.Bytes += x.q.rules.DirGrowth(at.fd, len(name.Bytes()), true)
		err = x.q.grow(&x.op, d)
	}
	return err
}

// room is grow for something that is to be made: where the name is taken, that is
// what the guest is told, and not that there is no room.
func (x *nameChange) room(at *inode, name judged, d ledger.Delta) errno {
	err := x.grow(at, name, d)
	var st unix.Stat_t
	if err == unix.ENOSPC && unix.Fstatat(at.fd, name.String(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return unix.EEXIST
	}
	return err
}

// made notes what a new name costs, if err says that it was made; after a failure
// it may be there all the same.
func (x *nameChange) made(at *inode, name judged, d ledger.Delta, err errno) {
	if x == nil {
		return
	}
	var st unix.Stat_t
	if err == 0 || err != unix.EEXIST && unix.Fstatat(at.fd, name.String(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		x.actual = x.actual.Plus(d)
	}
}

// lost notes what the victim lost.
func (x *nameChange) lost() {
	if x == nil || x.victim < 0 || uint64(x.st.Dev) != x.q.dev {
		return
	}
	names := int64(x.st.Nlink)
	if fstat(false, x.victim, &x.st) != 0 {
		return
	}
	switch left := int64(x.st.Nlink); {
	case x.st.Mode&unix.S_IFMT == unix.S_IFDIR:
		if left == 0 {
			x.actual = x.actual.Minus(x.charge)
		}
	case left > 0:
		x.actual.Inodes -= max(0, names-left)
	default:
		x.actual.Inodes -= max(0, names-1)
		x.q.orphaned(&x.op, x.st.Ino, x.charge)
		x.deleted = true
	}
}

// done ends the change.
func (x *nameChange) done() {
	if x == nil {
		return
	}
	for i, d := range x.dirs {
		if i == 0 || d != x.dirs[0] {
			x.actual.Bytes += x.dirSize(d) - x.before[i]
		}
	}
	_ = x.op.Done(x.actual)
	if x.victim >= 0 {
		closeFd(x.victim)
	}
	if x.deleted && !x.q.alone.Load() {
		_ = x.q.look() // so that the space is there again as soon as the others have looked
	}
}

// aclDefault is the attribute of a directory that what is made in it inherits.
var aclDefault = []byte(ledger.DefaultACL + "\x00")

// inherits is the most that attributes cost which something new gets from its
// directory.
func (q *quota) inherits(c *call, dir *inode, isDir bool) int64 {
	if !q.counts(dir) {
		return 0
	}
	size, err := c.nodeGetxattr(dir, &aclDefault[0], nil)
	if err != 0 || size <= 0 {
		return 0
	}
	return q.rules.Inherited(size, isDir)
}

// inherited is what they cost in truth; most is what inherits said.
func (q *quota) inherited(c *call, n *inode, most int64) int64 {
	if most == 0 || n == nil {
		return 0
	}
	return q.rules.Xattrs(c.countXattrs(n.fd, n.format))
}

// chargeNameless charges a file that gets no name. done is told its node, which
// is held, or nil if there is none.
func (c *call) chargeNameless(dir *inode) (done func(*inode), err errno) {
	q := c.s.quota
	if !q.counts(dir) {
		return func(*inode) {}, 0
	}
	op := q.w.Lock()
	one, acl := ledger.Delta{Inodes: 1}, q.inherits(c, dir, false)
	if err := q.grow(&op, one.Plus(ledger.Delta{Bytes: acl})); err != 0 {
		_ = op.Done(ledger.Delta{})
		return nil, err
	}
	return func(n *inode) {
		if n == nil {
			_ = op.Done(ledger.Delta{})
			return
		}
		one.Bytes = q.inherited(c, n, acl)
		q.orphaned(&op, n.key.ino, one)
		_ = op.Done(one)
	}, 0
}

// changeXattrs begins the change of a node's attribute to a value of so many bytes,
// or, with name nil, the removal of one. The result ends it.
func (c *call) changeXattrs(n *inode, name []byte, size int) (done func(), err errno) {
	q := c.s.quota
	if !q.counts(n) || !n.openable() {
		return func() {}, 0
	}
	op := q.w.Lock(n.key.ino)
	if charge, nameless := q.measure(n); nameless {
		op.Nameless(n.key.ino, charge)
	}
	if n.isDir() && fstat(n.quick, n.fd, &c.st) == 0 && c.st.Nlink == 0 {
		// Nobody counts a directory that is removed, though it is open.
		_ = op.Done(ledger.Delta{})
		if name != nil {
			return nil, unix.ENOENT
		}
		return func() {}, 0
	}
	sum := c.countXattrs(n.fd, n.format)
	more := 0
	if name != nil {
		more = len(name) - 1 + size
		if old, err := c.nodeGetxattr(n, &name[0], nil); err == 0 {
			more = max(size-old, 0)
		}
	}
	before := q.rules.Xattrs(sum)
	if op.Late() {
		before = 0
	}
	if err := q.grow(&op, ledger.Delta{Bytes: q.rules.Xattrs(sum+int64(more)) - before}); name != nil && err != 0 {
		_ = op.Done(ledger.Delta{})
		return nil, err
	}
	return func() {
		q.recount(n)
		_ = op.Done(ledger.Delta{Bytes: q.rules.Xattrs(c.countXattrs(n.fd, n.format)) - before})
	}, 0
}
