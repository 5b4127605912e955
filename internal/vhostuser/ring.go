package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// Limits of one descriptor chain.
const (
	maxRingSize   = 1024
	descSize      = 16
	maxChainBytes = 1<<20 + 64<<10 // per direction: 1 MiB of payload and room for headers
	maxIndirect   = 1024           // descriptors in an indirect table
	maxSegments   = maxIndirect + 4
)

// Descriptor flags and ring flags of the virtio specification 2.7.
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	usedNoNotify     = 1 // device: do not kick me
	availNoInterrupt = 1 // driver: do not call me
)

// Two kinds of bad chains. One that points outside guest memory goes back to
// the driver with length 0 and the queue lives; every other one means that the
// driver's idea of the ring is not ours, and the queue is broken.
var (
	errBadAddress = errors.New("address outside guest memory")
	errBadNext    = errors.New("next descriptor outside the table")

	errBadHead     = errors.New("head outside the ring")
	errBadAvail    = errors.New("more requests available than the ring holds")
	errLoop        = errors.New("chain longer than its table")
	errIndirect    = errors.New("bad indirect descriptor")
	errOrder       = errors.New("readable descriptor after a writable one")
	errTooLong     = errors.New("chain describes too many bytes")
	errTooMany     = errors.New("chain has too many segments")
	errGuestMemory = errors.New("guest memory was taken away")
)

// returnable reports whether the chain with this error is handed back with
// length 0 instead of breaking the queue.
func returnable(err error) bool {
	return err == errBadAddress || err == errBadNext
}

// ring is one split virtqueue in guest memory. The slices have exactly the
// extents of checkRing; the guest may change every byte at any time.
type ring struct {
	desc  []byte // 16 * size
	avail []byte // 6 + 2*size
	used  []byte // 6 + 8*size
	size  uint16 // power of two, <= maxRingSize
}

func availLen(size uint16) uint64 { return 6 + 2*uint64(size) }
func usedLen(size uint16) uint64  { return 6 + 8*uint64(size) }

// checkRing makes a ring of three slices after checking extents and alignment.
func checkRing(desc, avail, used []byte, size uint16) (ring, error) {
	r := ring{desc: desc, avail: avail, used: used, size: size}
	if size == 0 || size > maxRingSize || size&(size-1) != 0 {
		return r, fmt.Errorf("ring size %d is not a power of two up to %d", size, maxRingSize)
	}
	for _, p := range []struct {
		name  string
		b     []byte
		n     uint64
		align uintptr
	}{
		{"descriptor table", desc, descSize * uint64(size), 16},
		{"available ring", avail, availLen(size), 2},
		{"used ring", used, usedLen(size), 4},
	} {
		if uint64(len(p.b)) != p.n {
			return r, fmt.Errorf("%s is not inside one memory region", p.name)
		}
		if addressOf(p.b)%p.align != 0 {
			return r, fmt.Errorf("%s is not aligned to %d", p.name, p.align)
		}
	}
	return r, nil
}

func addressOf(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// load16 reads a 16-bit field that the driver writes, with acquire order. Go
// has no 16-bit atomics, so it loads the aligned 32-bit word around the field;
// that word never crosses a page, though it may reach 2 bytes past the ring.
func load16(b []byte, off uintptr) uint16 {
	p := unsafe.Pointer(&b[off])
	shift := uintptr(p) & 2 * 8
	w := atomic.LoadUint32((*uint32)(unsafe.Pointer(uintptr(p) &^ 2)))
	return uint16(w >> shift)
}

func (r *ring) availIdx() uint16       { return load16(r.avail, 2) }
func (r *ring) availFlags() uint16     { return load16(r.avail, 0) }
func (r *ring) usedEvent() uint16      { return load16(r.avail, 4+2*uintptr(r.size)) }
func (r *ring) usedIdx() uint16        { return load16(r.used, 2) }
func (r *ring) head(idx uint16) uint16 { return load16(r.avail, 4+2*uintptr(idx&(r.size-1))) }
func (r *ring) setAvailEvent(idx uint16) {
	*(*uint16)(unsafe.Pointer(&r.used[4+8*uintptr(r.size)])) = idx
}

// setUsed publishes flags and index in one store, which is also a full fence
// towards later loads on amd64 and, as a sequentially consistent store before
// sequentially consistent loads, on arm64.
func (r *ring) setUsed(flags, idx uint16) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&r.used[0])), uint32(idx)<<16|uint32(flags))
}

// putUsed writes one used element; setUsed makes it visible.
func (r *ring) putUsed(idx uint16, e usedElem) {
	off := 4 + 8*uintptr(idx&(r.size-1))
	binary.LittleEndian.PutUint64(r.used[off:off+8], uint64(e.head)|uint64(e.n)<<32)
}

// usedElem is one completion: the chain's head and the bytes written to it.
type usedElem struct {
	head uint16
	n    uint32
}

// needEvent is vring_need_event of the specification: has the index moved past
// event on its way from old to now?
func needEvent(event, now, old uint16) bool {
	return now-event-1 < now-old
}

// descriptor is a private copy of one table entry: it is read once.
type descriptor struct {
	addr  uint64
	n     uint32
	flags uint16
	next  uint16
}

func readDescriptor(table []byte, i uint32) descriptor {
	b := table[i*descSize : i*descSize+descSize]
	w := binary.LittleEndian.Uint64(b[8:])
	return descriptor{
		addr:  binary.LittleEndian.Uint64(b),
		n:     uint32(w),
		flags: uint16(w >> 32),
		next:  uint16(w >> 48),
	}
}

// iovecs is room for the segments of one chain.
type iovecs struct {
	in, out [maxSegments][]byte
}

// chain walks descriptors into iov. nin and nout are the segments found.
type chain struct {
	iov       *iovecs
	nin, nout int

	inBytes, outBytes uint64
	writing           bool // a writable descriptor was seen
	indirectOK        bool // the driver negotiated INDIRECT_DESC
}

// parse walks the chain that starts at head. It reads every descriptor once,
// never more of them than the table has, and writes nothing to guest memory.
// After an error nin and nout are meaningless.
func (c *chain) parse(r *ring, m *memory, head uint16) error {
	c.nin, c.nout, c.inBytes, c.outBytes, c.writing = 0, 0, 0, 0, false
	if head >= r.size {
		return errBadHead
	}
	table, count := r.desc, uint32(r.size)
	i, left := uint32(head), count
	nested := false
	for {
		if left == 0 {
			return errLoop
		}
		left--
		d := readDescriptor(table, i)
		if d.flags&descIndirect != 0 {
			if nested || !c.indirectOK || d.flags&descNext != 0 || d.n == 0 || d.n%descSize != 0 || d.n > maxIndirect*descSize {
				return errIndirect
			}
			if table = m.table(d.addr, uint64(d.n)); table == nil {
				return errBadAddress
			}
			nested, count = true, d.n/descSize
			i, left = 0, count
			continue
		}
		if err := c.add(m, d); err != nil {
			return err
		}
		if d.flags&descNext == 0 {
			return nil
		}
		if i = uint32(d.next); i >= count {
			return errBadNext
		}
	}
}

// add appends one buffer, split where it crosses from one region to the next.
func (c *chain) add(m *memory, d descriptor) error {
	n := uint64(d.n)
	write := d.flags&descWrite != 0
	switch {
	case write:
		c.writing = true
		c.outBytes += n
	case c.writing:
		return errOrder
	default:
		c.inBytes += n
	}
	if c.inBytes > maxChainBytes || c.outBytes > maxChainBytes {
		return errTooLong
	}
	for addr := d.addr; n > 0; {
		b := m.at(addr, n)
		if b == nil {
			return errBadAddress
		}
		if c.nin+c.nout == maxSegments {
			return errTooMany
		}
		if write {
			c.iov.out[c.nout] = b
			c.nout++
		} else {
			c.iov.in[c.nin] = b
			c.nin++
		}
		addr += uint64(len(b)) // no wrap: regions end before 2^64
		n -= uint64(len(b))
	}
	return nil
}
