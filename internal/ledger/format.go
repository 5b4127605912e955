package ledger

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
)

// Layout of the file, version 1. Records have two copies, written in turn; the
// valid one with the higher sequence number counts. So a reader finds the record
// before a write or the one after it, never a mixture, and needs no lock.
//
//	0     magic, version
//	64    limits, 2 x 64
//	256   base, 2 x 128
//	1024  slots, 64 x 2 x 256; those beyond the first page when they are needed
//
// Both copies of a record lie in one sector of 512 bytes, which a disk writes as a
// whole or not at all.
const (
	magic      = "msbledg\x01"
	limitsOff  = 64
	limitsSize = 64
	baseOff    = 256
	baseSize   = 128
	slotsOff   = 1024
	slotSize   = 256

	// MaxWriters is how many writers a volume can have at the same time.
	MaxWriters = 64

	// FormatSize is the length of a new ledger in bytes, maxSize that of one
	// with all slots.
	FormatSize = 4096
	maxSize    = (slotsOff + MaxWriters*2*slotSize + FormatSize - 1) &^ (FormatSize - 1)

	// maxValue bounds every number in a ledger and every sum: two of them can be
	// added without a look.
	maxValue = 1 << 60
)

// ErrDamaged says that the content of a file is not that of a ledger of this
// version.
var ErrDamaged = errors.New("the ledger is damaged")

var le = binary.LittleEndian

// limitsRecord is written by the host only.
type limitsRecord struct {
	seq    uint64
	limits Limits
}

// base is written by the host only: what the last walk found, and what is known
// about earlier boots.
type base struct {
	seq       uint64
	gen       uint32 // slots of another generation are empty
	unsettled bool   // use is a bound: nobody has walked since
	uncounted bool   // use lacks what was there before the ledger: nobody has walked yet
	boot      [16]byte
	use       Delta
	ceiling   Delta  // synced: use was never higher
	deaths    uint64 // of writers that the last walk accounts for
}

// slot is what one writer says.
type slot struct {
	seq     uint64
	gen     uint32
	flags   uint32
	deaths  uint32 // owners that were killed, and other reasons for a walk
	pid     uint32
	use     Delta // including reserve, pending and orphans
	reserve Delta
	pending Delta // of use: free when all servers have answered after pendAt
	orphans Delta // of use: open here, without a name
	ceiling Delta // synced by this writer: the use of the whole volume was never higher
	next    Delta // as ceiling, being synced
	pendAt  int64 // boot time, ns
	ackAt   int64 // boot time, ns: when the last look for orphans began
}

// Flags of a slot.
const (
	flagOpen   = 1 << iota // has an owner, if its lock is held
	flagActive             // its owner may be changing the volume without a word here
	flagServer             // its owner keeps files of the volume open for others
)

// lost reports whether something is lost if the slot's owner does not live: what
// it had in reserve, what it was about to do, or its orphans.
func (r *slot) lost() bool {
	return r.flags&flagOpen != 0 && (r.flags&flagActive != 0 || r.reserve != Delta{} || r.orphans != Delta{})
}

// seal writes the sum of a record into its first four bytes.
func seal(b []byte) { le.PutUint32(b, sumOf(b)) }

// sumOf is the CRC-32 of IEEE 802.3 of a copy: that of Castagnoli would have its
// tables made at every start of a program, for 0.1 ms.
func sumOf(b []byte) uint32 { return crc32.ChecksumIEEE(b[4:]) }

// sealed reports whether a record's sum is right. A record of zeros was never
// written.
func sealed(b []byte) bool {
	return le.Uint64(b[8:]) != 0 && le.Uint32(b) == sumOf(b)
}

// newest returns the valid copy of a record with the highest sequence number, nil
// if there is none.
func newest(b []byte, off, size int) []byte {
	if off+2*size > len(b) {
		return nil
	}
	x, y := b[off:off+size], b[off+size:off+2*size]
	switch okX, okY := sealed(x), sealed(y); {
	case okX && okY && le.Uint64(y[8:]) > le.Uint64(x[8:]):
		return y
	case okX:
		return x
	case okY:
		return y
	}
	return nil
}

// place is where the copy with a sequence number lies.
func place(off, size int, seq uint64) int64 { return int64(off + int(seq&1)*size) }

func putDelta(b []byte, d Delta) {
	le.PutUint64(b, uint64(d.Bytes))
	le.PutUint64(b[8:], uint64(d.Inodes))
}

// getDelta reads two numbers and bounds them.
func getDelta(b []byte) Delta {
	return Delta{bounded(int64(le.Uint64(b))), bounded(int64(le.Uint64(b[8:])))}
}

func bounded(v int64) int64 { return max(-maxValue, min(v, maxValue)) }

func (r *limitsRecord) encode() []byte {
	b := make([]byte, limitsSize)
	le.PutUint64(b[8:], r.seq)
	putDelta(b[16:], Delta(r.limits))
	seal(b)
	return b
}

func decodeLimits(b []byte) (r limitsRecord, ok bool) {
	c := newest(b, limitsOff, limitsSize)
	if c == nil {
		return r, false
	}
	d := getDelta(c[16:])
	return limitsRecord{seq: le.Uint64(c[8:]), limits: Limits{max(d.Bytes, 0), max(d.Inodes, 0)}}, true
}

func (r *base) encode() []byte {
	b := make([]byte, baseSize)
	le.PutUint32(b[4:], r.gen)
	le.PutUint64(b[8:], r.seq)
	if r.unsettled {
		b[16] = 1
	}
	if r.uncounted {
		b[17] = 1
	}
	le.PutUint64(b[24:], r.deaths)
	copy(b[32:48], r.boot[:])
	putDelta(b[48:], r.use)
	putDelta(b[64:], r.ceiling)
	seal(b)
	return b
}

func decodeBase(b []byte) (r base, ok bool) {
	c := newest(b, baseOff, baseSize)
	if c == nil {
		return r, false
	}
	r = base{
		gen: le.Uint32(c[4:]), seq: le.Uint64(c[8:]), unsettled: c[16] != 0, uncounted: c[17] != 0, deaths: le.Uint64(c[24:]),
		use: getDelta(c[48:]), ceiling: getDelta(c[64:]),
	}
	copy(r.boot[:], c[32:48])
	return r, true
}

// encode fills b, which has slotSize bytes.
func (r *slot) encode(b []byte) {
	clear(b)
	le.PutUint32(b[4:], r.flags)
	le.PutUint64(b[8:], r.seq)
	le.PutUint32(b[16:], r.gen)
	le.PutUint32(b[20:], r.deaths)
	le.PutUint32(b[24:], r.pid)
	le.PutUint64(b[32:], uint64(r.pendAt))
	le.PutUint64(b[40:], uint64(r.ackAt))
	for i, d := range [...]Delta{r.use, r.reserve, r.pending, r.orphans, r.ceiling, r.next} {
		putDelta(b[48+16*i:], d)
	}
	seal(b)
}

// decodeSlot reads slot i; one that was never written is empty.
func decodeSlot(b []byte, i int) (r slot) {
	c := newest(b, slotOff(i), slotSize)
	if c == nil {
		return r
	}
	r = slot{
		flags: le.Uint32(c[4:]), seq: le.Uint64(c[8:]), gen: le.Uint32(c[16:]), deaths: le.Uint32(c[20:]),
		pid: le.Uint32(c[24:]), pendAt: int64(le.Uint64(c[32:])), ackAt: int64(le.Uint64(c[40:])),
	}
	for i, d := range [...]*Delta{&r.use, &r.reserve, &r.pending, &r.orphans, &r.ceiling, &r.next} {
		*d = getDelta(c[48+16*i:])
	}
	return r
}

func slotOff(i int) int { return slotsOff + i*2*slotSize }

// page is a decoded ledger.
type page struct {
	limits Limits
	lseq   uint64
	base   base
	slots  [MaxWriters]slot
	n      int // slots that lie within the file
}

// decode reads a whole ledger. Errors: ErrDamaged.
func (p *page) decode(b []byte) error {
	if len(b) < FormatSize || string(b[:8]) != magic {
		return ErrDamaged
	}
	l, ok := decodeLimits(b)
	if !ok {
		return ErrDamaged
	}
	p.limits, p.lseq = l.limits, l.seq
	if p.base, ok = decodeBase(b); !ok {
		return ErrDamaged
	}
	had := p.n
	p.n = min((len(b)-slotsOff)/(2*slotSize), MaxWriters)
	for i := range p.n {
		s := decodeSlot(b, i)
		if s.gen != p.base.gen {
			s = slot{seq: s.seq, gen: p.base.gen}
		}
		p.slots[i] = s
	}
	for i := p.n; i < had; i++ {
		p.slots[i] = slot{}
	}
	return nil
}

// sum is the base and all slots, before what is pending is looked at.
func (p *page) sum() Delta {
	t := p.base.use
	for i := range p.n {
		t = t.Plus(p.slots[i].use)
	}
	return t
}

// promised is the highest synced ceiling; pending ones count after a power cut.
func (p *page) promised(next bool) Delta {
	c := p.base.ceiling
	for i := range p.n {
		c = higher(c, p.slots[i].ceiling)
		if next {
			c = higher(c, p.slots[i].next)
		}
	}
	return c
}

func higher(a, b Delta) Delta { return Delta{max(a.Bytes, b.Bytes), max(a.Inodes, b.Inodes)} }

// deaths counts reasons for a walk that live in slots.
func (p *page) deaths() (n uint64) {
	for i := range p.n {
		n += uint64(p.slots[i].deaths)
	}
	return n
}
