package vhostuser

import (
	"fmt"
	"os"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxRegions is the number of memory slots offered. QEMU refuses to start when
// it is smaller than what it has already seen, so it is well above any machine
// we describe.
const maxRegions = 64

// regionSpec is the wire form of one memory region. All values are the front
// end's and unchecked.
type regionSpec struct {
	gpa    uint64 // guest physical address
	size   uint64 // bytes
	user   uint64 // address in the front end, used only by SET_VRING_ADDR
	offset uint64 // of the region in the descriptor sent with it
}

func (s regionSpec) String() string {
	return fmt.Sprintf("region gpa %#x size %#x user %#x offset %#x", s.gpa, s.size, s.user, s.offset)
}

// region is one mapping of guest memory. It is immutable; refs counts the
// generations it is part of.
type region struct {
	regionSpec
	mem     []byte // the guest's bytes, len == size
	mapping []byte // what to unmap, page aligned; nil in tests
	refs    atomic.Int32
}

// mapRegion maps a region of fd, which the caller still owns and may close. The
// region starts with no references.
func mapRegion(fd int, s regionSpec) (*region, error) {
	if s.size == 0 || s.gpa+s.size < s.gpa || s.user+s.size < s.user || s.offset+s.size < s.offset {
		return nil, fmt.Errorf("%v: empty or wraps around", s)
	}
	page, err := checkBacking(fd, s)
	if err != nil {
		return nil, err
	}
	start := s.offset &^ (page - 1)
	length := (s.offset + s.size - start + page - 1) &^ (page - 1)
	m, err := unix.Mmap(fd, int64(start), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("%v: %w", s, os.NewSyscallError("mmap", err))
	}
	// Guest memory does not belong into our core dumps. Best effort.
	_ = unix.Madvise(m, unix.MADV_DONTDUMP)
	off := s.offset - start
	return &region{regionSpec: s, mapping: m, mem: m[off : off+s.size : off+s.size]}, nil
}

// checkBacking returns the page size of fd after checking that it is a file
// that holds the region: touching pages beyond its end would be a SIGBUS.
func checkBacking(fd int, s regionSpec) (page uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("%v: %w", s, os.NewSyscallError("fstat", err))
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, fmt.Errorf("%v: descriptor is not a memory file", s)
	}
	if st.Size < 0 || s.offset+s.size > uint64(st.Size) {
		return 0, fmt.Errorf("%v: file has only %#x bytes", s, st.Size)
	}
	page = uint64(os.Getpagesize())
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.HUGETLBFS_MAGIC && fs.Bsize > int64(page) && fs.Bsize&(fs.Bsize-1) == 0 {
		page = uint64(fs.Bsize)
	}
	return page, nil
}

func (r *region) release() {
	if r.refs.Add(-1) == 0 {
		r.drop()
	}
}

// drop unmaps a region that is in no generation.
func (r *region) drop() {
	if r.mapping != nil {
		_ = unix.Munmap(r.mapping)
	}
}

func dropAll(regions []*region) {
	for _, r := range regions {
		r.drop()
	}
}

// memory is one generation of the memory table: immutable, and mapped for as
// long as somebody holds a reference. Requests in flight keep the generation
// they were found in; a change of the table makes a new one.
type memory struct {
	regions []*region // sorted by gpa, not overlapping
	refs    atomic.Int64
}

// newMemory makes a generation with one reference out of regions it shares
// with others.
func newMemory(regions []*region) (*memory, error) {
	m := &memory{regions: slices.Clone(regions)}
	slices.SortFunc(m.regions, func(a, b *region) int {
		if a.gpa < b.gpa {
			return -1
		}
		return 1
	})
	if len(m.regions) > maxRegions {
		return nil, fmt.Errorf("more than %d memory regions", maxRegions)
	}
	for i, r := range m.regions {
		for _, o := range m.regions[i+1:] {
			if r.gpa+r.size > o.gpa || (r.user < o.user+o.size && o.user < r.user+r.size) {
				return nil, fmt.Errorf("%v overlaps %v", r.regionSpec, o.regionSpec)
			}
		}
	}
	for _, r := range m.regions {
		r.refs.Add(1)
	}
	m.refs.Store(1)
	return m, nil
}

// retain may only be called by somebody who holds a reference, or under the
// lock that guards one.
func (m *memory) retain() *memory {
	m.refs.Add(1)
	return m
}

func (m *memory) release() {
	if m.refs.Add(-1) > 0 {
		return
	}
	for _, r := range m.regions {
		r.release()
	}
}

// add returns the generation with r in it; on error r stays the caller's.
func (m *memory) add(r *region) (*memory, error) {
	return newMemory(append(slices.Clone(m.regions), r))
}

// remove returns the generation without the region of this place and size.
func (m *memory) remove(s regionSpec) (*memory, error) {
	i := slices.IndexFunc(m.regions, func(r *region) bool {
		return r.gpa == s.gpa && r.size == s.size && r.user == s.user
	})
	if i < 0 {
		return nil, fmt.Errorf("no %v", s)
	}
	return newMemory(slices.Delete(slices.Clone(m.regions), i, i+1))
}

// at returns the guest's bytes from gpa to the end of n or of the region that
// gpa is in, whichever is first; nil when gpa is not in a region.
func (m *memory) at(gpa, n uint64) []byte {
	for _, r := range m.regions {
		if off := gpa - r.gpa; off < r.size {
			if n > r.size-off {
				n = r.size - off
			}
			return r.mem[off : off+n : off+n]
		}
	}
	return nil
}

// table returns n bytes at gpa that lie in one region, or nil.
func (m *memory) table(gpa, n uint64) []byte {
	if b := m.at(gpa, n); uint64(len(b)) == n {
		return b
	}
	return nil
}

// user returns n bytes at a front-end address that lie in one region, or nil.
func (m *memory) user(addr, n uint64) []byte {
	for _, r := range m.regions {
		if off := addr - r.regionSpec.user; off < r.size {
			if n > r.size-off {
				return nil
			}
			return r.mem[off : off+n : off+n]
		}
	}
	return nil
}

// contains reports whether a fault at this address was one on guest memory.
func (m *memory) contains(addr uintptr) bool {
	for _, r := range m.regions {
		if addr-addressOf(r.mem) < uintptr(len(r.mem)) {
			return true
		}
	}
	return false
}
