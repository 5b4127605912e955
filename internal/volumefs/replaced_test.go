package volumefs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestReplacedFilesAreClosed: of files whose close takes long a few are kept for a
// moment, and none for long, whatever follows.
func TestReplacedFilesAreClosed(t *testing.T) {
	for _, size := range []int{100, 300 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			v := newVolume(t, Options{CloseLater: true})
			data := make([]byte, size)
			overwrite := func(times int) {
				for range times {
					noErr(t, v.Write(ctx, "f", data, WriteOptions{}))
					if n := replacedOpen(t, v.dir); n > 2*closeAtOnce || (n-2)*size > 2*smallFile {
						t.Fatalf("%d replaced files are open", n)
					}
				}
			}
			overwrite(5 * closeAtOnce)
			noErr(t, v.Write(ctx, "other", nil, WriteOptions{}))
			for end := time.Now().Add(10 * time.Second); replacedOpen(t, v.dir) > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d replaced files stay open", replacedOpen(t, v.dir))
				}
			}
			before := v.replaced.closed.Load()
			overwrite(3)
			if !v.replaced.freed(before) || replacedOpen(t, v.dir) > 0 {
				t.Errorf("%d replaced files are open after freed", replacedOpen(t, v.dir))
			}
			if v.replaced.freed(v.replaced.closed.Load()) {
				t.Error("freed what was freed")
			}
		})
	}
}

// replacedOpen counts this process's open files that were deleted from a directory.
func replacedOpen(t *testing.T, dir string) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	noErr(t, err)
	n := 0
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, dir) && strings.HasSuffix(to, " (deleted)") {
			n++
		}
	}
	return n
}
