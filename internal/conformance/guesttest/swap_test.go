package guesttest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/conformance"
)

// swap DIR LAST is the guest's half of the test of two sides at work at once:
// it replaces the file "guest", as programs do, by writing another and renaming
// it, and reads the file "host" that the host replaces in the same way. It ends
// when it has written number LAST and seen the host's.
func swap(args []string) error {
	dir := args[0]
	last, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	seen := 0
	for i := 1; i <= last || seen < last; i++ {
		if i <= last {
			if err := replace(filepath.Join(dir, "guest"), conformance.Numbered(i)); err != nil {
				return err
			}
		} else {
			time.Sleep(20 * time.Millisecond) // names are cached for a second
		}
		b, err := os.ReadFile(filepath.Join(dir, "host"))
		if err != nil {
			return err
		}
		n, err := conformance.CheckNumbered(b)
		if err != nil {
			return fmt.Errorf("what the host wrote: %w", err)
		}
		if n < seen {
			return fmt.Errorf("the host's file went back from %d to %d", seen, n)
		}
		seen = n
	}
	return nil
}

func replace(path string, content []byte) error {
	if err := os.WriteFile(path+".new", content, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
