package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// foreign makes a directory with a tree that no volume may touch, and returns what
// demands that it is as it was.
func foreign(t *testing.T) (dir string, untouched func()) {
	t.Helper()
	dir = t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/sub", 0o755), os.WriteFile(dir+"/sub/precious", []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		t.Helper()
		if got, err := os.ReadFile(dir + "/sub/precious"); err != nil || string(got) != "x" {
			t.Fatalf("what is mounted was touched: %q, %v", got, err)
		}
	}
}

// bindMount mounts from at to, which it makes, until the test ends or undo is called.
func bindMount(t *testing.T, from, to string) (undo func()) {
	t.Helper()
	err := errors.Join(os.MkdirAll(to, 0o755), unix.Mount(from, to, "", unix.MS_BIND, ""))
	if err != nil {
		t.Fatal(err)
	}
	undo = func() { _ = unix.Unmount(to, 0) }
	t.Cleanup(undo)
	return undo
}

// refusedForMount demands the error of noMounts.
func refusedForMount(t *testing.T, what string, err error, point string) {
	t.Helper()
	var e *errdefs.Error
	if !errors.As(err, &e) || e.Kind != errdefs.InvalidConfig || e.Hint == "" || !strings.Contains(err.Error(), point) {
		t.Errorf("%s: %v", what, err)
	}
}

// TestMountedBelow: a volume with a mount in it is neither removed nor renamed, and
// no removal of a tree reaches what is mounted.
func TestMountedBelow(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "m"})
	dir, untouched := foreign(t)
	point := filepath.Join(v.Path, "a b", "mnt")
	undo := bindMount(t, dir, point)
	refusedForMount(t, "remove", s.Remove(t.Context(), "m"), point)
	refusedForMount(t, "rename", second(s.Rename(t.Context(), "m", "n")), point)
	out, err := s.Prune(t.Context(), PruneFilter{})
	if _, there := s.Get(t.Context(), "m"); there != nil {
		t.Errorf("pruned: %+v, %v", out, err)
	}
	untouched()
	if err := removeTree(v.Path); err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("removal of the tree: %v", err)
	}
	untouched()
	undo()
	if err := s.Remove(t.Context(), "m"); err != nil {
		t.Error(err)
	}
	untouched()

	file := mustCreate(t, s, Spec{Name: "f"})
	at := filepath.Join(file.Path, "file")
	if err := errors.Join(touch(at), unix.Mount(dir+"/sub/precious", at, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	_ = s.Remove(t.Context(), "f")
	untouched()
	trash := filepath.Join(h.Trash(), file.ID, dataName, "file")
	if err := unix.Unmount(trash, 0); err != nil {
		t.Errorf("a file that is mounted over is deleted: %v", err)
	}
	if _, err := s.Repair(t.Context()); err != nil || exists(trash) {
		t.Errorf("later: %v", err)
	}
	untouched()
}

// TestMountedOver: a file system that is mounted on a volume's directory is not the
// volume's, and is not adopted as one.
func TestMountedOver(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "m"})
	marked := filepath.Join(v.Path, marker)
	if err := touch(marked); err != nil {
		t.Fatal(err)
	}
	dir, untouched := foreign(t)
	undo := bindMount(t, dir, v.Path)
	refusedForMount(t, "remove", s.Remove(t.Context(), "m"), v.Path)
	refusedForMount(t, "rename", second(s.Rename(t.Context(), "m", "n")), v.Path)
	undo()
	if got, err := s.Rename(t.Context(), "m", "n"); err != nil || !exists(filepath.Join(got.Path, marker)) {
		t.Errorf("then: %+v, %v", got, err)
	}
	defer bindMount(t, dir, h.Volume("own"))()
	refusedForMount(t, "adopt", second(s.Adopt(t.Context(), "own", AdoptOptions{})), h.Volume("own"))
	untouched()
}

// listed demands the volumes that there are, and that nothing is unfinished.
func listed(t *testing.T, s *Store, want ...string) {
	t.Helper()
	all, err := s.List(context.Background(), Filter{})
	var names []string
	for _, v := range all {
		names = append(names, v.Name)
		if !exists(filepath.Join(v.Path, marker)) {
			t.Errorf("%s has lost its file", v.Name)
		}
	}
	slices.Sort(names)
	found, checked := s.Check(context.Background())
	if err != nil || checked != nil || !slices.Equal(names, want) || len(found) > 0 {
		t.Errorf("%q, want %q; %+v; %v, %v", names, want, found, err, checked)
	}
}

// TestImmovable: what cannot be moved is there after a failed removal or rename, by
// its name and whole, and when the obstacle is gone both work.
func TestImmovable(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	prereq.Root(t, "mount ext4")
	dir := storetest.Ext4(t, "-m", "0")
	h := home.Dir(filepath.Join(dir, "home"))
	s := New(h)
	t.Cleanup(func() { s.Close() })
	ids := map[string]string{}
	for _, name := range []string{"a", "b"} {
		v := mustCreate(t, s, Spec{Name: name})
		ids[name] = v.ID
		if err := touch(filepath.Join(v.Path, marker)); err != nil {
			t.Fatal(err)
		}
		setImmutable(t, v.Path, true)
	}
	for range 2 { // also after a first failure
		for what, err := range map[string]error{"remove": s.Remove(t.Context(), "a"), "rename": second(s.Rename(t.Context(), "b", "c"))} {
			var e *errdefs.Error
			if !errors.As(err, &e) || e.Hint == "" || strings.Contains(e.Hint, "MSB_HOME") {
				t.Errorf("%s: %v", what, err)
			}
		}
		listed(t, s, "a", "b")
	}
	d, err := s.OpenData(t.Context(), ids["a"])
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Alive(); err != nil {
		t.Errorf("after a failed removal: %v", err)
	}
	_ = d.Close()
	mustCreate(t, s, Spec{Name: "other"})
	if err := s.Remove(t.Context(), "other"); err != nil {
		t.Error(err)
	}
	setImmutable(t, h.Volume("a"), false)
	setImmutable(t, h.Volume("b"), false)
	if err := errors.Join(s.Remove(t.Context(), "a"), second(s.Rename(t.Context(), "b", "c"))); err != nil {
		t.Error(err)
	}
	listed(t, s, "c")
}

// setImmutable is chattr +i or -i of a directory.
func setImmutable(t *testing.T, path string, on bool) {
	t.Helper()
	d, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	flags := 0
	if on {
		flags = unix.STATX_ATTR_IMMUTABLE // FS_IMMUTABLE_FL
	}
	if err := unix.IoctlSetPointerInt(int(d.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Fatal(err)
	}
	if on {
		t.Cleanup(func() {
			if exists(path) {
				setImmutable(t, path, false)
			}
		})
	}
}

// TestOfAnotherUser: an ordinary user removes a volume whose directory a guest has
// made unwritable, and keeps one whose directory has become another user's.
func TestOfAnotherUser(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	smallHomes(t, func(t *testing.T, h smallHome) {
		if h.uid != somebody {
			return // root moves everything, and a tmpfs of somebody else is tested as well
		}
		h.must(t, "create a")
		h.must(t, "create b")
		if err := errors.Join(os.Chmod(h.Volume("a"), 0), os.Chown(h.Volume("b"), 0, 0)); err != nil {
			t.Fatal(err)
		}
		h.must(t, "remove a")
		h.must(t, "create a")
		if out, err := h.run("remove b"); err == nil || !strings.Contains(out, "cannot be moved") {
			t.Errorf("remove b: %v, %s", err, out)
		}
		if names := strings.Fields(h.must(t, "ls-names")); !slices.Equal(names, []string{"a", "b"}) {
			t.Errorf("volumes %q", names)
		}
		h.must(t, "rename b c")
		if err := os.Chown(h.Volume("c"), h.uid, h.uid); err != nil {
			t.Fatal(err)
		}
		h.must(t, "remove c")
		if err := os.Mkdir(h.Volume("root"), 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := h.run("adopt root"); err == nil || !strings.Contains(out, "belongs to user 0") {
			t.Errorf("adopt: %v, %s", err, out)
		}
		if err := os.Remove(h.Volume("root")); err != nil {
			t.Error(err)
		}
		h.must(t, "check")
	})
}

// TestRenameOnAFullDisk: new names for which volumes/ has to grow do not fit; what
// was refused has its old name.
func TestRenameOnAFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	prereq.Root(t, "mount ext4")
	dir := storetest.Ext4(t, "-m", "0")
	h := smallHome{home.Dir(filepath.Join(dir, "home")), dir, os.Getuid()}
	h.must(t, "seed 8")
	h.leave(t, 0)
	refused := 0
	for i := range 8 {
		old, long := fmt.Sprint("v", i), fmt.Sprint("v", i)+strings.Repeat("L", 120)
		out, err := h.run("rename " + old + " " + long)
		names := strings.Fields(h.must(t, "ls-names"))
		if want := map[bool]string{true: long, false: old}[err == nil]; !slices.Contains(names, want) {
			t.Errorf("rename %s: %v, %s; then %q", old, err, out, names)
		}
		if err != nil {
			refused++
			if !strings.Contains(out, "no space left on device") {
				t.Errorf("%s", out)
			}
		}
		h.must(t, "check")
	}
	t.Logf("%d of 8 refused", refused)
	if refused == 0 {
		t.Error("all fit: nothing was shown")
	}
}
