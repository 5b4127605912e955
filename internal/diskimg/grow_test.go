package diskimg

import (
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// TestLengthen: an image gets longer whatever a guest has written to it; a size
// that its file system or a file cannot have is refused and changes nothing.
func TestLengthen(t *testing.T) {
	needTools(t)
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := FormatExt4(t.Context(), path, 4*mib, FormatOptions{}); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := func(want int64) {
		t.Helper()
		if fi, err := f.Stat(); err != nil || fi.Size() != want {
			t.Errorf("%d bytes, want %d, %v", fi.Size(), want, err)
		}
	}
	if err := Lengthen(f, 17<<40); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("more than inode numbers: %v", err)
	}
	size(4 * mib)
	if err := Lengthen(f, 8*mib); err != nil {
		t.Error(err)
	}
	size(8 * mib)
	garbage := make([]byte, 1024)
	for i := range int64(200) {
		_, _ = rand.Read(garbage)
		if i%2 == 0 {
			garbage[0x38], garbage[0x39] = 0x53, 0xef
		}
		if _, err := f.WriteAt(garbage, 1024); err != nil {
			t.Fatal(err)
		}
		if err := Lengthen(f, (9+i)*mib); err != nil && !errdefs.Is(err, errdefs.InvalidConfig) {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(100); err != nil {
		t.Fatal(err)
	}
	if err := Lengthen(f, mib); err != nil {
		t.Errorf("a file without a superblock: %v", err)
	}
	if err := Lengthen(f, 1<<62); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("more than a file: %v", err)
	}
	size(mib)
}
