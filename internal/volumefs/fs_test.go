package volumefs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestReadWrite(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		noErr(t, v.Write(ctx, "/config/app.json", []byte("a longer text"), WriteOptions{}))
		noErr(t, v.Write(ctx, "config/app.json", []byte("\x00\xff"), WriteOptions{Durable: true}))
		b, err := v.Read(ctx, "//config/../config/app.json")
		noErr(t, err)
		if string(b) != "\x00\xff" {
			t.Errorf("read %q", b)
		}
		if got := v.tree(); !reflect.DeepEqual(got, []string{"config", "config/app.json"}) {
			t.Errorf("tree %q", got)
		}
		_, err = v.Read(ctx, "nothing")
		wantErr(t, err, fs.ErrNotExist)
		_, err = v.Read(ctx, "config/app.json/x")
		wantErr(t, err, unix.ENOTDIR)
		for _, p := range []string{"config", "", "/", "config/.."} {
			_, err = v.Read(ctx, p)
			wantErr(t, err, unix.EISDIR)
			wantErr(t, v.Write(ctx, p, nil, WriteOptions{}), unix.EISDIR)
		}
		wantErr(t, v.Write(ctx, "new/", nil, WriteOptions{}), unix.EISDIR)
		wantErr(t, v.Copy(ctx, "config/seed", "new/", WriteOptions{}), unix.EISDIR)
		_, err = v.OpenWrite(ctx, "/new/", WriteOptions{})
		wantErr(t, err, unix.EISDIR)
		wantErr(t, v.Write(ctx, "config/app.json/x", nil, WriteOptions{}), unix.ENOTDIR)
		_, err = v.Read(ctx, "a\x00b")
		wantErr(t, err, unix.EINVAL)
		_, err = v.Read(ctx, strings.Repeat("n", 256))
		wantErr(t, err, unix.ENAMETOOLONG)
	})
}

func TestReadHuge(t *testing.T) {
	v := newVolume(t, Options{})
	v.put("huge", "")
	noErr(t, os.Truncate(v.path("huge"), 1<<40))
	_, err := v.Read(ctx, "huge")
	wantErr(t, err, unix.EFBIG)
	var e *errdefs.Error
	if errors.As(err, &e) && e.Hint == "" {
		t.Error("no hint")
	}
}

// TestWriteKeepsMetadata: what the guest or the host set on the old file stays,
// what would give the new content somebody's rights does not.
func TestWriteKeepsMetadata(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("f", "old")
		noErr(t, os.Link(v.path("f"), v.path("other")))
		ov := overlay{set: true, uid: 7, gid: 8, mode: unix.S_IFREG | unix.S_ISUID | 0o755}
		noErr(t, unix.Setxattr(v.path("f"), overlayXattr, ov.encode(), 0))
		noErr(t, unix.Setxattr(v.path("f"), "user.note", []byte("kept"), 0))
		root := os.Getuid() == 0
		if root {
			noErr(t, os.Chown(v.path("f"), 12, 34))
			noErr(t, unix.Setxattr(v.path("f"), "security.capability", append([]byte{1, 0, 0, 2}, make([]byte, 16)...), 0))
		}
		noErr(t, unix.Chmod(v.path("f"), unix.S_ISUID|unix.S_ISGID|0o751))
		noErr(t, v.Write(ctx, "f", []byte("new"), WriteOptions{}))

		var st unix.Stat_t
		noErr(t, unix.Stat(v.path("f"), &st))
		if st.Mode != unix.S_IFREG|0o751 {
			t.Errorf("mode %o", st.Mode)
		}
		if root && (st.Uid != 12 || st.Gid != 34) {
			t.Errorf("owner %d:%d", st.Uid, st.Gid)
		}
		info, err := v.Stat(ctx, "f")
		noErr(t, err)
		if info.UID != 7 || info.GID != 8 || info.Mode != 0o755 {
			t.Errorf("guest sees %d:%d %o", info.UID, info.GID, info.Mode)
		}
		b := make([]byte, 16)
		if n, err := unix.Getxattr(v.path("f"), "user.note", b); err != nil || string(b[:n]) != "kept" {
			t.Errorf("user.note = %q, %v", b[:max(n, 0)], err)
		}
		if _, err := unix.Getxattr(v.path("f"), "security.capability", b); err != unix.ENODATA {
			t.Errorf("security.capability: %v", err)
		}
		if v.content("other") != "old" || v.content("f") != "new" {
			t.Errorf("other name %q, f %q", v.content("other"), v.content("f"))
		}
	})
}

func TestNewFileMode(t *testing.T) {
	old := unix.Umask(0o027)
	defer unix.Umask(old)
	eachVariant(t, func(t *testing.T, v *volume) {
		noErr(t, v.Write(ctx, "d/f", nil, WriteOptions{}))
		for p, want := range map[string]fs.FileMode{"d": 0o750 | fs.ModeDir, "d/f": 0o640} {
			if fi, err := os.Stat(v.path(p)); err != nil || fi.Mode() != want {
				t.Errorf("%s: %v, %v", p, fi.Mode(), err)
			}
		}
	})
}

func TestList(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("d/b", "12345")
		v.put("d/sub/grandchild", "")
		v.link("../../outside/secret", "d/link")
		v.put("d/A", "")
		v.standin("d/guestlink", unix.S_IFLNK|0o777, "b")
		v.standin("d/guestfifo", unix.S_IFIFO|0o644, "")
		v.standin("d/guestfile", unix.S_IFREG|0o4711, "xx")
		noErr(t, unix.Mkfifo(v.path("d/fifo"), 0o600))
		noErr(t, os.WriteFile(v.path("d/bad\xff"), nil, 0o644))
		v.put("d/corrupt", "")
		noErr(t, unix.Setxattr(v.path("d/corrupt"), overlayXattr, []byte("short"), 0))
		when := time.Date(2020, 1, 2, 3, 4, 5, 678901234, time.UTC)
		noErr(t, os.Chtimes(v.path("d/b"), when, when))

		got, err := v.List(ctx, "/d")
		noErr(t, err)
		var names []string
		byName := map[string]Entry{}
		for _, e := range got {
			names = append(names, fmt.Sprint(e.Path, " ", e.Kind))
			byName[filepath.Base(e.Path)] = e
		}
		want := []string{"/d/A 1", "/d/b 1", `/d/bad\xff 1`, "/d/corrupt 0", "/d/fifo 0", "/d/guestfifo 0",
			"/d/guestfile 1", "/d/guestlink 3", "/d/link 3", "/d/sub 2"}
		if !reflect.DeepEqual(names, want) {
			t.Errorf("listed\n%q, want\n%q", names, want)
		}
		if e := byName["b"]; e.Size != 5 || e.Mode != 0o644 || !e.Mtime.Equal(when) || !e.Atime.Equal(when) || e.UID != uint32(os.Getuid()) {
			t.Errorf("b: %+v", e)
		}
		if e := byName["guestfile"]; e.UID != 1000 || e.GID != 1001 || e.Mode != 0o4711 || e.Size != 2 {
			t.Errorf("guestfile: %+v", e)
		}
		_, err = v.List(ctx, "d/b")
		wantErr(t, err, unix.ENOTDIR)
		_, err = v.List(ctx, "none")
		wantErr(t, err, fs.ErrNotExist)
		root, err := v.List(ctx, "")
		if err != nil || len(root) != 1 || root[0].Path != "/d" {
			t.Errorf("root: %+v, %v", root, err)
		}
	})
}

// TestListMany crosses the border to two goroutines.
func TestListMany(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		for i := range parallelList + 100 {
			v.put(fmt.Sprintf("f%04d", i), "")
		}
		got, err := v.List(ctx, "/")
		noErr(t, err)
		if len(got) != parallelList+100 {
			t.Fatalf("%d entries", len(got))
		}
		for i, e := range got {
			if want := fmt.Sprintf("/f%04d", i); e.Path != want || e.Kind != File {
				t.Fatalf("entry %d: %+v", i, e)
			}
		}
	})
}

func TestStat(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("f", "123")
		noErr(t, os.Chmod(v.path("f"), 0o444))
		v.link("f", "link")
		v.link("nothing", "dangling")
		v.link("loop", "loop")
		noErr(t, unix.Mkfifo(v.path("fifo"), 0o600))
		v.standin("guestlink", unix.S_IFLNK|0o777, "link")
		for _, p := range []string{"f", "/link", "guestlink"} {
			info, err := v.Stat(ctx, p)
			noErr(t, err)
			if info.Kind != File || info.Size != 3 || info.Mode != 0o444 || info.Birth.IsZero() {
				t.Errorf("%s: %+v", p, info)
			}
		}
		info, err := v.Stat(ctx, "/")
		if err != nil || info.Kind != Directory || info.Path != "/" {
			t.Errorf("root: %+v, %v", info, err)
		}
		if info, err := v.Stat(ctx, "fifo"); err != nil || info.Kind != Other {
			t.Errorf("fifo: %+v, %v", info, err)
		}
		_, err = v.Stat(ctx, "dangling")
		wantErr(t, err, fs.ErrNotExist)
		_, err = v.Stat(ctx, "loop")
		wantErr(t, err, unix.ELOOP)
	})
}

func TestExists(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("d/f", "")
		v.link("nothing", "dangling")
		v.link("loop", "loop")
		v.link("d/f", "link")
		for p, want := range map[string]bool{"": true, "/": true, "d": true, "d/f": true, "link": true,
			"none": false, "none/x": false, "d/f/x": false, "dangling": false, "loop": false} {
			if got, err := v.Exists(ctx, p); got != want || err != nil {
				t.Errorf("exists %q = %v, %v", p, got, err)
			}
		}
	})
}

func TestMkdir(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		noErr(t, v.Mkdir(ctx, "/data/incoming"))
		noErr(t, v.Mkdir(ctx, "/data/incoming/"))
		noErr(t, v.Mkdir(ctx, ""))
		noErr(t, v.Mkdir(ctx, "missing/../x"))
		v.put("f", "")
		wantErr(t, v.Mkdir(ctx, "f"), fs.ErrExist)
		wantErr(t, v.Mkdir(ctx, "f/d"), unix.ENOTDIR)
		if got := v.tree(); !reflect.DeepEqual(got, []string{"data", "data/incoming", "f", "x"}) {
			t.Errorf("tree %q", got)
		}
	})
}

func TestRemove(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("f", "")
		v.put("d/f", "")
		v.put("inside", "")
		v.link("inside", "link")
		v.link("../outside/secret", "out")
		v.standin("guestlink", unix.S_IFLNK|0o777, "../outside/secret")
		noErr(t, unix.Mkfifo(v.path("fifo"), 0o600))
		for _, p := range []string{"f", "link", "out", "guestlink", "fifo"} {
			noErr(t, v.Remove(ctx, p))
		}
		wantErr(t, v.Remove(ctx, "f"), fs.ErrNotExist)
		wantErr(t, v.Remove(ctx, "d"), unix.EISDIR)
		wantErr(t, v.Remove(ctx, "/"), unix.EBUSY)
		if got := v.tree(); !reflect.DeepEqual(got, []string{"d", "d/f", "inside"}) {
			t.Errorf("tree %q", got)
		}
	})
}

func TestRemoveDir(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("keep", "")
		v.put("d/a/b/f", "")
		v.link("../../outside", "d/out")
		v.link("d", "dirlink")
		for _, p := range []string{"", "/", ".", "d/..", "//"} {
			wantErr(t, v.RemoveDir(ctx, p), unix.EBUSY)
			wantErr(t, v.RemoveAll(ctx, p), unix.EBUSY)
		}
		wantErr(t, v.RemoveDir(ctx, "keep"), unix.ENOTDIR)
		wantErr(t, v.RemoveDir(ctx, "dirlink"), unix.ENOTDIR)
		wantErr(t, v.RemoveDir(ctx, "none"), fs.ErrNotExist)
		noErr(t, v.RemoveAll(ctx, "none/x"))
		noErr(t, v.RemoveAll(ctx, "keep/x"))
		noErr(t, v.RemoveDir(ctx, "/d/"))
		if got := v.tree(); !reflect.DeepEqual(got, []string{"dirlink -> d", "keep"}) {
			t.Errorf("tree %q", got)
		}
		noErr(t, v.RemoveAll(ctx, "dirlink"))
		v.put("t/x/y", "")
		noErr(t, v.RemoveAll(ctx, "t"))
		noErr(t, v.RemoveAll(ctx, "keep"))
		if got := v.tree(); len(got) != 0 {
			t.Errorf("tree %q", got)
		}
	})
}

// TestDeepTree: a guest can nest deeper than a process may open descriptors,
// and than a path may be long.
func TestDeepTree(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		const depth = 2000
		name := strings.Repeat("n", 10)
		fd, err := unix.Open(v.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		noErr(t, err)
		for range depth {
			noErr(t, unix.Mkdirat(fd, name, 0o755))
			next, err := openat(fd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
			noErr(t, err)
			unix.Close(fd)
			fd = next
		}
		unix.Close(fd)
		path := strings.Repeat(name+"/", 300)
		if len(path) <= 3000 {
			noErr(t, v.Write(ctx, path+"f", []byte("deep"), WriteOptions{}))
		}
		path = strings.Repeat(name+"/", 600) // longer than PATH_MAX
		noErr(t, v.Write(ctx, path+"f", []byte("deeper"), WriteOptions{}))
		if b, err := v.Read(ctx, path+"f"); err != nil || string(b) != "deeper" {
			t.Errorf("read %q, %v", b, err)
		}
		noErr(t, v.RemoveDir(ctx, name))
		if got := v.tree(); len(got) != 0 {
			t.Errorf("%d names left", len(got))
		}
	})
}

func TestCopy(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("seed.txt", "seed")
		noErr(t, os.Chmod(v.path("seed.txt"), 0o640))
		noErr(t, v.Copy(ctx, "/seed.txt", "/backup/seed.txt", WriteOptions{}))
		if fi, err := os.Stat(v.path("backup/seed.txt")); err != nil || fi.Mode().Perm() != 0o640 || v.content("backup/seed.txt") != "seed" {
			t.Errorf("copy: %v, %v", fi, err)
		}
		v.link("seed.txt", "link")
		noErr(t, os.Link(v.path("seed.txt"), v.path("hard")))
		for _, to := range []string{"seed.txt", "/seed.txt", "link", "hard", "x/../seed.txt"} {
			wantErr(t, v.Copy(ctx, "seed.txt", to, WriteOptions{}), unix.EINVAL)
		}
		if v.content("seed.txt") != "seed" {
			t.Error("copy to itself changed the file")
		}
		wantErr(t, v.Copy(ctx, "backup", "b2", WriteOptions{}), unix.EISDIR)
		wantErr(t, v.Copy(ctx, "seed.txt", "backup", WriteOptions{}), unix.EISDIR)
		wantErr(t, v.Copy(ctx, "none", "n/n", WriteOptions{}), fs.ErrNotExist)
		if ok, _ := v.Exists(ctx, "n"); ok {
			t.Error("a failed copy left a parent")
		}
	})
}

// TestCopySparse: a hole costs nothing in the copy.
func TestCopySparse(t *testing.T) {
	v := newVolume(t, Options{})
	v.put("sparse", "head")
	file, err := os.OpenFile(v.path("sparse"), os.O_WRONLY, 0)
	noErr(t, err)
	_, err = file.WriteAt([]byte("middle"), 1<<30)
	noErr(t, err)
	noErr(t, file.Truncate(1<<40))
	noErr(t, file.Close())
	noErr(t, v.Copy(ctx, "sparse", "copy", WriteOptions{}))
	var st unix.Stat_t
	noErr(t, unix.Stat(v.path("copy"), &st))
	if st.Size != 1<<40 || st.Blocks*512 > 1<<20 {
		t.Errorf("size %d, %d blocks", st.Size, st.Blocks)
	}
	f, err := os.Open(v.path("copy"))
	noErr(t, err)
	defer f.Close()
	b := make([]byte, 6)
	if _, err := f.ReadAt(b, 1<<30); err != nil || string(b) != "middle" {
		t.Errorf("middle is %q, %v", b, err)
	}
}

func TestRename(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("f", "f")
		v.put("d/x", "")
		v.put("full/y", "")
		v.put("victim", "old")
		v.link("victim", "link")
		noErr(t, v.Rename(ctx, "/f", "/new/dir/f", WriteOptions{Durable: true}))
		noErr(t, v.Rename(ctx, "d", "new/d", WriteOptions{}))
		noErr(t, v.Rename(ctx, "link", "moved", WriteOptions{}))
		noErr(t, v.Rename(ctx, "new/dir/f", "victim", WriteOptions{}))
		wantErr(t, v.Rename(ctx, "new/d", "full", WriteOptions{}), unix.ENOTEMPTY)
		wantErr(t, v.Rename(ctx, "new", "new/sub/deeper", WriteOptions{}), unix.EINVAL)
		wantErr(t, v.Rename(ctx, "none", "made/none", WriteOptions{}), fs.ErrNotExist)
		wantErr(t, v.Rename(ctx, "", "x", WriteOptions{}), unix.EBUSY)
		wantErr(t, v.Rename(ctx, "full", "/", WriteOptions{}), unix.EBUSY)
		noErr(t, v.Rename(ctx, "victim", "victim", WriteOptions{}))
		noErr(t, os.Link(v.path("victim"), v.path("same")))
		noErr(t, v.Rename(ctx, "same", "victim", WriteOptions{}))
		want := []string{"full", "full/y", "moved -> victim", "new", "new/d", "new/d/x", "new/dir", "victim"}
		if got := v.tree(); !reflect.DeepEqual(got, want) {
			t.Errorf("tree %q, want %q", got, want)
		}
		if v.content("victim") != "f" {
			t.Errorf("victim is %q", v.content("victim"))
		}
	})
}

// TestLinksInside: content is reached through links of both kinds, also in the
// middle of a path; a write through one that dangles makes its target.
func TestLinksInside(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		v.put("real/deep/f", "content")
		v.link("real", "dirlink")
		v.link("../real/./deep//", "real/up")
		v.standin("guestdir", unix.S_IFLNK|0o777, "dirlink/deep/..")
		v.standin("real/guestfile", unix.S_IFLNK|0o777, "../guestdir/deep/f")
		for _, p := range []string{"dirlink/deep/f", "real/up/f", "guestdir/deep/f", "real/guestfile", "dirlink/guestfile", "guestdir/up/../deep/f"} {
			if b, err := v.Read(ctx, p); err != nil || string(b) != "content" {
				t.Errorf("read %s: %q, %v", p, b, err)
			}
		}
		if got, err := v.List(ctx, "guestdir"); err != nil || len(got) != 3 || got[0].Path != "/guestdir/deep" {
			t.Errorf("list: %+v, %v", got, err)
		}
		v.link("made/by/write", "dangling")
		noErr(t, v.Write(ctx, "dangling", []byte("w"), WriteOptions{}))
		v.standin("guestdangling", unix.S_IFLNK|0o777, "real/../made2")
		noErr(t, v.Write(ctx, "guestdangling/sub/f", []byte("w2"), WriteOptions{}))
		v.link("nothing/../made3", "dangling3")
		noErr(t, v.Write(ctx, "dangling3", []byte("w3"), WriteOptions{}))
		if v.content("made/by/write") != "w" || v.content("made2/sub/f") != "w2" || v.content("made3") != "w3" {
			t.Error("target not made")
		}
		noErr(t, v.Write(ctx, "real/guestfile", []byte("through"), WriteOptions{}))
		if v.content("real/deep/f") != "through" || v.content("real/guestfile") != "../guestdir/deep/f" {
			t.Error("write did not go through the stand-in")
		}
		v.link("real/deep/f/", "slash")
		_, err := v.Read(ctx, "slash")
		wantErr(t, err, unix.ENOTDIR)
	})
}

// TestNotFiles: anything that is not a file answers at once, without effect.
func TestNotFiles(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		noErr(t, unix.Mkfifo(v.path("fifo"), 0o600))
		noErr(t, unix.Mknod(v.path("socket"), unix.S_IFSOCK|0o600, 0))
		paths := []string{"fifo", "socket", "guestdev", "guestfifo"}
		v.standin("guestdev", unix.S_IFBLK|0o600, "")
		v.standin("guestfifo", unix.S_IFIFO|0o600, "")
		if unix.Mknod(v.path("device"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))) == nil {
			paths = append(paths, "device")
		}
		for _, p := range paths {
			_, err := v.Read(ctx, p)
			wantErr(t, err, unix.EOPNOTSUPP)
			_, err = v.OpenRead(ctx, p)
			wantErr(t, err, unix.EOPNOTSUPP)
			wantErr(t, v.Write(ctx, p, nil, WriteOptions{}), unix.EOPNOTSUPP)
			wantErr(t, v.Copy(ctx, p, "x", WriteOptions{}), unix.EOPNOTSUPP)
			_, err = v.List(ctx, p)
			wantErr(t, err, unix.ENOTDIR)
		}
	})
}

func TestNotUTF8(t *testing.T) {
	eachVariant(t, func(t *testing.T, v *volume) {
		raw := "bad\xff\xfename"
		noErr(t, os.Mkdir(v.path(raw), 0o755))
		v.put(raw+"/f\x80", "x")
		got, err := v.List(ctx, "")
		noErr(t, err)
		sub, err := v.List(ctx, got[0].Path)
		noErr(t, err)
		if b, err := v.Read(ctx, sub[0].Path); err != nil || string(b) != "x" {
			t.Errorf("read %s: %q, %v", sub[0].Path, b, err)
		}
		noErr(t, v.Rename(ctx, sub[0].Path, "plain", WriteOptions{}))
		noErr(t, v.RemoveDir(ctx, got[0].Path))
		if tree := v.tree(); !reflect.DeepEqual(tree, []string{"plain"}) {
			t.Errorf("tree %q", tree)
		}
	})
}
