package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Sizes of the tree that is served.
const (
	bigSize   = 512 << 20
	dirFiles  = 10_000
	knownName = 64
)

// makeTree fills dir with what the rows need, once.
func makeTree(dir string) error {
	if err := os.RemoveAll(filepath.Join(dir, "new")); err != nil { // of a run that was interrupted
		return err
	}
	for _, d := range []string{"known", "many", "new"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	for i := range knownName {
		if err := touch(filepath.Join(dir, "known", fmt.Sprintf("file-%03d", i))); err != nil {
			return err
		}
	}
	for i := range dirFiles {
		if err := touch(filepath.Join(dir, "many", manyName(i))); err != nil {
			return err
		}
	}
	return bigFile(filepath.Join(dir, "big"))
}

func manyName(i int) string { return fmt.Sprintf("entry-%05d.txt", i) }

func touch(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// keepWarm has the big file in the page cache until release is called, even on a
// host that takes back pages: a read of a cold one goes to a worker, and is none
// that the rows are about.
func keepWarm(tree string) (release func() error, err error) {
	f, err := os.Open(filepath.Join(tree, "big"))
	if err != nil {
		return nil, err
	}
	pages, err := unix.Mmap(int(f.Fd()), 0, bigSize, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_LOCKED)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("lock %s in memory: %w", f.Name(), err)
	}
	return func() error { return unix.Munmap(pages) }, nil
}

// bigFile writes the file if it is not there from an earlier run.
func bigFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() == bigSize {
		return nil
	}
	chunk := make([]byte, 1<<20)
	for i := range chunk {
		chunk[i] = byte(i * 7)
	}
	for off := int64(0); off < bigSize; off += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, off); err != nil {
			return err
		}
	}
	return f.Sync()
}
