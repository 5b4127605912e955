package volumefs

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// variants are the ways an FS can work; every behaviour is tested on all.
var variants = map[string]Options{
	"openat2": {},
	"walk":    {Resolver: Walk, NoUnnamedSync: true},
	"old":     {Resolver: Walk, NoUnnamed: true, NoXattrAt: true},
}

// bench is a volume in a directory with something outside to be hurt.
type volume struct {
	*FS
	t       testing.TB
	dir     string // the volume
	outside string
}

var ctx = context.Background()

// newVolume makes dir/vol and dir/outside, and checks at the end that nothing
// happened outside, that no temporary was left and no descriptor stays open.
func newVolume(t testing.TB, o Options) *volume {
	t.Helper()
	return newVolumeIn(t, t.TempDir(), o)
}

// memoryDir is a directory where syncing costs nothing, for tests that make
// very many calls; an ordinary one where there is none with user attributes.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("MSB_TEST_MEMORY"), "/dev/shm"), "volumefs-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if unix.Setxattr(dir, "user.msb._probe", []byte{1}, 0) != nil {
		return t.TempDir()
	}
	return dir
}

func newVolumeIn(t testing.TB, base string, o Options) *volume {
	t.Helper()
	v := &volume{t: t, dir: filepath.Join(base, "vol"), outside: filepath.Join(base, "outside")}
	v.mkdir(v.dir)
	v.mkdir(filepath.Join(v.outside, "dir"))
	v.put(filepath.Join(v.outside, "secret"), "secret")
	v.put(filepath.Join(v.outside, "only-outside"), "")
	root, err := os.OpenFile(v.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if o.Volume == "" {
		o.Volume = "v"
	}
	before := openDescriptors(t)
	if v.FS, err = New(root, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.FS.Close(); err != nil {
			t.Error(err)
		}
		if after := openDescriptors(t); after != before {
			t.Errorf("%d descriptors open, %d before", after, before)
		}
		root.Close()
		v.checkOutside()
		v.checkLitter()
	})
	return v
}

// eachVariant runs a test on every variant.
func eachVariant(t *testing.T, test func(t *testing.T, v *volume)) {
	for name, o := range variants {
		t.Run(name, func(t *testing.T) { test(t, newVolume(t, o)) })
	}
}

func openDescriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func (v *volume) path(rel string) string { return filepath.Join(v.dir, rel) }

func (v *volume) mkdir(path string) {
	v.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		v.t.Fatal(err)
	}
}

// put makes a file by an absolute host path or one in the volume.
func (v *volume) put(path, content string) {
	v.t.Helper()
	if !filepath.IsAbs(path) {
		path = v.path(path)
	}
	v.mkdir(filepath.Dir(path))
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		v.t.Fatal(err)
	}
}

func (v *volume) link(target, rel string) {
	v.t.Helper()
	v.mkdir(filepath.Dir(v.path(rel)))
	if err := os.Symlink(target, v.path(rel)); err != nil {
		v.t.Fatal(err)
	}
}

// standin makes what the file server makes for a guest under "strict".
func (v *volume) standin(rel string, mode uint32, content string) {
	v.t.Helper()
	v.put(rel, content)
	ov := overlay{set: true, uid: 1000, gid: 1001, mode: mode}
	if err := os.Chmod(v.path(rel), 0o600); err != nil {
		v.t.Fatal(err)
	}
	if err := unix.Setxattr(v.path(rel), overlayXattr, ov.encode(), 0); err != nil {
		v.t.Fatal(err)
	}
}

func (v *volume) content(rel string) string {
	v.t.Helper()
	b, err := os.ReadFile(v.path(rel))
	if err != nil {
		v.t.Fatal(err)
	}
	return string(b)
}

// tree lists everything in the volume, sorted, links as "name -> target".
func (v *volume) tree() []string { return listTree(v.t, v.dir) }

func listTree(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		if d.Type()&fs.ModeSymlink != 0 {
			target, _ := os.Readlink(p)
			rel += " -> " + target
		}
		out = append(out, rel)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(out)
	return out
}

func (v *volume) checkOutside() {
	v.t.Helper()
	if got := strings.Join(listTree(v.t, v.outside), " "); got != "dir only-outside secret" {
		v.t.Errorf("outside was touched: %s", got)
	}
	if b, err := os.ReadFile(filepath.Join(v.outside, "secret")); err != nil || string(b) != "secret" {
		v.t.Errorf("outside was touched: secret is %q, %v", b, err)
	}
	beside, err := os.ReadDir(filepath.Dir(v.dir))
	if err != nil || len(beside) != 2 {
		v.t.Errorf("something was made beside the volume: %v, %v", beside, err)
	}
}

func (v *volume) checkLitter() {
	v.t.Helper()
	for _, p := range v.tree() {
		if isTempName(filepath.Base(p)) {
			v.t.Errorf("temporary left: %s", p)
		}
	}
}

// wantErr checks an error's cause, kind and that it says what it is about.
func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
		return
	}
	var e *errdefs.Error
	if !errors.As(err, &e) || e.Kind != errdefs.Filesystem || e.Op == "" || e.Volume == "" {
		t.Errorf("error %#v is not a full Filesystem error", err)
	}
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
