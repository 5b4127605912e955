package ledger

import (
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// Instants of a ledger's host side, for the tests that kill it.
var (
	basePoint   = failpoint.New("ledger.base")      // the base is about to be written
	foldedPoint = failpoint.New("ledger.base.done") // the base is written
	limitsPoint = failpoint.New("ledger.limits")    // new limits are about to be written
)

// Ledger is an open ledger, as the host sees it. It is safe for concurrent use.
type Ledger struct {
	f  *os.File
	fd int
}

// State is what a ledger says.
type State struct {
	Limits  Limits
	Used    Delta // the sum of charges, or a bound of it when Unsettled
	Orphans Delta // of Used: files without a name that somebody has open
	Pending Delta // of Used: deleted, until all servers have said that they do not have it open
	Writers int   // slots with a living owner
	// Busy: a writer is at work, or was a moment ago. Used contains what it has in
	// reserve, at most Chunk each.
	Busy bool
	// Unsettled: since the last walk a writer was killed, or the machine lost
	// power, or nobody has walked yet. Used may be too high until a walk.
	Unsettled bool
	// Uncounted: Used lacks what the volume held before it had a ledger, until
	// the first walk. It is Unsettled too.
	Uncounted bool
	// Foreign: the ledger was last used before this boot; see Recover.
	Foreign bool
}

// Format writes a new ledger into an empty file: nothing is used, or, with empty
// false, nobody knows what is; a walk will find out. It does not sync.
func Format(f *os.File, l Limits, empty bool) error {
	id, err := bootID()
	if err != nil {
		return err
	}
	b := make([]byte, FormatSize)
	copy(b, magic)
	lr := limitsRecord{seq: 1, limits: l}
	copy(b[place(limitsOff, limitsSize, 1):], lr.encode())
	br := base{seq: 1, gen: 1, boot: id, unsettled: !empty, uncounted: !empty}
	copy(b[place(baseOff, baseSize, 1):], br.encode())
	_, err = f.WriteAt(b, 0)
	return err
}

// Open returns the ledger in an open file, which stays the caller's. Opened for
// reading only, the file allows State.
//
// Errors: Filesystem when the content is not that of a ledger.
func Open(f *os.File) (*Ledger, error) {
	l := &Ledger{f: f, fd: int(f.Fd())}
	var p page
	return l, l.read(&p)
}

// read reads the whole ledger in one call.
func (l *Ledger) read(p *page) error {
	b := buffers.Get().(*[maxSize]byte)
	defer buffers.Put(b)
	return readPage(l.fd, b[:], p)
}

// buffers and pages are for reading: a list reads thousands of ledgers.
var (
	buffers = sync.Pool{New: func() any { return new([maxSize]byte) }}
	pages   = sync.Pool{New: func() any { return new(page) }}
)

// ReadState is Open and State of a file that is open for reading.
func ReadState(fd int) (State, error) {
	l := Ledger{fd: fd}
	p := pages.Get().(*page)
	defer pages.Put(p)
	if err := l.read(p); err != nil {
		return State{}, err
	}
	return l.state(p, -1)
}

func readPage(fd int, b []byte, p *page) error {
	n, err := preadAll(fd, b)
	if err == nil {
		err = p.decode(b[:n])
	}
	if err != nil {
		return errdefs.Wrap(errdefs.Filesystem, err, "read the ledger of a volume").
			WithHint("detach the volume and run msb volume usage NAME --rescan")
	}
	return nil
}

// preadAll reads from the start of a file. A file that somebody cuts short while
// it is read gives what there is.
func preadAll(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Pread(fd, b, 0)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func pwriteAll(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return errdefs.Wrap(errdefs.Filesystem, err, "write the ledger of a volume")
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// State reads what the ledger says, in one call, and asks the kernel which
// writers live.
func (l *Ledger) State() (State, error) { return ReadState(l.fd) }

// state interprets a page; the owner of slot self lives.
func (l *Ledger) state(p *page, self int) (State, error) {
	id, err := bootID()
	if err != nil {
		return State{}, err
	}
	if p.base.boot != id {
		return foreignState(p), nil
	}
	s := State{Limits: p.limits, Uncounted: p.base.uncounted, Unsettled: p.base.unsettled || p.deaths() != p.base.deaths}
	v := l.look(p, self)
	s.Used, s.Pending = clamp(v.used), v.pending
	s.Writers, s.Busy, s.Unsettled = v.live, v.busy, s.Unsettled || v.dead
	s.Orphans = clamp(v.orphans)
	return s, nil
}

// foreignState is what is known after a boot: no more than the ceiling was used.
// Where nothing was ever used there is no ceiling.
func foreignState(p *page) State {
	return State{Limits: p.limits, Used: clamp(p.promised(true)), Unsettled: true, Uncounted: p.base.uncounted, Foreign: true}
}

func clamp(d Delta) Delta { return Delta{max(d.Bytes, 0), max(d.Inodes, 0)} }

// view is a page together with which of its writers live.
type view struct {
	used    Delta
	pending Delta // still waited for
	orphans Delta
	waiting [MaxWriters]bool // slots whose pending is not answered
	live    int
	others  int  // living servers but for self
	dead    bool // some slot's owner was killed at work
	busy    bool // a living writer but for self has something in reserve or is at work
}

// look asks the kernel who of those that say they live does.
func (l *Ledger) look(p *page, self int) (v view) {
	v.used = p.sum()
	var alive [MaxWriters]bool
	for i := range p.n {
		s := &p.slots[i]
		if s.flags&flagOpen == 0 {
			continue
		}
		if alive[i] = i == self || lockedElsewhere(l.fd, slotLock+int64(i), 1); !alive[i] {
			v.dead = v.dead || s.lost()
			continue
		}
		v.live++
		v.orphans = v.orphans.Plus(s.orphans)
		if i != self {
			v.busy = v.busy || s.flags&flagActive != 0 || s.reserve != Delta{}
			if s.flags&flagServer != 0 {
				v.others++
			}
		}
	}
	for i := range p.n {
		if s := &p.slots[i]; s.pending != (Delta{}) {
			if answered(p, &alive, i, s.pendAt) {
				v.used = v.used.Minus(s.pending)
			} else {
				v.pending = v.pending.Plus(s.pending)
				v.waiting[i] = true
			}
		}
	}
	return v
}

// answered reports whether every living server but i has looked for orphans after
// at.
func answered(p *page, alive *[MaxWriters]bool, i int, at int64) bool {
	for j := range p.n {
		if s := &p.slots[j]; j != i && alive[j] && s.flags&flagServer != 0 && s.ackAt <= at {
			return false
		}
	}
	return true
}

// SetLimits replaces the limits. Below the present use they refuse growth and
// nothing else. Writers see them within a second. Only the host calls it.
func (l *Ledger) SetLimits(limits Limits) error {
	release, err := l.lockBase()
	if err != nil {
		return err
	}
	defer release()
	var p page
	if err := l.read(&p); err != nil {
		return err
	}
	if p.limits == limits {
		return nil
	}
	if err := limitsPoint.Hit(); err != nil {
		return err
	}
	r := limitsRecord{seq: p.lseq + 1, limits: limits}
	return pwriteAll(l.fd, r.encode(), place(limitsOff, limitsSize, r.seq))
}

// Recover makes a ledger of an earlier boot one of this boot: it takes the
// ceiling for the use, until a walk. It does nothing to a ledger of this boot.
// Only the host calls it, before there are writers.
func (l *Ledger) Recover() error {
	id, err := bootID()
	if err != nil {
		return err
	}
	var p page
	if err := l.read(&p); err != nil || p.base.boot == id {
		return err
	}
	release, err := l.lockBase()
	if err != nil {
		return err
	}
	defer release()
	if err := l.read(&p); err != nil || p.base.boot == id {
		return err
	}
	b := base{seq: p.base.seq + 1, gen: p.base.gen + 1, boot: id, unsettled: true, uncounted: p.base.uncounted}
	b.ceiling = p.promised(true)
	b.use = clamp(b.ceiling)
	return l.writeBase(&b)
}

func (l *Ledger) writeBase(b *base) error {
	if err := basePoint.Hit(); err != nil {
		return err
	}
	if err := pwriteAll(l.fd, b.encode(), place(baseOff, baseSize, b.seq)); err != nil {
		return err
	}
	return foldedPoint.Hit()
}

// lockBase keeps other hosts from the base and the limits.
func (l *Ledger) lockBase() (release func(), err error) {
	ok, err := lockWithin(l.fd, baseLock, 1, basePatience)
	if err == nil && !ok {
		err = unix.EBUSY
	}
	if err != nil {
		return nil, errdefs.Wrap(errdefs.Filesystem, err, "another process changes the ledger").
			WithHint("a stopped process may hold it: see /proc/locks")
	}
	return func() { unlock(l.fd, baseLock, 1) }, nil
}

// bootID tells boots of the machine apart. It is read once.
var bootID = sync.OnceValues(func() (id [16]byte, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, err
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", ""))
	if err == nil && len(raw) != len(id) {
		err = errors.New("unreadable boot id")
	}
	copy(id[:], raw)
	return id, err
})
