package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// scenario is one operation on a home prepared for it.
type scenario struct {
	name  string
	disk  bool // needs mkfs.ext4
	fresh bool // there is no template of a disk yet
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
	cut := func(t testing.TB, s *Store, h home.Dir) {
		killed(nil, "create a", "volstore.create.renamed")(t, s, h)
		loseStaging(t, h)
	}
	return []scenario{
		{name: "create", op: "create a"},
		{name: "create disk", disk: true, op: "create-disk a"},
		{name: "create first disk", disk: true, fresh: true, op: "create-disk a"},
		{name: "remove", setup: made, op: "remove a"},
		{name: "remove disk", disk: true, setup: madeDisk, op: "remove a"},
		{name: "prune", setup: made, op: "prune k v"},
		{name: "rename", setup: made, op: "rename a b"},
		{name: "label", setup: made, op: "label a"},
		{name: "limit", setup: made, op: "limit a"},
		{name: "count a volume of before", op: "count a", setup: func(t testing.TB, s *Store, h home.Dir) {
			made(t, s, h)
			if err := os.Remove(s.ledgerPath(mustID(s, "a"))); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "grow", disk: true, setup: madeDisk, op: "grow a"},
		{name: "attach", disk: true, setup: madeDisk, op: "attach a"},
		{name: "grow after a killed grow", disk: true, setup: killed(madeDisk, "grow a", "volstore.grow.lengthened"), op: "grow a"},
		{name: "attach after a killed grow", disk: true, setup: killed(madeDisk, "grow a", "volstore.grow.lengthened"), op: "attach a"},
		{name: "create after a killed grow", disk: true, setup: killed(madeDisk, "grow a", "volstore.grow.lengthened"), op: "create b"},
		{name: "adopt", stranger: true, op: "adopt a", setup: func(t testing.TB, s *Store, h home.Dir) {
			if err := os.Mkdir(h.Volume("a"), 0o700); err != nil {
				t.Fatal(err)
			}
			writeMarker(t, h.Volume("a"))
		}},
		{name: "create after a killed create", setup: killed(nil, "create a", "volstore.create.renamed"), op: "create a"},
		{name: "remove after a killed create", setup: killed(nil, "create a", "volstore.create.renamed"), op: "remove a"},
		{name: "create after a power cut", setup: cut, op: "create a"},
		{name: "remove after a power cut", setup: cut, op: "remove a"},
		{name: "create another after a power cut", setup: cut, op: "create b"},
		{name: "create after a killed remove", setup: killed(made, "remove a", "volstore.remove.recorded"), op: "create a"},
		{name: "remove after a killed rename", setup: killed(made, "rename a b", "volstore.rename.recorded"), op: "remove b"},
		{name: "create after a killed rename", setup: killed(made, "rename a b", "volstore.rename.moved"), op: "create a"},
	}
}

// loseStaging leaves a home as a power cut does after which a new volume has its
// name, and nothing else of it is on the disk but the journal of its record.
func loseStaging(t testing.TB, h home.Dir) {
	t.Helper()
	ids, err := listNames(h.Staging())
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	if err := os.RemoveAll(filepath.Join(h.Staging(), ids[0])); err != nil {
		t.Fatal(err)
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
	if sc.disk && !sc.fresh {
		placeTemplate(t, h)
	}
	if sc.setup != nil {
		sc.setup(t, s, h)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return h
}

// placeTemplate gives a home the template of a disk of 4 MiB.
func placeTemplate(t testing.TB, h home.Dir) {
	t.Helper()
	template, err := diskTemplate()
	if err == nil {
		err = os.MkdirAll(h.Templates(), 0o700)
	}
	for name, content := range template {
		err = errors.Join(err, os.WriteFile(filepath.Join(h.Templates(), name), content, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// diskTemplate makes it once.
var diskTemplate = sync.OnceValues(func() (map[string][]byte, error) {
	dir, err := os.MkdirTemp("", "template")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	opt := diskimg.FormatOptions{Templates: filepath.Join(dir, "templates")}
	if err := diskimg.FormatExt4(context.Background(), filepath.Join(dir, "image"), 4*mib, opt); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(opt.Templates)
	if err != nil || len(entries) != 1 {
		return nil, fmt.Errorf("templates %v, %w", entries, err)
	}
	content, err := os.ReadFile(filepath.Join(opt.Templates, entries[0].Name()))
	return map[string][]byte{entries[0].Name(): content}, err
})

// discard deletes a prepared home.
func discard(h home.Dir) { _ = os.RemoveAll(filepath.Dir(string(h))) }
