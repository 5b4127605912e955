package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// intrusion is what somebody else does to the home at the instant of a kill.
type intrusion struct {
	name      string
	strangers bool // a stranger's directory at each free name
	replace   bool // one at each name that is taken: what was there is moved aside
}

var intrusions = []intrusion{{name: "nobody"}, {name: "stranger", strangers: true}, {name: "replaced", replace: true}}

// first is the command that comes after a kill, without any help.
type first struct {
	name string
	run  func(ctx context.Context, s *Store) error
}

var firsts = []first{
	{"create next", func(ctx context.Context, s *Store) error { _, err := s.Create(ctx, Spec{Name: "next"}); return err }},
	{"remove a", func(ctx context.Context, s *Store) error { return ignore(s.Remove(ctx, "a"), errdefs.VolumeNotFound) }},
	{"create a", func(ctx context.Context, s *Store) error {
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

// names that the operations use; aside is where a replaced directory went.
var names = []string{"a", "b"}

const aside = "aside-"

// place puts the strangers there and returns what each of them looks like.
func (in intrusion) place(t testing.TB, h home.Dir) map[string]string {
	t.Helper()
	strangers := map[string]string{}
	for _, name := range names {
		path := h.Volume(name)
		taken := exists(path)
		if taken && !in.replace || !taken && !in.strangers {
			continue
		}
		if taken {
			if err := os.Rename(path, h.Volume(aside+name)); err != nil {
				t.Fatal(err)
			}
		}
		err := errors.Join(os.Mkdir(path, 0o755), os.WriteFile(filepath.Join(path, "foreign"), []byte("y"), 0o640),
			os.Mkdir(filepath.Join(path, "sub"), 0o700), os.Symlink("foreign", filepath.Join(path, "sub", "link")))
		if err != nil {
			t.Fatal(err)
		}
		strangers[name] = portrait(t, path)
	}
	return strangers
}

// portrait describes a tree: inodes, modes, owners, times and contents.
func portrait(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		fmt.Fprintln(&b, strings.TrimPrefix(path, dir), st.Ino, fi.Mode(), st.Uid, st.Gid, st.Nlink, fi.ModTime().UnixNano())
		if fi.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			fmt.Fprintf(&b, "%q %v\n", content, err)
		}
		return nil
	})
	if err != nil {
		return err.Error()
	}
	return b.String()
}

// aftermath is the check of a home after a kill.
type aftermath struct {
	intrusion
	first
	strangers map[string]string // what place returned
}

func (a aftermath) check(t testing.TB, sc scenario, h home.Dir, what string) {
	t.Helper()
	what = fmt.Sprintf("%s, intruder %s, then %s", what, a.intrusion.name, a.first.name)
	ctx := context.Background()
	s := New(h)
	defer s.Close()
	if _, err := s.List(ctx, Filter{}); err != nil {
		t.Errorf("%s: list: %v", what, err)
	}
	if err := a.run(ctx, s); err != nil {
		t.Errorf("%s: first command: %v", what, err)
	}
	a.agree(t, sc, s, h, what)
	for _, name := range names {
		if a.strangers[name] != "" {
			a.takeOver(t, s, h, name, what)
		}
		reuse(t, s, h, name, what)
	}
	a.strangers = nil
	a.agree(t, scenario{}, s, h, what+", in the end")
}

// agree demands that records and directories fit, nothing is left over and no
// stranger was touched.
func (a aftermath) agree(t testing.TB, sc scenario, s *Store, h home.Dir, what string) {
	t.Helper()
	found, err := s.Check(context.Background())
	if err != nil {
		t.Errorf("%s: check: %v", what, err)
	}
	odd := map[string]bool{}
	for _, f := range found {
		if f.Kind == FoundForeign || f.Kind == FoundMissing {
			odd[f.Name] = true
		}
		if !a.expected(sc, f) {
			t.Errorf("%s: %+v", what, f)
		}
	}
	for name, was := range a.strangers {
		if now := portrait(t, h.Volume(name)); now != was {
			t.Errorf("%s: the stranger at %s was touched: it is\n%sand was\n%s", what, name, now, was)
		}
	}
	all, err := s.List(context.Background(), Filter{})
	if err != nil {
		t.Errorf("%s: list: %v", what, err)
	}
	bystander := false
	for _, v := range all {
		bystander = bystander || v.Name == "bystander"
		if !odd[v.Name] {
			checkVolume(t, s, v, what)
		}
	}
	if !bystander {
		t.Errorf("%s: the bystander is gone", what)
	}
}

// expected tells whether a finding is the intruder's doing and not ours.
func (a aftermath) expected(sc scenario, f Finding) bool {
	stranger := a.strangers[f.Name] != "" || sc.stranger && f.Name == "a" || a.replace && strings.HasPrefix(f.Name, aside)
	switch f.Kind {
	case FoundStranger:
		return stranger
	case FoundForeign, FoundMissing: // its directory was taken away, or another was put at the name
		return a.replace
	}
	return false
}

// takeOver demands that a stranger is reported and can be adopted as it is.
func (a aftermath) takeOver(t testing.TB, s *Store, h home.Dir, name, what string) {
	t.Helper()
	found, err := s.Check(context.Background())
	reported := false
	for _, f := range found {
		reported = reported || f.Name == name && (f.Kind == FoundStranger || f.Kind == FoundForeign)
	}
	if !reported {
		t.Errorf("%s: the stranger at %s is not reported: %+v, %v", what, name, found, err)
	}
	if _, err := s.Adopt(context.Background(), name, AdoptOptions{}); err != nil {
		t.Errorf("%s: adopt %s: %v", what, name, err)
	}
	if now := portrait(t, h.Volume(name)); now != a.strangers[name] {
		t.Errorf("%s: adopting %s changed it:\n%swas\n%s", what, name, now, a.strangers[name])
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
		checkLength(t, s, v, what)
		if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", v.DiskPath).CombinedOutput(); err != nil && exists("/usr/sbin/e2fsck") {
			t.Errorf("%s: e2fsck of %s: %v\n%s", what, v.Name, err, out)
		}
	}
}

// checkLength demands that an image has its recorded length once somebody has
// attached it, and is never shorter.
func checkLength(t testing.TB, s *Store, v *Volume, what string) {
	t.Helper()
	fi, err := os.Stat(v.DiskPath)
	if err != nil || fi.Size() < v.CapacityBytes {
		t.Errorf("%s: %s: the image is shorter than %d: %v", what, v.Name, v.CapacityBytes, err)
		return
	}
	a, err := s.AttachID(context.Background(), v.ID, Exclusive, Holder{PID: os.Getpid(), Readonly: true})
	if err != nil {
		t.Errorf("%s: attach %s: %v", what, v.Name, err)
		return
	}
	if got, err := s.GetByID(context.Background(), v.ID); err != nil || got.CapacityBytes != fi.Size() {
		t.Errorf("%s: %s: %d bytes recorded of %d, %v", what, v.Name, got.CapacityBytes, fi.Size(), err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

// reuse removes what has the name and uses the name once more.
func reuse(t testing.TB, s *Store, h home.Dir, name, what string) {
	t.Helper()
	ctx := context.Background()
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
