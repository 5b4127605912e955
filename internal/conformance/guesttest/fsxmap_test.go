package guesttest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mapWhole maps the file as long as it is now; false if it is empty.
func (x *fsx) mapWhole() (bool, error) {
	if len(x.want) == 0 || os.Getenv(UnmappedEnv) != "" {
		return false, nil
	}
	if len(x.mapped) == len(x.want) {
		return true, nil // the old mapping also sees later writes
	}
	x.unmap()
	m, err := unix.Mmap(int(x.f.Fd()), 0, len(x.want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return false, fmt.Errorf("mmap: %w", err)
	}
	x.mapped = m
	return true, nil
}

func (x *fsx) unmap() {
	if x.mapped != nil {
		if err := unix.Munmap(x.mapped); err != nil {
			x.t.Fatal(err)
		}
		x.mapped = nil
	}
}

// store writes through a shared mapping; what read gives then must agree.
func (x *fsx) store() error {
	if ok, err := x.mapWhole(); !ok {
		return err
	}
	off, n := x.span(true)
	x.note("store %d+%d", off, n)
	b := x.random(n)
	copy(x.mapped[off:], b)
	copy(x.want[off:], b)
	if x.rng.IntN(3) == 0 {
		if err := unix.Msync(x.mapped, unix.MS_SYNC); err != nil {
			return fmt.Errorf("msync: %w", err)
		}
	}
	return x.compare(off, n)
}

// load reads through a shared mapping.
func (x *fsx) load() error {
	if ok, err := x.mapWhole(); !ok {
		return err
	}
	off, n := x.span(true)
	x.note("load %d+%d", off, n)
	return same(x.mapped[off:off+n], x.want[off:off+n], off)
}
