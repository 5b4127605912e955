package records

import (
	"errors"
	"os"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestNoDatabase: a file that is no database is left as it is, and there is a
// way out.
func TestNoDatabase(t *testing.T) {
	h := home.Dir(t.TempDir())
	const text = "this is no database, and it is longer than a header\n"
	if err := os.WriteFile(h.DB(), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() (*DB, error){
		"writer": func() (*DB, error) { return Open(t.Context(), h) },
		"reader": func() (*DB, error) { return OpenReader(t.Context(), h) },
	} {
		_, err := open()
		var e *errdefs.Error
		if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b, err := os.ReadFile(h.DB()); err != nil || string(b) != text {
		t.Errorf("%q %v", b, err)
	}
}
