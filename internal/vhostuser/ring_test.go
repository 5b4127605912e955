package vhostuser

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// testMemory makes guest memory outside the Go heap: regions of these sizes,
// one after the other from 0x1000, with a hole before the last one.
func testMemory(t testing.TB, sizes ...uint64) *memory {
	t.Helper()
	gpa := uint64(0x1000)
	var regions []*region
	for i, n := range sizes {
		if i > 0 && i == len(sizes)-1 {
			gpa += 0x10000
		}
		b, err := unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, &region{regionSpec: regionSpec{gpa: gpa, size: n, user: gpa + 1<<40}, mem: b, mapping: b})
		gpa += n
	}
	m, err := newMemory(regions)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.release)
	return m
}

// testRing lays a ring of size at the start of m.
func testRing(t testing.TB, m *memory, size uint16) ring {
	t.Helper()
	const base = 0x1000 + 1<<40
	avail := base + descSize*uint64(size)
	used := (avail + availLen(size) + 3) &^ 3
	r, err := mapRing(m, ringAddr{desc: base, avail: avail, used: used}, size)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func put(table []byte, i int, d descriptor) {
	b := table[i*descSize:]
	binary.LittleEndian.PutUint64(b, d.addr)
	binary.LittleEndian.PutUint32(b[8:], d.n)
	binary.LittleEndian.PutUint16(b[12:], d.flags)
	binary.LittleEndian.PutUint16(b[14:], d.next)
}

const testBuf = 0x4000 // a place in the first region behind the ring

// TestParseChain checks every rule for chains on a ring of 8 in two adjacent
// regions of 64 KiB and one further away.
func TestParseChain(t *testing.T) {
	table := func(d ...descriptor) []descriptor { return d }
	tests := map[string]struct {
		ring, table []descriptor // table goes to testBuf
		head        uint16
		in, out     int // bytes
		segments    int
		err         error
	}{
		"one readable": {ring: table(descriptor{0x8000, 40, 0, 0}), in: 40, segments: 1},
		"one writable": {ring: table(descriptor{0x8000, 40, descWrite, 0}), out: 40, segments: 1},
		"readable, then writable": {ring: table(
			descriptor{0x8000, 40, descNext, 1}, descriptor{0x9000, 16, descWrite, 0}), in: 40, out: 16, segments: 2},
		"zero length is allowed": {ring: table(
			descriptor{0x8000, 0, descNext, 1}, descriptor{0, 0, descWrite | descNext, 2}, descriptor{0x9000, 16, descWrite, 0}), out: 16, segments: 1},
		"zero length is counted": {ring: table(descriptor{0, 0, descNext, 0}), err: errLoop},
		"as long as the table": {ring: table(
			descriptor{0x8000, 1, descNext, 1}, descriptor{0x8000, 1, descNext, 2}, descriptor{0x8000, 1, descNext, 3}, descriptor{0x8000, 1, descNext, 4},
			descriptor{0x8000, 1, descNext, 5}, descriptor{0x8000, 1, descNext, 6}, descriptor{0x8000, 1, descNext, 7}, descriptor{0x8000, 1, 0, 0}), in: 8, segments: 8},
		"loop":                       {ring: table(descriptor{0x8000, 1, descNext, 1}, descriptor{0x8000, 1, descNext, 0}), err: errLoop},
		"head outside":               {head: 8, err: errBadHead},
		"next outside":               {ring: table(descriptor{0x8000, 1, descNext, 8}), err: errBadNext},
		"writable first":             {ring: table(descriptor{0x8000, 1, descWrite | descNext, 1}, descriptor{0x8000, 1, 0, 0}), err: errOrder},
		"empty writable first":       {ring: table(descriptor{0x8000, 0, descWrite | descNext, 1}, descriptor{0x8000, 1, 0, 0}), err: errOrder},
		"outside memory":             {ring: table(descriptor{0x100, 1, 0, 0}), err: errBadAddress},
		"in the hole":                {ring: table(descriptor{0x22000, 1, 0, 0}), err: errBadAddress},
		"wraps around":               {ring: table(descriptor{^uint64(0), 2, 0, 0}), err: errBadAddress},
		"crosses to the next region": {ring: table(descriptor{0x10ff0, 32, descWrite, 0}), out: 32, segments: 2},
		"runs into the hole":         {ring: table(descriptor{0x20ff0, 32, 0, 0}), err: errBadAddress},
		"up to the region end":       {ring: table(descriptor{0x8000, 0x9000, 0, 0}), in: 0x9000, segments: 1},
		"too many bytes":             {ring: table(descriptor{0x8000, 0xffffffff, descNext, 1}, descriptor{0x8000, 1, 0, 0}), err: errTooLong},

		"indirect": {ring: table(descriptor{testBuf, 32, descIndirect, 0}),
			table: table(descriptor{0x8000, 40, descNext, 1}, descriptor{0x9000, 16, descWrite, 0}), in: 40, out: 16, segments: 2},
		"indirect after direct": {ring: table(descriptor{0x8000, 4, descNext, 1}, descriptor{testBuf, 16, descIndirect, 0}),
			table: table(descriptor{0x9000, 16, descWrite, 0}), in: 4, out: 16, segments: 2},
		"indirect loop": {ring: table(descriptor{testBuf, 16, descIndirect, 0}),
			table: table(descriptor{0x8000, 1, descNext, 0}), err: errLoop},
		"indirect next outside": {ring: table(descriptor{testBuf, 16, descIndirect, 0}),
			table: table(descriptor{0x8000, 1, descNext, 1}), err: errBadNext},
		"indirect of length 0":    {ring: table(descriptor{testBuf, 0, descIndirect, 0}), err: errIndirect},
		"indirect of 24 bytes":    {ring: table(descriptor{testBuf, 24, descIndirect, 0}), err: errIndirect},
		"indirect of 1025":        {ring: table(descriptor{testBuf, 1025 * 16, descIndirect, 0}), err: errIndirect},
		"indirect with next":      {ring: table(descriptor{testBuf, 16, descIndirect | descNext, 1}), err: errIndirect},
		"indirect nested":         {ring: table(descriptor{testBuf, 16, descIndirect, 0}), table: table(descriptor{testBuf, 16, descIndirect, 0}), err: errIndirect},
		"indirect outside memory": {ring: table(descriptor{0x100, 16, descIndirect, 0}), err: errBadAddress},
		"indirect across regions": {ring: table(descriptor{0x10ff0, 32, descIndirect, 0}), err: errBadAddress},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := testMemory(t, 0x10000, 0x10000, 0x10000)
			r := testRing(t, m, 8)
			for i, d := range tt.ring {
				put(r.desc, i, d)
			}
			for i, d := range tt.table {
				put(m.table(testBuf, 0x1000), i, d)
			}
			c := chain{iov: &iovecs{}, indirectOK: true}
			err := c.parse(&r, m, tt.head)
			if !errors.Is(err, tt.err) {
				t.Fatalf("parse = %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			if in, out := totalLen(c.iov.in[:c.nin]), totalLen(c.iov.out[:c.nout]); in != tt.in || out != tt.out || c.nin+c.nout != tt.segments {
				t.Errorf("%d bytes in, %d out, %d segments; want %d, %d, %d", in, out, c.nin+c.nout, tt.in, tt.out, tt.segments)
			}
		})
	}
}

// TestParseIndirectNotNegotiated: a driver that did not agree on indirect
// descriptors may not use them.
func TestParseIndirectNotNegotiated(t *testing.T) {
	m := testMemory(t, 0x10000)
	r := testRing(t, m, 8)
	put(r.desc, 0, descriptor{testBuf, 16, descIndirect, 0})
	c := chain{iov: &iovecs{}}
	if err := c.parse(&r, m, 0); err != errIndirect {
		t.Errorf("parse = %v", err)
	}
}

// TestParseTooManySegments: the room for segments is fixed.
func TestParseTooManySegments(t *testing.T) {
	m := testMemory(t, 0x100000)
	r := testRing(t, m, 1024)
	const at = 0x40000
	for i := range 1023 {
		put(r.desc, i, descriptor{0x80000, 1, descNext, uint16(i + 1)})
	}
	put(r.desc, 1023, descriptor{at, 16 * 16, descIndirect, 0})
	for i := range 16 {
		put(m.table(at, 256), i, descriptor{0x80000, 1, descNext, uint16(i + 1)})
	}
	c := chain{iov: &iovecs{}, indirectOK: true}
	if err := c.parse(&r, m, 0); err != errTooMany {
		t.Errorf("parse = %v", err)
	}
}

// TestDescriptorReadOnce flips a descriptor between two honest values and
// checks that no mixture of a check on one and a use of the other gets through.
func TestDescriptorReadOnce(t *testing.T) {
	m := testMemory(t, 0x10000)
	r := testRing(t, m, 8)
	var stop atomic.Bool
	done := make(chan struct{})
	second := (*uint64)(unsafe.Pointer(&r.desc[8]))
	atomic.StoreUint64(second, 64)
	go func() {
		defer close(done)
		for i := uint32(0); !stop.Load(); i++ {
			n, flags := uint64(64), uint64(0)
			if i%2 == 0 {
				n, flags = 0xf0000000, descWrite // far too long
			}
			atomic.StoreUint64(second, n|flags<<32)
		}
	}()
	binary.LittleEndian.PutUint64(r.desc, 0x8000)
	c := chain{iov: &iovecs{}}
	for range 20000 {
		err := c.parse(&r, m, 0)
		got := uint64(totalLen(c.iov.in[:c.nin]) + totalLen(c.iov.out[:c.nout]))
		// The race detector makes loads bytewise, so that they tear.
		if err == nil && (got != c.inBytes+c.outBytes || got > 64) {
			t.Fatalf("%d bytes in segments, %d in, %d out", got, c.inBytes, c.outBytes)
		}
		if err != nil && err != errTooLong {
			t.Error(err)
		}
	}
	stop.Store(true)
	<-done
}

// TestCheckRing: full extents, alignment, and sizes that are powers of two.
func TestCheckRing(t *testing.T) {
	base := uint64(0x1000 + 1<<40)
	good := ringAddr{desc: base, avail: base + 0x1000, used: base + 0x2000}
	end := base + 0x10000
	tests := map[string]struct {
		size uint16
		edit func(*ringAddr)
		ok   bool
	}{
		"good":                 {256, func(*ringAddr) {}, true},
		"at the very end":      {256, func(a *ringAddr) { a.used = end - usedLen(256) - 2 }, true},
		"size 0":               {0, func(*ringAddr) {}, false},
		"size 3":               {3, func(*ringAddr) {}, false},
		"size 2048":            {2048, func(*ringAddr) {}, false},
		"descriptors past end": {256, func(a *ringAddr) { a.desc = end - 16*256 + 16 }, false},
		"available past end":   {256, func(a *ringAddr) { a.avail = end - availLen(256) + 2 }, false},
		"used past end":        {256, func(a *ringAddr) { a.used = end - usedLen(256) + 2 }, false},
		"wraps around":         {256, func(a *ringAddr) { a.used = ^uint64(0) - 7 }, false},
		"outside":              {256, func(a *ringAddr) { a.desc = 0 }, false},
		"descriptors +8":       {256, func(a *ringAddr) { a.desc += 8 }, false},
		"available +1":         {256, func(a *ringAddr) { a.avail++ }, false},
		"available +2":         {256, func(a *ringAddr) { a.avail += 2 }, true},
		"used +2":              {256, func(a *ringAddr) { a.used += 2 }, false},
		"used +4":              {256, func(a *ringAddr) { a.used += 4 }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := testMemory(t, 0x10000)
			a := good
			tt.edit(&a)
			if name == "at the very end" {
				a.used &^= 3
			}
			if _, err := mapRing(m, a, tt.size); (err == nil) != tt.ok {
				t.Errorf("mapRing = %v", err)
			}
		})
	}
}

// TestLoad16 reads 16-bit fields at both halves of a word.
func TestLoad16(t *testing.T) {
	words := []uint32{0x22221111, 0x44443333}
	b := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 8)
	for i, want := range []uint16{0x1111, 0x2222, 0x3333, 0x4444} {
		if got := load16(b, uintptr(2*i)); got != want {
			t.Errorf("load16 at %d = %#x, want %#x", 2*i, got, want)
		}
	}
}

func TestNeedEvent(t *testing.T) {
	tests := []struct {
		event, now, old uint16
		want            bool
	}{
		{0, 1, 0, true},
		{1, 1, 0, false},
		{0, 1, 1, false},
		{4, 10, 3, true},
		{9, 10, 3, true},
		{10, 10, 3, false},
		{2, 10, 3, false},
		{0xffff, 0, 0xffff, true},
		{0xfffe, 0, 0xffff, false},
		{3, 5, 0xfff0, true},
	}
	for _, tt := range tests {
		if got := needEvent(tt.event, tt.now, tt.old); got != tt.want {
			t.Errorf("needEvent(%d, %d, %d) = %v", tt.event, tt.now, tt.old, got)
		}
	}
}

// FuzzParseChain: the guest owns every byte of the table and of memory. Parsing
// may refuse them; it may not panic, run on, or hand out bytes that are not
// guest memory.
func FuzzParseChain(f *testing.F) {
	seed := make([]byte, 8*descSize)
	put(seed, 0, descriptor{0x8000, 40, descNext, 1})
	put(seed, 1, descriptor{0x9000, 16, descWrite, 0})
	f.Add(seed, []byte{}, uint16(0))
	put(seed, 0, descriptor{testBuf, 32, descIndirect, 0})
	f.Add(seed, seed[:32], uint16(0))
	put(seed, 0, descriptor{0x10ff0, 0x20, descNext, 0})
	f.Add(seed, seed[:32], uint16(7))
	f.Fuzz(func(t *testing.T, table, indirect []byte, head uint16) {
		m := testMemory(t, 0x10000, 0x10000, 0x10000)
		r := testRing(t, m, 8)
		copy(r.desc, table)
		copy(m.table(testBuf, 0x1000), indirect)
		c := chain{iov: &iovecs{}, indirectOK: true}
		if err := c.parse(&r, m, head); err != nil {
			return
		}
		total := uint64(0)
		for _, s := range append(c.iov.in[:c.nin:c.nin], c.iov.out[:c.nout]...) {
			total += uint64(len(s))
			if len(s) == 0 || !m.contains(addressOf(s)) || !m.contains(addressOf(s)+uintptr(len(s))-1) {
				t.Fatalf("segment of %d bytes is not guest memory", len(s))
			}
		}
		if total != c.inBytes+c.outBytes || total > 2*maxChainBytes {
			t.Fatalf("%d bytes in segments, %d in, %d out", total, c.inBytes, c.outBytes)
		}
	})
}
