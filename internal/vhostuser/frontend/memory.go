package frontend

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Where guest memory seems to be. The user address is never dereferenced; it
// only has to differ from the guest physical one.
const (
	GuestBase = 0x4000_0000
	userBase  = 0x7f55_0000_0000
	pageSize  = 4096
)

// Region is one memory region as the device is told about it.
type Region struct {
	GPA, Size, User, Offset uint64
}

// Memory is guest memory: a memfd and an allocator in it. It hands out pages so
// that two in a row are never adjacent.
type Memory struct {
	Bytes   []byte // all of guest memory
	Regions []Region

	fd    int
	mu    sync.Mutex
	pages []uint64         // free pages, as offsets
	small map[int][]uint64 // free pieces by size, a power of two from 64 to 2048
	runs  map[int][]uint64 // free adjacent pages by size
}

func newMemory(o Options) (*Memory, error) {
	size := uint64(o.MemMiB) << 20
	fd, err := unix.MemfdCreate("guest-memory", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	m := &Memory{fd: fd, small: make(map[int][]uint64), runs: make(map[int][]uint64)}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, errors.Join(os.NewSyscallError("ftruncate", err), unix.Close(fd))
	}
	if !o.Unsealed {
		// As QEMU's memfd backend does.
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
			return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(fd))
		}
	}
	m.Bytes, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("mmap", err), unix.Close(fd))
	}
	m.split(size, uint64(o.Regions))
	return m, nil
}

// split divides memory into regions and fills the free list: odd pages first.
func (m *Memory) split(size, n uint64) {
	each := size / n &^ (pageSize - 1)
	for i := range n {
		off := i * each
		if i == n-1 {
			each = size - off
		}
		m.Regions = append(m.Regions, Region{GPA: GuestBase + off, Size: each, User: userBase + off, Offset: off})
	}
	for _, start := range []uint64{0, pageSize} {
		for off := start; off < size; off += 2 * pageSize {
			m.pages = append(m.pages, off)
		}
	}
}

func (m *Memory) close() error {
	return errors.Join(unix.Munmap(m.Bytes), unix.Close(m.fd))
}

// Truncate takes guest memory away from under the device, which only works
// with Options.Unsealed. The client must not touch what is gone.
func (m *Memory) Truncate(size int64) error {
	return os.NewSyscallError("ftruncate", unix.Ftruncate(m.fd, size))
}

// At returns n bytes of guest memory at a guest physical address.
func (m *Memory) At(gpa, n uint64) []byte {
	off := gpa - GuestBase
	return m.Bytes[off : off+n : off+n]
}

// Alloc returns n contiguous bytes, at most 4096, and their guest physical
// address. Pieces below a page are packed, as a guest's kernel heap packs them.
func (m *Memory) Alloc(n int) (gpa uint64, b []byte, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	off, err := m.alloc(n)
	if err != nil {
		return 0, nil, err
	}
	return GuestBase + off, m.Bytes[off : off+uint64(n) : off+uint64(n)], nil
}

func (m *Memory) alloc(n int) (uint64, error) {
	if n > pageSize {
		return 0, fmt.Errorf("guest memory piece of %d bytes", n)
	}
	size := pieceSize(n)
	if size < pageSize {
		if len(m.small[size]) == 0 {
			page, err := m.alloc(pageSize)
			if err != nil {
				return 0, err
			}
			for off := uint64(0); off < pageSize; off += uint64(size) {
				m.small[size] = append(m.small[size], page+off)
			}
		}
		l := m.small[size]
		m.small[size] = l[:len(l)-1]
		return l[len(l)-1], nil
	}
	if len(m.pages) == 0 {
		return 0, errors.New("out of guest memory")
	}
	off := m.pages[len(m.pages)-1]
	m.pages = m.pages[:len(m.pages)-1]
	return off, nil
}

// pieceSize rounds up to what the allocator hands out.
func pieceSize(n int) int {
	if n <= 64 {
		return 64
	}
	if n > 2048 {
		return pageSize
	}
	return 1 << bits.Len(uint(n-1))
}

// Free returns a piece of n bytes.
func (m *Memory) Free(gpa uint64, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	off := gpa - GuestBase
	if size := pieceSize(n); size < pageSize {
		m.small[size] = append(m.small[size], off)
		return
	}
	m.pages = append(m.pages, off)
}

// contiguous takes n bytes of adjacent pages from the end of memory, for rings
// and indirect tables.
func (m *Memory) contiguous(n int) (gpa uint64, b []byte, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	want := uint64(n+pageSize-1) &^ (pageSize - 1)
	if l := m.runs[int(want)]; len(l) > 0 {
		off := l[len(l)-1]
		m.runs[int(want)] = l[:len(l)-1]
		return GuestBase + off, m.Bytes[off : off+uint64(n) : off+uint64(n)], nil
	}
	free := make(map[uint64]bool, len(m.pages))
	for _, p := range m.pages {
		free[p] = true
	}
	run := uint64(0)
	for off := uint64(len(m.Bytes)); off > 0; {
		off -= pageSize
		if run += pageSize; !free[off] {
			run = 0
		}
		if run == want {
			m.take(off, want)
			return GuestBase + off, m.Bytes[off : off+uint64(n) : off+uint64(n)], nil
		}
	}
	return 0, nil, errors.New("out of adjacent guest memory")
}

// freeContiguous returns what contiguous gave, for another of the same size.
func (m *Memory) freeContiguous(gpa uint64, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	want := (n + pageSize - 1) &^ (pageSize - 1)
	m.runs[want] = append(m.runs[want], gpa-GuestBase)
}

func (m *Memory) take(off, n uint64) {
	kept := m.pages[:0]
	for _, p := range m.pages {
		if p < off || p >= off+n {
			kept = append(kept, p)
		}
	}
	m.pages = kept
}

// AddRegion sends ADD_MEM_REG.
func (c *Client) AddRegion(r Region) error {
	return c.wire.send(msgAddMemReg, u64(0, r.GPA, r.Size, r.User, r.Offset), c.mem.fd)
}

// RemoveRegion sends REM_MEM_REG.
func (c *Client) RemoveRegion(r Region) error {
	return c.wire.send(msgRemMemReg, u64(0, r.GPA, r.Size, r.User, r.Offset))
}

// SetMemTable sends SET_MEM_TABLE.
func (c *Client) SetMemTable(regions ...Region) error {
	p := u32(uint32(len(regions)), 0)
	var fds []int
	for _, r := range regions {
		p = append(p, u64(r.GPA, r.Size, r.User, r.Offset)...)
		fds = append(fds, c.mem.fd)
	}
	return c.wire.send(msgSetMemTable, p, fds...)
}
