package writelog

import (
	"encoding/binary"
	"math/rand/v2"
)

// Cut is a moment in a log when the power goes away.
type Cut struct {
	Flushed int    // entries before this one are on the disk: the last completed flush is among them
	Issued  int    // entries from Flushed to this one were completed, and may be lost
	Seed    uint64 // chooses which of them are; they are all lost if there are none
}

// FlushCuts returns the moments right after each flush that follows a write.
func FlushCuts(log []Entry) []Cut {
	var cuts []Cut
	dirty := false
	for i := range log {
		if log[i].Flush && dirty {
			cuts = append(cuts, Cut{Flushed: i + 1, Issued: i + 1})
			dirty = false
		}
		dirty = dirty || log[i].Writes()
	}
	return cuts
}

// RandomCuts returns n moments at which something was not covered by a flush
// yet, in the order of the log; the same for the same seed.
func RandomCuts(log []Entry, n int, seed uint64) []Cut {
	r := rand.New(rand.NewPCG(seed, 0))
	var open []Cut // every moment right after a write
	flushed := 0
	for i := range log {
		if log[i].Flush {
			flushed = i + 1
		}
		if log[i].Writes() && !log[i].FUA && !log[i].Flush {
			open = append(open, Cut{Flushed: flushed, Issued: i + 1})
		}
	}
	picked := make([]int, len(open)) // how often
	for range min(n, n*len(open)) {
		picked[r.IntN(len(open))]++
	}
	var cuts []Cut
	for i, times := range picked {
		for range times {
			c := open[i]
			c.Seed = r.Uint64()
			cuts = append(cuts, c)
		}
	}
	return cuts
}

// Image is the content of a disk in memory, growing along a log.
type Image struct {
	// Tear is the unit in which the disk writes, in bytes: of a write that was
	// not flushed, whole units may be missing. A sector by default.
	Tear int64
	// Whole is where the part of the disk ends of which every write is whole or
	// missing.
	Whole int64

	log  []Entry
	data []byte
	next int // entries before this one are in data
	undo []saved
}

// saved is what was at an offset before.
type saved struct {
	offset int64
	data   []byte
}

// NewImage returns the disk as it was before the log. It takes base over.
func NewImage(base []byte, log []Entry) *Image { return &Image{Tear: minSector, log: log, data: base} }

// At calls fn with the disk as the cut leaves it. Cuts must come in the order
// of the log. fn may neither keep nor change the bytes.
func (m *Image) At(c Cut, fn func(disk []byte)) {
	for ; m.next < c.Flushed; m.next++ {
		m.apply(&m.log[m.next], 0, m.log[m.next].Length, false)
	}
	m.drop(c)
	fn(m.data)
	for i := len(m.undo) - 1; i >= 0; i-- {
		copy(m.data[m.undo[i].offset:], m.undo[i].data)
	}
	m.undo = m.undo[:0]
}

// drop puts a random part of what was not flushed on the disk. How much is lost
// is random as well: with one chance for all, few writes would never be lost
// together and many would never all survive.
func (m *Image) drop(c Cut) {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.Seed)
	r := rand.New(rand.NewChaCha8(seed))
	keep, torn := r.Float64(), r.Float64()*0.2
	for i := c.Flushed; i < c.Issued; i++ {
		e := &m.log[i]
		from, to := int64(0), e.Length
		if !e.FUA {
			switch {
			case r.Float64() < torn && e.Offset >= m.Whole:
				from, to = part(r, e.Length, m.Tear)
			case r.Float64() >= keep:
				continue
			}
		}
		m.apply(e, from, to, true)
	}
}

// part returns a stretch of a write: its begin, its end or something between.
func part(r *rand.Rand, length, unit int64) (from, to int64) {
	units := length / unit
	a, b := r.Int64N(units+1)*unit, r.Int64N(units+1)*unit
	switch r.IntN(3) {
	case 0:
		return 0, a
	case 1:
		return a, length
	}
	return min(a, b), max(a, b)
}

// apply writes the bytes from..to of an entry, remembering what was there if asked.
func (m *Image) apply(e *Entry, from, to int64, remember bool) {
	if !e.Writes() || from >= to {
		return
	}
	at := m.data[e.Offset+from : e.Offset+to]
	if remember {
		m.undo = append(m.undo, saved{e.Offset + from, append([]byte(nil), at...)})
	}
	if e.Discard {
		clear(at)
		return
	}
	copy(at, e.Data[from:to])
}
