package fuseserver

import (
	"fmt"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func TestCreateAndFind(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		e, fh := s.mustCreate(rootID, "f", 0o640)
		if e.Attr.Mode != unix.S_IFREG|0o640 || e.Attr.Nlink != 1 || e.Attr.Size != 0 {
			t.Errorf("created with %+v", e.Attr)
		}
		if _, err := s.write(e.NodeID, fh, 0, "hello"); err != 0 {
			t.Fatal(err)
		}
		if got := s.mustLookup(rootID, "f"); got.NodeID != e.NodeID || got.Attr.Size != 5 {
			t.Errorf("found %+v", got)
		}
		if b, err := os.ReadFile(s.host("f")); err != nil || string(b) != "hello" {
			t.Errorf("on the host: %q, %v", b, err)
		}
		_, _, err := s.create(rootID, "f", unix.O_RDWR|unix.O_EXCL, 0o600)
		s.want(err, unix.EEXIST, "O_EXCL over a file")
		_, err = s.mknod(rootID, "f", unix.S_IFREG|0o600, 0)
		s.want(err, unix.EEXIST, "mknod over a file")
		_, err = s.mkdir(rootID, "f", 0o700)
		s.want(err, unix.EEXIST, "mkdir over a file")
		_, err = s.symlink(rootID, "f", "x")
		s.want(err, unix.EEXIST, "symlink over a file")
		_, err = s.lookup(rootID, "g")
		s.want(err, unix.ENOENT, "lookup of nothing")
	})
}

// TestCreateOverExisting: the guest found the name free, and it no longer is.
// A file is opened and keeps its owner and mode; anything else, or a file that
// the caller may not open, makes the guest look again.
func TestCreateOverExisting(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		e, fh := s.mustCreate(rootID, "f", 0o644)
		if _, err := s.write(e.NodeID, fh, 0, "content"); err != 0 {
			t.Fatal(err)
		}
		s.must(s.release(e.NodeID, fh))
		before := s.mustAttr(e.NodeID)

		got, fh, err := s.create(rootID, "f", unix.O_RDWR, 0o777)
		s.must(err)
		if got.NodeID != e.NodeID || got.Attr.Mode != before.Mode || got.Attr.Size != 7 {
			t.Errorf("opened as %+v", got)
		}
		if b, err := s.read(e.NodeID, fh, 0, 10); err != 0 || b != "content" {
			t.Errorf("read %q, %v", b, err)
		}
		got, _, err = s.create(rootID, "f", unix.O_WRONLY|unix.O_TRUNC, 0o777)
		s.must(err)
		if got.Attr.Size != 0 {
			t.Errorf("O_TRUNC left %d bytes", got.Attr.Size)
		}
		s.uid, s.gid = 4000, 4000
		_, _, err = s.create(rootID, "f", unix.O_RDWR, 0o777)
		s.want(err, unix.ESTALE, "another user's file")
		s.uid, s.gid = 0, 0
		if _, err := s.symlink(rootID, "l", "/etc/passwd"); err != 0 {
			t.Fatal(err)
		}
		if _, err := s.mkdir(rootID, "d", 0o700); err != 0 {
			t.Fatal(err)
		}
		for _, name := range []string{"l", "d"} {
			_, _, err = s.create(rootID, name, unix.O_RDWR|unix.O_TRUNC, 0o600)
			s.want(err, unix.ESTALE, "create over %s", name)
		}
		if n := s.srv.session.Load().handles.size(); n != 2 {
			t.Errorf("%d handles, want 2", n)
		}
	})
}

func TestDirectories(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		d, err := s.mkdir(rootID, "d", 0o751)
		s.must(err)
		if d.Attr.Mode != unix.S_IFDIR|0o751 {
			t.Errorf("mode %o", d.Attr.Mode)
		}
		f, _ := s.mustCreate(d.NodeID, "f", 0o600)
		s.want(s.rmdir(rootID, "d"), unix.ENOTEMPTY, "rmdir of a full directory")
		s.want(s.unlink(rootID, "d"), unix.EISDIR, "unlink of a directory")
		s.want(s.rmdir(d.NodeID, "f"), unix.ENOTDIR, "rmdir of a file")
		s.must(s.unlink(d.NodeID, "f"))
		s.must(s.rmdir(rootID, "d"))
		if a := s.mustAttr(f.NodeID); a.Nlink != 0 {
			t.Errorf("nlink %d after unlink", a.Nlink)
		}
		_, err = s.mkdir(d.NodeID, "x", 0o700)
		s.want(err, unix.ENOENT, "mkdir in a removed directory")
		_, _, err = s.create(d.NodeID, "x", unix.O_RDWR, 0o700)
		s.want(err, unix.ENOENT, "create in a removed directory")
	})
}

func TestRename(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		d, err := s.mkdir(rootID, "d", 0o755)
		s.must(err)
		a, _ := s.mustCreate(rootID, "a", 0o600)
		b, _ := s.mustCreate(d.NodeID, "b", 0o600)
		l, err := s.symlink(rootID, "l", "target")
		s.must(err)

		s.want(s.rename(rootID, "a", d.NodeID, "b", unix.RENAME_NOREPLACE), unix.EEXIST, "NOREPLACE")
		s.must(s.rename(rootID, "a", d.NodeID, "b", unix.RENAME_EXCHANGE))
		if s.mustLookup(rootID, "a").NodeID != b.NodeID || s.mustLookup(d.NodeID, "b").NodeID != a.NodeID {
			t.Error("EXCHANGE did not exchange")
		}
		s.must(s.rename(rootID, "l", rootID, "a", 0))
		if got := s.mustLookup(rootID, "a"); got.NodeID != l.NodeID || got.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("a link over a file: %+v", got.Attr)
		}
		if at := s.mustAttr(b.NodeID); at.Nlink != 0 {
			t.Errorf("replaced file has nlink %d", at.Nlink)
		}
		s.want(s.rename(rootID, "d", rootID, "a", 0), unix.ENOTDIR, "directory over link")
		s.want(s.rename(rootID, "a", rootID, "d", 0), unix.EISDIR, "link over directory")
		s.want(s.rename(rootID, "d", d.NodeID, "inside", 0), unix.EINVAL, "directory into itself")
		s.want(s.rename(rootID, "none", rootID, "x", 0), unix.ENOENT, "rename of nothing")
	})
}

func TestHardLinks(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		f, fh := s.mustCreate(rootID, "f", 0o640)
		s.mayChown(f.NodeID, 5, 6)
		g, err := s.link(f.NodeID, rootID, "g")
		s.must(err)
		if g.NodeID != f.NodeID || g.Attr.Nlink != 2 || g.Attr.UID != s.mustAttr(f.NodeID).UID {
			t.Errorf("link: %+v", g)
		}
		l, err := s.symlink(rootID, "l", "somewhere")
		s.must(err)
		m, err := s.link(l.NodeID, rootID, "m")
		s.must(err)
		if m.NodeID != l.NodeID || m.Attr.Nlink != 2 {
			t.Errorf("link of a link: %+v", m)
		}
		if target, err := s.readlink(s.mustLookup(rootID, "m").NodeID); err != 0 || target != "somewhere" {
			t.Errorf("readlink: %q, %v", target, err)
		}
		s.must(s.unlink(rootID, "f"))
		if _, err := s.write(f.NodeID, fh, 0, "via g"); err != 0 {
			t.Errorf("write after one of two names went: %v", err)
		}
		s.must(s.chmod(f.NodeID, 0o600))
		_, err = s.link(f.NodeID, rootID, "l")
		s.want(err, unix.EEXIST, "link over a name")
		_, err = s.link(rootID, rootID, "dir")
		s.want(err, unix.EPERM, "link of a directory")
	})
}

// TestUnlinkedFileLives: everything that needs no name works on.
func TestUnlinkedFileLives(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		e, fh := s.mustCreate(rootID, "f", 0o600)
		s.must(s.unlink(rootID, "f"))
		if _, err := s.write(e.NodeID, fh, 0, "ghost"); err != 0 {
			t.Fatal(err)
		}
		s.must(s.chmod(e.NodeID, 0o640))
		owned := s.mayChown(e.NodeID, 7, 8)
		s.must(s.truncate(e.NodeID, 3))
		s.must(s.setxattr(e.NodeID, "user.k", "v", 0))
		if a := s.mustAttr(e.NodeID); a.Nlink != 0 || a.Size != 3 || (a.UID == 7) != owned || a.Mode&0o777 != 0o640 {
			t.Errorf("attributes: %+v", a)
		}
		again, err := s.open(e.NodeID, unix.O_RDONLY)
		s.must(err)
		if b, err := s.read(e.NodeID, again, 0, 10); err != 0 || b != "gho" {
			t.Errorf("read %q, %v", b, err)
		}
		g, _ := s.mustCreate(rootID, "f", 0o600)
		if g.NodeID == e.NodeID {
			t.Error("a new file got the old node")
		}
	})
}

func TestTmpfile(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		b, err := s.do(w.OpTmpfile, rootID, w.EntryOutSize+w.OpenOutSize,
			pack(w.CreateIn{Flags: unix.O_TMPFILE | unix.O_RDWR, Mode: unix.S_IFREG | 0o640}, w.Append), z("/"))
		s.must(err)
		var e w.EntryOut
		var o w.OpenOut
		rest, _ := w.Decode(b, &e)
		w.Decode(rest, &o)
		if e.Attr.Nlink != 0 || e.Attr.Mode != unix.S_IFREG|0o640 {
			t.Errorf("attributes: %+v", e.Attr)
		}
		if _, err := s.write(e.NodeID, o.Fh, 0, "x"); err != 0 {
			t.Fatal(err)
		}
		if got := s.list(rootID, 4096, false); len(got) != 0 {
			t.Errorf("it has a name: %v", got)
		}
		if _, err := s.link(e.NodeID, rootID, "named"); err != 0 {
			t.Fatal(err)
		}
		if got := s.mustLookup(rootID, "named"); got.NodeID != e.NodeID || got.Attr.Nlink != 1 {
			t.Errorf("named: %+v", got)
		}
		_, err = s.do(w.OpTmpfile, rootID, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{}, w.Append), z("/"))
		s.want(err, unix.EINVAL, "nameless file that cannot be written")
	})
}

func names(list []dirent) []string {
	var out []string
	for _, d := range list {
		out = append(out, d.name)
	}
	sort.Strings(out)
	return out
}

func TestListing(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		s.mustCreate(rootID, "file", 0o600)
		_, err := s.mkdir(rootID, "dir", 0o700)
		s.must(err)
		_, err = s.symlink(rootID, "link", "x")
		s.must(err)
		want := map[string]uint32{"file": unix.DT_REG, "dir": unix.DT_DIR, "link": unix.DT_LNK}
		if err := os.WriteFile(s.host("byhost"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		want["byhost"] = unix.DT_REG
		for _, plus := range []bool{false, true} {
			for _, d := range s.list(rootID, 4096, plus) {
				typ := want[d.name]
				if !plus && d.name == "byhost" && virt != "off" {
					typ = unix.DT_UNKNOWN // might be a stand-in
				}
				if d.typ != typ {
					t.Errorf("plus=%v: %s has type %d, want %d", plus, d.name, d.typ, typ)
				}
				if plus && (d.node == 0 || d.attr.Mode>>12 != d.typ || d.attr.Ino != d.ino) {
					t.Errorf("plus: %+v", d)
				}
				if plus && s.mustLookup(rootID, d.name).NodeID != d.node {
					t.Errorf("%s: lookup gives another node", d.name)
				}
			}
		}
		if got := names(s.list(rootID, 4096, false)); !slices.Equal(got, []string{"byhost", "dir", "file", "link"}) {
			t.Errorf("names %v", got)
		}
	})
}

func entryName(i int) string { return fmt.Sprintf("entry-%06d", i) }

// TestListingCounts: READDIRPLUS counts a lookup for each entry but "." and "..".
func TestListingCounts(t *testing.T) {
	s := newShare(t, nil)
	for i := range 5 {
		if err := os.WriteFile(s.host(fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	once := s.list(rootID, 4096, true)
	s.list(rootID, 4096, true)
	for _, d := range once {
		s.forget(d.node, 1)
		s.mustAttr(d.node)
		s.forget(d.node, 1)
		if _, err := s.getattr(d.node); err != unix.ESTALE {
			t.Errorf("%s counted more than twice", d.name)
		}
	}
	if n := s.srv.fds.Load(); n != 1 {
		t.Errorf("%d descriptors held, want the root's", n)
	}
}

func fill(t testing.TB, dir string, n int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for i := range n {
		f, err := unix.Openat(fd, entryName(i), unix.O_CREAT|unix.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(f)
	}
}

// TestLargeListing: every entry of a large directory exactly once, with
// replies of one page, and seeking back to any offset continues there.
func TestLargeListing(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 5_000
	}
	s := newShare(t, nil)
	fill(t, s.dir, n)
	all := s.list(rootID, 4096, false)
	seen := map[string]bool{}
	for _, d := range all {
		seen[d.name] = true
	}
	if len(all) != n || len(seen) != n {
		t.Fatalf("%d entries, %d different, want %d", len(all), len(seen), n)
	}
	fh, err := s.opendir(rootID)
	s.must(err)
	for _, i := range []int{n / 2, 17, n - 3, 0, n - 1, 17} {
		page, err := s.page(rootID, fh, all[i].off, 4096, false)
		s.must(err)
		if i == n-1 {
			continue // "." or ".." may follow
		}
		for page[0].name == "." || page[0].name == ".." {
			page = page[1:]
		}
		if page[0].name != all[i+1].name {
			t.Errorf("after entry %d: %q, want %q", i, page[0].name, all[i+1].name)
		}
	}
	s.must(s.releasedir(rootID, fh))
}

// TestRewind: reading from offset 0 again shows the directory as it is now.
func TestRewind(t *testing.T) {
	s := newShare(t, nil)
	s.mustCreate(rootID, "old", 0o600)
	fh, err := s.opendir(rootID)
	s.must(err)
	if page, err := s.page(rootID, fh, 0, 4096, false); err != 0 || len(page) != 3 {
		t.Fatalf("%v, %v", page, err)
	}
	s.mustCreate(rootID, "new", 0o600)
	if page, err := s.page(rootID, fh, 0, 4096, false); err != 0 || len(page) != 4 {
		t.Errorf("after rewind: %v, %v", page, err)
	}
}

// TestListingWhileChanging: entries that exist all the time are listed
// exactly once while others come and go.
func TestListingWhileChanging(t *testing.T) {
	s := newShare(t, nil)
	const steady = 500
	for i := range steady {
		if err := os.WriteFile(s.host(fmt.Sprintf("steady%d", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var other sync.WaitGroup
	other.Go(func() {
		o := newClient(t, s.srv)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := fmt.Sprintf("fickle%d", i%50)
			if e, fh, err := o.create(rootID, name, unix.O_RDWR, 0o600); err == 0 {
				o.release(e.NodeID, fh)
				o.forget(e.NodeID, 1)
			}
			o.unlink(rootID, fmt.Sprintf("fickle%d", (i+25)%50))
		}
	})
	for range 20 {
		for _, plus := range []bool{false, true} {
			count := map[string]int{}
			for _, d := range s.list(rootID, 1024, plus) {
				if strings.HasPrefix(d.name, "steady") {
					count[d.name]++
				}
				if d.node != 0 {
					s.forget(d.node, 1)
				}
			}
			for name, n := range count {
				if n != 1 {
					t.Errorf("%s listed %d times", name, n)
				}
			}
			if len(count) != steady {
				t.Errorf("%d steady entries, want %d", len(count), steady)
			}
		}
	}
	close(stop)
	other.Wait()
}

func TestManyDirectoryHandles(t *testing.T) {
	s := newShare(t, func(c *Config) { c.FDBudget = 4096 })
	var fhs []uint64
	for {
		fh, err := s.opendir(rootID)
		if err == unix.ENFILE {
			break
		}
		s.must(err)
		fhs = append(fhs, fh)
	}
	if len(fhs) != maxDirs {
		t.Errorf("%d directory handles, want %d", len(fhs), maxDirs)
	}
	s.must(s.releasedir(rootID, fhs[0]))
	if _, err := s.opendir(rootID); err != 0 {
		t.Errorf("after one was released: %v", err)
	}
}
