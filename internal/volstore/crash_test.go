package volstore

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// scenario is one operation on a home prepared for it.
type scenario struct {
	name  string
	disk  bool // needs mkfs.ext4
	setup func(t testing.TB, s *Store, h home.Dir)
	op    string
	// stranger tells that volumes/a is a stranger's until it is adopted.
	stranger bool
}

// marker is the file by which the data of volume "a" is known again.
const marker = "marker"

func scenarios() []scenario {
	made := func(t testing.TB, s *Store, h home.Dir) {
		v := mustCreate(t, s, Spec{Name: "a", Labels: map[string]string{"k": "v"}})
		writeMarker(t, v.Path)
	}
	madeDisk := func(t testing.TB, s *Store, h home.Dir) {
		v := mustCreate(t, s, Spec{Name: "a", Kind: KindDisk, SizeMiB: 4})
		writeMarker(t, v.Path)
	}
	killed := func(before func(testing.TB, *Store, home.Dir), op, point string) func(testing.TB, *Store, home.Dir) {
		return func(t testing.TB, s *Store, h home.Dir) {
			if before != nil {
				before(t, s, h)
			}
			if out, err := child(h, op, point+"=kill").CombinedOutput(); err == nil || err.Error() != "signal: killed" {
				t.Fatalf("setup %s: %v\n%s", op, err, out)
			}
		}
	}
	return []scenario{
		{name: "create", op: "create a"},
		{name: "create disk", disk: true, op: "create-disk a"},
		{name: "remove", setup: made, op: "remove a"},
		{name: "rename", setup: made, op: "rename a b"},
		{name: "label", setup: made, op: "label a"},
		{name: "grow", disk: true, setup: madeDisk, op: "grow a"},
		{name: "adopt", stranger: true, op: "adopt a", setup: func(t testing.TB, s *Store, h home.Dir) {
			if err := os.Mkdir(h.Volume("a"), 0o700); err != nil {
				t.Fatal(err)
			}
			writeMarker(t, h.Volume("a"))
		}},
		{name: "create after a killed create", setup: killed(nil, "create a", "volstore.create.renamed"), op: "create a"},
		{name: "remove after a killed create", setup: killed(nil, "create a", "volstore.create.renamed"), op: "remove a"},
		{name: "create after a killed remove", setup: killed(made, "remove a", "volstore.remove.recorded"), op: "create a"},
		{name: "remove after a killed rename", setup: killed(made, "rename a b", "volstore.rename.recorded"), op: "remove b"},
		{name: "create after a killed rename", setup: killed(made, "rename a b", "volstore.rename.moved"), op: "create a"},
	}
}

func writeMarker(t testing.TB, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, marker), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// prepared returns a home with one bystander volume and what the scenario needs.
func (sc scenario) prepared(t testing.TB) home.Dir {
	t.Helper()
	h := home.Dir(filepath.Join(storetest.Memory(t), "home"))
	s := New(h)
	writeMarker(t, mustCreate(t, s, Spec{Name: "bystander"}).Path)
	if sc.setup != nil {
		sc.setup(t, s, h)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return h
}

// TestKilledAtEveryPoint kills each operation at each declared point of this
// package that it reaches, and demands that the next commands find the home as
// if nothing, or everything, had happened. A point that nothing reaches fails
// the test. An injected error instead of the kill must do no more harm.
func TestKilledAtEveryPoint(t *testing.T) {
	reached := map[string]bool{}
	points := []string{"records.begun"}
	for _, p := range failpoint.Names() {
		if strings.HasPrefix(p, "volstore.") {
			points = append(points, p)
		}
	}
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			if sc.disk {
				needMkfs(t)
			}
			for _, point := range points {
				if !killAt(t, sc, point, aftermaths[0]) {
					continue
				}
				reached[point] = true
				for _, after := range aftermaths[1:] {
					killAt(t, sc, point, after)
				}
				failAt(t, sc, point)
			}
		})
	}
	for _, p := range points {
		if !reached[p] {
			t.Errorf("no operation reaches %s", p)
		}
	}
}

// killAt runs the scenario's operation with a kill at a point and then the
// aftermath; it reports whether the point was reached.
func killAt(t testing.TB, sc scenario, point string, after aftermath) (hit bool) {
	t.Helper()
	h := sc.prepared(t)
	if err := child(h, sc.op, point+"=kill").Run(); err == nil || err.Error() != "signal: killed" {
		return false
	}
	after.check(t, sc, h, sc.op+", killed at "+point)
	return true
}

func failAt(t testing.TB, sc scenario, point string) {
	t.Helper()
	h := sc.prepared(t)
	_ = child(h, sc.op, point+"=error").Run()
	aftermaths[0].check(t, sc, h, sc.op+", error at "+point)
}

// aftermath is what comes after a kill, without any help: what runs first, and
// whether a stranger's directory appears at the free names before it.
type aftermath struct {
	first     func(ctx context.Context, s *Store) error
	strangers bool
}

var aftermaths = []aftermath{
	{first: func(ctx context.Context, s *Store) error { _, err := s.Create(ctx, Spec{Name: "next"}); return err }},
	{first: func(ctx context.Context, s *Store) error { return ignore(s.Remove(ctx, "a"), errdefs.VolumeNotFound) }},
	{first: func(ctx context.Context, s *Store) error {
		_, err := s.Create(ctx, Spec{Name: "a"})
		return ignore(err, errdefs.VolumeAlreadyExists)
	}},
	{strangers: true, first: func(ctx context.Context, s *Store) error {
		_, err := s.Create(ctx, Spec{Name: "a"})
		return ignore(err, errdefs.VolumeAlreadyExists)
	}},
}

func ignore(err error, kind errdefs.Kind) error {
	if errdefs.Is(err, kind) {
		return nil
	}
	return err
}

func (a aftermath) check(t testing.TB, sc scenario, h home.Dir, what string) {
	t.Helper()
	ctx := context.Background()
	s := New(h)
	defer s.Close()
	if _, err := s.List(ctx, Filter{}); err != nil {
		t.Errorf("%s: list: %v", what, err)
	}
	var strangers []string
	if a.strangers {
		strangers = placeStrangers(t, h)
	}
	if err := a.first(ctx, s); err != nil {
		t.Errorf("%s: first command: %v", what, err)
	}
	agree(t, sc, s, h, what, strangers)
	for _, name := range []string{"a", "b"} {
		reuse(t, s, h, name, what)
	}
	agree(t, scenario{}, s, h, what+", in the end", strangers)
}

// placeStrangers puts a directory at each free name that the operations use.
func placeStrangers(t testing.TB, h home.Dir) (names []string) {
	t.Helper()
	for _, name := range []string{"a", "b"} {
		if os.Mkdir(h.Volume(name), 0o755) == nil {
			names = append(names, name)
			if err := os.WriteFile(filepath.Join(h.Volume(name), "foreign"), []byte("y"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return names
}

// agree demands that records and directories fit and nothing is left over.
func agree(t testing.TB, sc scenario, s *Store, h home.Dir, what string, strangers []string) {
	t.Helper()
	found, err := s.Check(context.Background())
	if err != nil {
		t.Errorf("%s: check: %v", what, err)
	}
	foreign := map[string]bool{"a": sc.stranger}
	for _, name := range strangers {
		foreign[name] = true
		if b, err := os.ReadFile(filepath.Join(h.Volume(name), "foreign")); string(b) != "y" {
			t.Errorf("%s: the stranger at %s was touched: %v", what, name, err)
		}
	}
	for _, f := range found {
		switch {
		case f.Kind == FoundStranger && foreign[f.Name]:
		case (f.Kind == FoundForeign || f.Kind == FoundMove) && foreign[f.Name]:
			// The stranger took the name of a volume that was being moved there.
		default:
			t.Errorf("%s: %+v", what, f)
		}
	}
	all, err := s.List(context.Background(), Filter{})
	if err != nil {
		t.Errorf("%s: list: %v", what, err)
	}
	bystander := false
	for _, v := range all {
		bystander = bystander || v.Name == "bystander"
		checkVolume(t, s, v, what)
	}
	if !bystander {
		t.Errorf("%s: the bystander is gone", what)
	}
}

func checkVolume(t testing.TB, s *Store, v *Volume, what string) {
	t.Helper()
	if n, err := readNote(filepath.Join(s.home.State(v.ID), noteName)); err == nil && (n.Name != v.Name || len(n.Labels) != len(v.Labels)) && v.MovingFrom == "" {
		// Stale only until the next command with this name.
		if _, err := s.SetLabels(context.Background(), v.ID, v.Labels); err != nil {
			t.Errorf("%s: label %s: %v", what, v.Name, err)
		}
	}
	d, err := s.OpenData(context.Background(), v.ID)
	if err != nil {
		t.Errorf("%s: open %s: %v", what, v.Name, err)
		return
	}
	defer d.Close()
	if err := d.Alive(); err != nil {
		t.Errorf("%s: %s: %v", what, v.Name, err)
	}
	if v.Name == "bystander" && !exists(filepath.Join(v.Path, marker)) {
		t.Errorf("%s: the bystander lost its file", what)
	}
	if v.Kind == KindDisk {
		if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", v.DiskPath).CombinedOutput(); err != nil && exists("/usr/sbin/e2fsck") {
			t.Errorf("%s: e2fsck of %s: %v\n%s", what, v.Name, err, out)
		}
	}
}

// reuse removes what has the name and uses the name once more.
func reuse(t testing.TB, s *Store, h home.Dir, name, what string) {
	t.Helper()
	ctx := context.Background()
	if exists(filepath.Join(h.Volume(name), "foreign")) {
		return
	}
	if err := s.Remove(ctx, name); ignore(err, errdefs.VolumeNotFound) != nil {
		t.Errorf("%s: remove %s: %v", what, name, err)
	}
	if _, err := s.Get(ctx, name); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("%s: get %s after remove: %v", what, name, err)
	}
	if exists(filepath.Join(h.Volume(name), marker)) { // a stranger that was not adopted
		if err := os.RemoveAll(h.Volume(name)); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Create(ctx, Spec{Name: name}); err != nil {
		t.Errorf("%s: create %s again: %v", what, name, err)
	}
	if err := s.Remove(ctx, name); err != nil {
		t.Errorf("%s: remove %s again: %v", what, name, err)
	}
}
