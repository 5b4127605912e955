package volumefs

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestOrderOfExt4: on ext4 with a journal a write waits until its data is written
// back, and not for the journal; without a journal, and elsewhere, it is synced. In
// every case the data is where it stays when the file has its name.
func TestOrderOfExt4(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	for name, c := range map[string]struct {
		dir   func() string
		order bool
	}{
		"journal":    {func() string { return storetest.Ext4(t) }, true},
		"no journal": {func() string { return storetest.Ext4(t, "-O", "^has_journal") }, false},
		"tmpfs":      {func() string { return storetest.Tmpfs(t, "8m") }, false},
	} {
		for way, o := range variants {
			t.Run(name+"/"+way, func(t *testing.T) {
				v := newVolumeIn(t, filepath.Join(c.dir(), way), o)
				noErr(t, v.Write(ctx, "f", []byte(strings.Repeat("old", 5000)), WriteOptions{}))
				if v.order != (c.order && v.kernel) {
					t.Errorf("keeps order: %t", v.order)
				}
				noErr(t, v.Write(ctx, "f", []byte(strings.Repeat("new", 10000)), WriteOptions{}))
				noErr(t, v.Write(ctx, "dir/durable", []byte("text"), WriteOptions{Durable: true}))
				noErr(t, v.Copy(ctx, "f", "copy", WriteOptions{}))
				w, err := v.OpenWrite(ctx, "stream", WriteOptions{})
				noErr(t, err)
				_, err = io.WriteString(w, strings.Repeat("s", 3<<20))
				noErr(t, err)
				noErr(t, w.Close())
				for _, path := range []string{"f", "dir/durable", "copy", "stream"} {
					f, err := os.Open(filepath.Join(v.dir, path))
					noErr(t, err)
					defer f.Close()
					if name != "tmpfs" && !isPlaced(t, f) {
						t.Errorf("%s has its name before its data is in its place", path)
					}
				}
			})
		}
	}
}

// isPlaced reports whether all data of a file has blocks that are written. It has
// nothing written for that.
func isPlaced(t *testing.T, f *os.File) bool {
	t.Helper()
	type extent struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
	var m struct { // struct fiemap of linux/fiemap.h
		start, length           uint64
		flags, mapped, count, _ uint32
		extents                 [16]extent
	}
	m.length, m.count = 1<<62, uint32(len(m.extents))
	const fiemap = 0xc020660b // FS_IOC_FIEMAP
	if _, _, err := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemap, uintptr(unsafe.Pointer(&m))); err != 0 {
		t.Fatal(err)
	}
	const notYet = 0x2 | 0x4 | 0x800 // FIEMAP_EXTENT_UNKNOWN, _DELALLOC, _UNWRITTEN
	for _, e := range m.extents[:m.mapped] {
		if e.flags&notYet != 0 {
			return false
		}
	}
	return m.mapped > 0
}
