package supervisor

import (
	"errors"
	"os"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

func TestLockIsExclusiveAndCanBeLookedAt(t *testing.T) {
	h := home.Dir(t.TempDir())
	if err := os.MkdirAll(h.Sandbox("a"), 0o700); err != nil {
		t.Fatal(err)
	}
	check := func(want bool) {
		t.Helper()
		if got, err := Locked(h, "a"); err != nil || got != want {
			t.Fatalf("Locked = %v, %v; want %v", got, err, want)
		}
	}
	check(false)
	f, err := Lock(h, "a")
	if err != nil {
		t.Fatal(err)
	}
	check(true)
	if _, err := Lock(h, "a"); !errors.Is(err, ErrLocked) {
		t.Errorf("second Lock = %v, want ErrLocked", err)
	}
	f.Close()
	check(false)
	if got, err := Locked(h, "missing"); err != nil || got {
		t.Errorf("Locked(missing) = %v, %v", got, err)
	}
}

func TestLockOfARemovedDirectoryIsTakenAnew(t *testing.T) {
	h := home.Dir(t.TempDir())
	for range 2 {
		if err := os.MkdirAll(h.Sandbox("a"), 0o700); err != nil {
			t.Fatal(err)
		}
		f, err := Lock(h, "a")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := os.RemoveAll(h.Sandbox("a")); err != nil {
			t.Fatal(err)
		}
	}
}
