package volstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestPipesInTheState: nobody waits for a pipe, nor follows a link, in the place
// of a file beside a volume. What is known from the record is made anew, the
// other errors name it and the way out.
func TestPipesInTheState(t *testing.T) {
	s, h := newStore(t)
	put := map[string]func(path string) error{
		"pipe": func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link": func(path string) error { return os.Symlink("/dev/null", path) },
	}
	for what, put := range put {
		for i, name := range []string{attachName, noteName, "lock"} {
			v := mustCreate(t, s, Spec{Name: fmt.Sprintf("%s%d", what, i)})
			path := filepath.Join(h.State(v.ID), name)
			if name == "lock" {
				path = filepath.Join(h.NameLocks(), fmt.Sprintf("%02x", slotOf(v.Name)))
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if err := put(path); err != nil {
				t.Fatal(err)
			}
			within(t, time.Minute, func() {
				for _, op := range []struct {
					name  string
					run   func() error
					wrong bool
				}{
					{"rename", func() error { _, err := s.Rename(t.Context(), v.Name, v.Name+"b"); return err }, name != noteName},
					{"holders", func() error { _, err := s.Holders(t.Context(), v.ID); return err }, name == attachName},
					{"attach", func() error {
						a, err := s.AttachID(t.Context(), v.ID, Shared, Holder{PID: os.Getpid()})
						if err == nil {
							err = a.Close()
						}
						return err
					}, name != noteName},
				} {
					if err := op.run(); op.wrong != clearlyIrregular(err, path) || !op.wrong && err != nil {
						t.Errorf("%s as a %s: %s: %v", path, what, op.name, err)
					}
				}
			})
			if name != noteName {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

func clearlyIrregular(err error, path string) bool {
	var e *errdefs.Error
	return errors.Is(err, home.ErrNotRegular) && strings.Contains(err.Error(), path) && errors.As(err, &e) && e.Hint != ""
}
