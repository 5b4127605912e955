package records

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestPipesInPlaceOfRecords: nobody waits for a pipe where the database or its
// journal belongs, and the error names it; also when it comes to lie there later.
func TestPipesInPlaceOfRecords(t *testing.T) {
	for _, suffix := range []string{"", "-journal"} {
		for _, empty := range []bool{true, false} {
			h := home.Dir(t.TempDir())
			path := h.DB() + suffix
			var open *DB
			if !empty {
				var err error
				if open, err = Open(t.Context(), h); err != nil {
					t.Fatal(err)
				}
				defer open.Close()
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
			for name, use := range map[string]func() error{
				"writer": func() error { return closed(Open(t.Context(), h)) },
				"reader": func() error {
					d, err := OpenReader(t.Context(), h)
					if d != nil && empty && suffix != "" {
						return errors.Join(d.Close(), errors.New("there is no database: "+path)) // nothing to read
					}
					return closed(d, err)
				},
				"open": func() error {
					if open == nil || suffix == "" {
						return errors.New("there is none: " + path)
					}
					return open.InsertVolume(t.Context(), &Volume{ID: "1", Name: "v", Kind: "dir"})
				},
			} {
				done := make(chan error, 1)
				go func() { done <- use() }()
				select {
				case err := <-done:
					var e *errdefs.Error
					if err == nil || !strings.Contains(err.Error(), path) || errors.As(err, &e) && e.Hint == "" {
						t.Errorf("%s, %q, empty home %t: %v", name, suffix, empty, err)
					}
				case <-time.After(time.Minute):
					t.Fatalf("%s, %q, empty home %t: waits", name, suffix, empty)
				}
			}
		}
	}
}

func closed(d *DB, err error) error {
	if d != nil {
		err = errors.Join(err, d.Close())
	}
	return err
}

// TestHomeIsNoDirectory: the error is about the home.
func TestHomeIsNoDirectory(t *testing.T) {
	path := t.TempDir() + "/file"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, open := range []func() (*DB, error){
		func() (*DB, error) { return Open(t.Context(), home.Dir(path)) },
		func() (*DB, error) { return OpenReader(t.Context(), home.Dir(path)) },
	} {
		if err := closed(open()); err == nil || !strings.Contains(err.Error(), "the home "+path+" is no directory") {
			t.Error(err)
		}
	}
}
