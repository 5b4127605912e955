package volstore

import (
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUnlockFreesCopies: a child that is being started has copies of all
// descriptors until its exec; a lock given up must not stay with them.
func TestUnlockFreesCopies(t *testing.T) {
	f, err := lockDir(t.TempDir())
	if err != nil || f == nil {
		t.Fatal(f, err)
	}
	path := f.Name()
	dup, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	heir := os.NewFile(uintptr(dup), path)
	defer heir.Close()
	unlock(f)
	again, err := openDir(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if ok, err := tryFlock(again, unix.LOCK_EX); !ok || err != nil {
		t.Errorf("still locked: %v, %v", ok, err)
	}
}
