package volumefs

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Instants between a change and its settlement, for the tests that kill a writer.
var (
	chargedPoint  = failpoint.New("volumefs.charged")  // a temporary is charged and empty
	unlinkedPoint = failpoint.New("volumefs.unlinked") // a name is gone, not yet refunded
)

// change is an operation as the ledger sees it. Without a ledger it does nothing.
// Every change ends with done, which is harmless to repeat.
type change struct {
	fs     *FS
	op     ledger.Op
	w      *ledger.Writer // nil: no ledger, or done
	rules  ledger.Rules
	actual ledger.Delta
}

// account begins a change that may touch the charges of these inodes.
func (f *FS) account(inos ...uint64) (*change, error) {
	if f.opts.Ledger == nil {
		return &change{}, nil
	}
	a, err := f.ledger()
	if err != nil {
		return nil, err
	}
	return &change{fs: f, op: a.w.Lock(inos...), w: a.w, rules: a.rules}, nil
}

// accounting is the volume's ledger, opened by the first change.
type accounting struct {
	w     *ledger.Writer
	rules ledger.Rules
}

func (f *FS) ledger() (*accounting, error) {
	if a := f.counted.Load(); a != nil {
		return a, nil
	}
	f.opening.Lock()
	defer f.opening.Unlock()
	if a := f.counted.Load(); a != nil {
		return a, nil
	}
	w, err := f.opts.Ledger()
	if err != nil {
		return nil, err
	}
	rules, err := ledger.RulesOf(f.root)
	if err != nil {
		return nil, err
	}
	a := &accounting{w: w, rules: rules}
	f.counted.Store(a)
	return a, nil
}

// grow charges the most that is going to be added. Errors: QuotaError.
func (c *change) grow(d ledger.Delta) error {
	if c.w == nil {
		return nil
	}
	return c.op.Grow(d)
}

// growName is grow for an operation that also adds a name to an open directory.
func (c *change) growName(d ledger.Delta, dir int, name string) error {
	if c.w == nil {
		return nil
	}
	most := d
	most.Bytes += c.rules.DirGrowth(dir, len(name), false)
	err := c.op.Grow(most)
	var full *errdefs.QuotaError
	if most == d || !errors.As(err, &full) {
		return err
	}
	d.Bytes += c.rules.DirGrowth(dir, len(name), true)
	return c.op.Grow(d)
}

// add notes what was added in truth.
func (c *change) add(d ledger.Delta) { c.actual = c.actual.Plus(d) }

// done settles the change. What was not noted with add is refunded.
func (c *change) done() error {
	if c.w == nil {
		return nil
	}
	c.w = nil
	return c.op.Done(c.actual)
}

// close is done for a path on which something else failed, or nothing is left to
// fail.
func (c *change) close() { _ = c.done() }

// dirSize returns the charge of an open directory; the root's is less.
func (c *change) dirSize(dir int) int64 {
	if c.w == nil || !c.rules.DirSizes {
		return 0
	}
	var st unix.Stat_t
	if unix.Fstat(dir, &st) != nil {
		return 0
	}
	return c.rules.Dir(st.Size)
}

// dirGrew notes what a directory grew by since its charge was before.
func (c *change) dirGrew(dir int, before int64) {
	if c.w != nil {
		c.add(ledger.Delta{Bytes: c.dirSize(dir) - before})
	}
}

// content is the charge of a new file that is open for writing.
func (c *change) content(fd int) (d ledger.Delta, err error) {
	var st unix.Stat_t
	if c.w == nil {
		return d, nil
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return d, err
	}
	return ledger.Delta{Bytes: c.rules.File(st.Size) + c.rules.Xattrs(ledger.OpenXattrBytes(fd)), Inodes: 1}, nil
}

// inode is the charge of a file, of its first name alone; fd may be O_PATH.
func (c *change) inode(fd int, st *unix.Stat_t) ledger.Delta {
	standin := false
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 && st.Size <= ledger.Block {
		ov, err := c.fs.overlayOf(fd, st)
		standin = err == nil && ov.isLink()
	}
	xattrs := int64(0)
	if t := st.Mode & unix.S_IFMT; t == unix.S_IFREG || t == unix.S_IFDIR {
		xattrs = ledger.XattrBytes(fd)
	}
	d := c.rules.Inode(st, standin, xattrs)
	d.Inodes = 1
	return d
}

// lost notes that a file, whose charge was d with one name when it still had so many,
// may have lost some: after the last one a guest may still have it open.
func (c *change) lost(fd int, d ledger.Delta, names int64) {
	if c.w == nil {
		return
	}
	var st unix.Stat_t
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		c.add(ledger.Delta{}.Minus(d))
	case st.Nlink > 0:
		c.add(ledger.Delta{Inodes: -max(0, names-int64(st.Nlink))})
	default:
		c.add(ledger.Delta{Inodes: -max(0, names-1)})
		c.op.Orphan(st.Ino, d, false)
	}
}

// inodeOf is the key of an open file for account; 0 without a ledger.
func (f *FS) inodeOf(fd int) uint64 {
	var st unix.Stat_t
	if f.opts.Ledger == nil || unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}

// named is a name in an open directory whose file may go: both are locked.
type named struct {
	*change
	dir    int // not owned
	before int64
	fd     int // O_PATH of what has the name, -1: nothing has; owned
	st     unix.Stat_t
	charge ledger.Delta
}

// accountName begins a change of what a name in an open directory means. more are
// further inodes to be locked. Errors: those of looking the name up but ENOENT.
func (f *FS) accountName(dir int, name string, more ...uint64) (*named, error) {
	n := &named{change: &change{}, dir: dir, fd: -1}
	if f.opts.Ledger == nil {
		return n, nil
	}
	for range maxPasses {
		fd, err := f.openIn(dir, name, unix.O_PATH)
		if err != nil && err != unix.ENOENT {
			return nil, err
		}
		inos := append(more, f.inodeOf(dir))
		if n.fd = -1; err == nil {
			n.fd = fd
			if err := unix.Fstat(fd, &n.st); err != nil {
				n.close()
				return nil, err
			}
			inos = append(inos, n.st.Ino)
		}
		c, err := f.account(inos...)
		if err != nil {
			n.close()
			return nil, err
		}
		n.change = c
		if n.stillThere(name) {
			n.before = n.dirSize(dir)
			return n, nil
		}
		n.close() // somebody was faster: what the name means now is not locked
	}
	return nil, unix.EAGAIN // somebody is faster all the time
}

// stillThere reports whether the name means what is locked, and looks at it.
func (n *named) stillThere(name string) bool {
	var st unix.Stat_t
	err := unix.Fstatat(n.dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if n.fd < 0 {
		return err != nil
	}
	if err != nil {
		return false
	}
	if st.Ino != n.st.Ino || st.Dev != n.st.Dev {
		return false
	}
	n.st, n.charge = st, n.inode(n.fd, &st)
	return true
}

// gone notes that the name does not mean the file any more.
func (n *named) gone() {
	if n.fd >= 0 {
		_ = unlinkedPoint.Hit()
		n.lost(n.fd, n.charge, int64(n.st.Nlink))
	}
}

// settle ends the change, with what the directory has grown or shrunk by.
func (n *named) settle() error {
	n.dirGrew(n.dir, n.before)
	err := n.done()
	n.close()
	return err
}

func (n *named) close() {
	n.change.close()
	if n.fd >= 0 {
		_ = unix.Close(n.fd)
		n.fd = -1
	}
}

// noRoomToCount reports whether a volume of before there were ledgers cannot get
// one because the disk is full. Deleting must be possible all the same: the walk
// that a new ledger begins with will not find what is gone.
func (f *FS) noRoomToCount(err error) bool {
	return err != nil && f.counted.Load() == nil && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT))
}

// unlink removes a name that is not a directory's.
func (f *FS) unlink(dir int, name string) error { return f.take(dir, name, 0) }

// rmdir removes an empty directory.
func (f *FS) rmdir(dir int, name string) error { return f.take(dir, name, unix.AT_REMOVEDIR) }

func (f *FS) take(dir int, name string, flags int) error {
	n, err := f.accountName(dir, name)
	if f.noRoomToCount(err) {
		return unix.Unlinkat(dir, name, flags)
	}
	if err != nil {
		return err
	}
	defer n.close()
	if err := unix.Unlinkat(dir, name, flags); err != nil {
		return err
	}
	n.gone()
	if n.w != nil && !n.rules.DirShrinks {
		return n.done()
	}
	return n.settle()
}
