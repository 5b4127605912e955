package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// unpacker applies layers to a directory as container runtimes do, with the
// kernel resolving links inside it: the judge of what merging must give.
type unpacker struct {
	dir string
	fd  int
}

// errUndefined marks what runtimes do not agree on; the comparison ends there.
var errUndefined = errors.New("undefined")

// parent opens the directory of a name inside the root, making what is missing.
func (u *unpacker) parent(dir string, create bool) (string, error) {
	at := "."
	for _, part := range append([]string{"."}, strings.Split(dir, "/")...) {
		at = path.Join(at, part)
		fd, err := unix.Openat2(u.fd, at, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		if err == unix.ENOENT && create {
			up, perr := u.parent(path.Dir(at), false)
			if perr != nil {
				return "", perr
			}
			if err := os.Mkdir(filepath.Join(up, part), 0o755); err != nil {
				return "", errUndefined // a dangling link
			}
			fd, err = unix.Openat2(u.fd, at, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		}
		if err != nil {
			return "", err
		}
		real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		unix.Close(fd)
		if err != nil {
			return "", err
		}
		if at == path.Join(".", dir) {
			return real, nil
		}
	}
	return u.dir, nil
}

func (u *unpacker) apply(h *tar.Header) error {
	dirName, name := path.Split(path.Clean(h.Name))
	whiteout := strings.HasPrefix(name, whiteoutPrefix)
	up, err := u.parent(strings.TrimSuffix(dirName, "/"), !whiteout)
	if err != nil {
		if whiteout && err == unix.ENOENT {
			return nil
		}
		return err
	}
	p := filepath.Join(up, name)
	if whiteout {
		return os.RemoveAll(filepath.Join(up, strings.TrimPrefix(name, whiteoutPrefix)))
	}
	var source string
	if h.Typeflag == tar.TypeLink {
		d, n := path.Split(path.Clean(h.Linkname))
		from, err := u.parent(strings.TrimSuffix(d, "/"), false)
		if err != nil {
			return err
		}
		source = filepath.Join(from, n)
		if fi, err := os.Lstat(source); err != nil || fi.IsDir() {
			return fmt.Errorf("hard link target: %v", err)
		}
		if source == p {
			return nil
		}
		if strings.HasPrefix(source, p+"/") {
			return errUndefined // its own replacement removes the target
		}
	}
	if fi, err := os.Lstat(p); err == nil && !(fi.IsDir() && h.Typeflag == tar.TypeDir) {
		if err := os.RemoveAll(p); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = os.Mkdir(p, 0o755)
		if errors.Is(err, fs.ErrExist) {
			err = nil
		}
	case tar.TypeReg:
		err = os.WriteFile(p, []byte(h.Uname), 0o644)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, p)
	case tar.TypeLink:
		err = os.Link(source, p)
	}
	return err
}

func (u *unpacker) listing(t testing.TB) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(u.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == u.dir {
			return err
		}
		rel, _ := filepath.Rel(u.dir, p)
		switch {
		case d.IsDir():
			out = append(out, rel+"/")
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			out = append(out, rel+" -> "+target)
		default:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			out = append(out, rel+" = "+string(b))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// linked replaces "a == b" by what b is.
func linked(lines []string) []string {
	content := map[string]string{}
	for _, l := range lines {
		if name, rest, ok := strings.Cut(l, " "); ok {
			content[name] = rest
		}
	}
	var out []string
	for _, l := range lines {
		if name, target, ok := strings.Cut(l, " == "); ok {
			l = name + " " + content[target]
		}
		out = append(out, l)
	}
	slices.Sort(out)
	return out
}

// drawLayer makes a layer over few names, whiteouts first: their place among
// the entries of their own layer is for TestMerge.
func drawLayer(t *rapid.T, n *int) layer {
	name := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c"}), 1, 3).Draw(t, "path"), "/")
	})
	var y layer
	for _, p := range rapid.SliceOfN(name, 0, 2).Draw(t, "whiteouts") {
		d, base := path.Split(p)
		y = append(y, file(d+whiteoutPrefix+base, ""))
	}
	for range rapid.IntRange(0, 6).Draw(t, "entries") {
		*n++
		p := name.Draw(t, "name")
		switch rapid.IntRange(0, 4).Draw(t, "type") {
		case 0:
			y = append(y, dir(p))
		case 1, 2:
			y = append(y, file(p, fmt.Sprintf("body %d", *n)))
		case 3:
			prefix := rapid.SampledFrom([]string{"", "/", "../", "../../../", "./"}).Draw(t, "prefix")
			y = append(y, link(p, prefix+name.Draw(t, "target")))
		case 4:
			y = append(y, hard(p, name.Draw(t, "target")))
		}
	}
	return y
}

// TestMergeLikeUnpacking compares merging with unpacking on a real file system.
func TestMergeLikeUnpacking(t *testing.T) {
	compared := 0
	rapid.Check(t, func(rt *rapid.T) {
		n := 0
		var layers []layer
		for range rapid.IntRange(1, 4).Draw(rt, "layers") {
			layers = append(layers, drawLayer(rt, &n))
		}
		root, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			rt.Fatal(err)
		}
		defer unix.Close(fd)
		u := &unpacker{dir: root, fd: fd}
		var raws [][]byte
		var failed error
		for _, y := range layers {
			raws = append(raws, layerTar(t, y...))
			for _, h := range y {
				if failed == nil {
					failed = u.apply(h)
				}
			}
		}
		if errors.Is(failed, errUndefined) {
			return
		}
		raw, err := stream(t, defaultLimits, raws...)
		if (failed != nil) != (err != nil) {
			rt.Fatalf("unpacking: %v; merging: %v", failed, err)
		}
		if err != nil {
			return
		}
		compared++
		got, want := linked(listing(t, raw)), u.listing(t)
		if !slices.Equal(got, want) {
			rt.Fatalf("merged   %q\nunpacked %q", got, want)
		}
	})
	t.Logf("%d trees compared", compared)
	if compared == 0 {
		t.Error("nothing was compared")
	}
}
