package volstore

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestHomeIsDescribed: every file that the store makes, a killed creation and a
// removal in progress included, is in docs/on-disk.md, and the other way round.
// Nobody but the owner may look into a home.
func TestHomeIsDescribed(t *testing.T) {
	needMkfs(t)
	h := home.Dir(filepath.Join(t.TempDir(), "home"))
	s := New(h)
	defer s.Close()
	s.SetReaper(func(home.Dir) (func(), error) { return func() {}, nil })
	mustCreate(t, s, Spec{Name: "dir", Inodes: 5000})
	mustCreate(t, s, Spec{Name: "disk", Kind: KindDisk, SizeMiB: 4})
	if _, err := s.Rename(t.Context(), "dir", "renamed"); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Attach(t.Context(), "renamed", Shared, Holder{}); err != nil || a.Close() != nil {
		t.Fatal(err)
	}
	large := mustCreate(t, s, Spec{Name: "large"})
	for i := range 2 * reapAtOnce {
		if err := os.WriteFile(filepath.Join(large.Path, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Remove(t.Context(), "large"); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Attach(t.Context(), "disk", Exclusive, Holder{Readonly: true}); err != nil || a.Close() != nil {
		t.Fatal(err)
	}
	for op, point := range map[string]string{"create killed": "volstore.create.made=kill", "grow disk": "volstore.grow.lengthened=kill"} {
		if err := child(h, op, point).Run(); err == nil {
			t.Fatal("not killed")
		}
	}
	bound, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer bound.Close()
	if f, err := s.OpenBindLedger(t.Context(), bound, 1); err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	for row, n := range storetest.Described(t, string(h)) {
		if n == 0 && (strings.HasPrefix(row, "volumes/") || strings.HasPrefix(row, "msb.db") || strings.HasPrefix(row, "binds/")) {
			t.Errorf("docs/on-disk.md describes %s, which is not there", row)
		}
	}
	if fi, err := os.Stat(string(h)); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the home: %v, %v", fi, err)
	}
}
