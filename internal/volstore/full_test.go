package volstore

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

func TestReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	h := home.Dir(t.TempDir())
	v := mustCreate(t, New(h), Spec{Name: "a"})
	storetest.MakeReadonly(t, string(h))
	s := New(h)
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
	d, err := s.OpenData(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Alive(); err != nil {
		t.Error(err)
	}
	var e *errdefs.Error
	for name, err := range map[string]error{"create": second(s.Create(t.Context(), Spec{Name: "b"})), "remove": s.Remove(t.Context(), "a")} {
		if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
}

// TestFullDisk: at 0 bytes free everything can be listed and removed, and what
// cannot be made leaves nothing behind.
func TestFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	dir := storetest.Tmpfs(t, "12m")
	h := home.Dir(filepath.Join(dir, "home"))
	s := New(h)
	for i := range 20 {
		mustCreate(t, s, Spec{Name: fmt.Sprint("v", i)})
	}
	free := storetest.Fill(t, dir)
	for _, sp := range []Spec{{Name: "new"}, {Name: "disk", Kind: KindDisk, SizeMiB: 64}} {
		_, err := s.Create(t.Context(), sp)
		var e *errdefs.Error
		if !errors.As(err, &e) || e.Kind != errdefs.IO {
			t.Errorf("create %s on a full disk: %v", sp.Name, err)
		}
		if exists(h.Volume(sp.Name)) {
			t.Errorf("%s is left", sp.Name)
		}
	}
	if left, _ := listNames(h.Staging()); len(left) != 0 {
		t.Errorf("staging is left: %v", left)
	}
	for i := range 20 {
		if all, err := New(h).List(t.Context(), Filter{}); err != nil || len(all) != 20-i {
			t.Fatalf("list on a full disk: %d, %v", len(all), err)
		}
		if err := New(h).Remove(t.Context(), fmt.Sprint("v", i)); err != nil {
			t.Fatalf("remove on a full disk: %v", err)
		}
	}
	free()
	mustCreate(t, s, Spec{Name: "new"})
	checkHome(t, s)
}
