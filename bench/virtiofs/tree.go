package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// Sizes of the tree that is served.
const (
	bigSize   = 512 << 20
	dirFiles  = 10_000
	knownName = 64
)

// makeTree fills dir with what the rows need, once. The page cache is warm
// afterwards.
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

// bigFile writes the file, or reads the one of an earlier run into the cache.
func bigFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() == bigSize {
		_, err := io.Copy(io.Discard, f)
		return err
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
