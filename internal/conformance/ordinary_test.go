package conformance_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/confine/confinetest"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// TestOrdinaryHostUser runs the checks with msb and all its processes as an
// ordinary user of the host, who can own files for nobody else.
func TestOrdinaryHostUser(t *testing.T) {
	if os.Geteuid() == 0 {
		seed := string(vmtest.Seed(t))
		k := makeKit(t)
		dir := openDir(t)
		copyTree(t, vmtest.MSB(t), filepath.Join(dir, "msb"))
		for _, name := range []string{"kernels", "images"} {
			copyTree(t, filepath.Join(seed, name), filepath.Join(dir, name))
		}
		t.Setenv(kitEnv, k.dir)
		t.Setenv(vmtest.SeedEnv, dir)
		t.Setenv(vmtest.MSBEnv, filepath.Join(dir, "msb"))
		confinetest.AsOrdinaryUser(t, "^TestOrdinaryHostUser$")
		return
	}
	vmtest.Home(t)
	k := makeKit(t)
	k.baseline(t)
	all := []part{{"posix", posix}, {"tar", archive}}
	inGuest(t, k, "strict", all, &place{volume: "strict-root", policy: strict}, &place{volume: "strict-user", policy: strict, uid: 1000})
	// Without stat virtualization the only users who may work there are root
	// and the one who has the number of the host's.
	inGuest(t, k, "off", all, &place{volume: "off-root", policy: off}, &place{volume: "off-user", policy: off, uid: os.Geteuid()})
}

// copyTree copies a file or a tree for uid confinetest.Nobody, but for
// lock files.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			err = os.Mkdir(dst, 0o755)
		case d.Type().IsRegular() && !strings.HasSuffix(path, ".lock"):
			err = copyFile(path, dst)
		default:
			return nil
		}
		if err != nil {
			return err
		}
		return os.Chown(dst, confinetest.Nobody, confinetest.Nobody)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, st.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := dst.ReadFrom(src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
