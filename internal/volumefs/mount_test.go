package volumefs

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestMountsAreOutside: what is mounted on a directory or a file of the volume is
// not the volume's, be it of another file system or not; nothing reads, changes or
// removes it.
func TestMountsAreOutside(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	for name, o := range variants {
		for _, kind := range []string{"bind", "tmpfs"} {
			t.Run(name+"/"+kind, func(t *testing.T) { mountsAreOutside(t, o, kind) })
		}
	}
}

func mountsAreOutside(t *testing.T, o Options, kind string) {
	v := newVolume(t, o)
	from := v.outside
	if kind == "tmpfs" {
		from = storetest.Tmpfs(t, "1m")
		v.put(filepath.Join(from, "secret"), "secret")
		v.mkdir(filepath.Join(from, "dir"))
	}
	v.mkdir(filepath.Join(v.dir, "d", "mnt"))
	v.put(filepath.Join(v.dir, "d", "file"), "covered")
	v.put(filepath.Join(v.dir, "plain"), "x")
	dir, file := filepath.Join(v.dir, "d", "mnt"), filepath.Join(v.dir, "d", "file")
	err := errors.Join(unix.Mount(from, dir, "", unix.MS_BIND, ""), unix.Mount(from+"/secret", file, "", unix.MS_BIND, ""),
		os.Symlink("d/mnt/secret", filepath.Join(v.dir, "link")))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0)
	defer unix.Unmount(file, 0)
	for _, path := range []string{"d/mnt", "d/mnt/secret", "d/mnt/dir", "d/mnt/dir/new", "d/mnt/new", "d/file", "link"} {
		calls := map[string]func() error{
			"read":      func() error { _, err := v.Read(ctx, path); return err },
			"open":      func() error { f, err := v.OpenRead(ctx, path); return opened(f, err) },
			"write":     func() error { return v.Write(ctx, path+"/new", []byte("y"), WriteOptions{}) },
			"overwrite": func() error { return v.Write(ctx, path, []byte("y"), WriteOptions{}) },
			"stat":      func() error { _, err := v.Stat(ctx, path); return err },
			"list":      func() error { _, err := v.List(ctx, path); return err },
			"mkdir":     func() error { return v.Mkdir(ctx, path+"/new") },
			"copy":      func() error { return v.Copy(ctx, path, "copy", WriteOptions{}) },
			"copy to":   func() error { return v.Copy(ctx, "plain", path, WriteOptions{}) },
			"rename to": func() error { return v.Rename(ctx, "plain", path+"/new", WriteOptions{}) },
		}
		if path != "link" { // which may go itself
			calls["rename"] = func() error { return v.Rename(ctx, path, "moved", WriteOptions{}) }
			calls["remove"] = func() error { return v.Remove(ctx, path) }
			calls["rmdir"] = func() error { return v.RemoveDir(ctx, path) }
		}
		for what, call := range calls {
			if err := call(); err == nil {
				t.Errorf("%s %s: done", what, path)
			} else if what == "read" && !errors.Is(err, errdefs.ErrPathEscape) && path != "d/mnt/new" && path != "d/mnt/dir/new" {
				t.Errorf("%s %s: %v", what, path, err)
			}
		}
	}
	if err := v.RemoveAll(ctx, "d"); !errors.Is(err, errdefs.ErrPathEscape) && !errors.Is(err, unix.EBUSY) {
		t.Errorf("remove what holds it: %v", err)
	}
	if got, err := os.ReadFile(from + "/secret"); err != nil || string(got) != "secret" {
		t.Errorf("outside: %q, %v", got, err)
	}
	if _, err := os.Stat(from + "/dir"); err != nil {
		t.Error(err)
	}
}

// opened closes what should not have been opened.
func opened(f io.Closer, err error) error {
	if err == nil {
		_ = f.Close()
	}
	return err
}
