package fuseserver

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func hostOverlay(t testing.TB, path string) string {
	t.Helper()
	b := make([]byte, 64)
	n, err := unix.Getxattr(path, "user.msb.override_stat", b)
	if err != nil {
		return err.Error()
	}
	return hex.EncodeToString(b[:n])
}

func setHostOverlay(t testing.TB, path string, value []byte) {
	t.Helper()
	if err := unix.Setxattr(path, "user.msb.override_stat", value, 0); err != nil {
		t.Fatal(err)
	}
}

// TestOverlayFormat pins the bytes shared with the peer.
func TestOverlayFormat(t *testing.T) {
	s := virtShare(t, "strict")
	s.uid, s.gid = 0x01020304, 0x0a0b0c0d
	s.mustCreate(rootID, "f", 0o4755)
	if got, want := hostOverlay(t, s.host("f")), "01000000"+"04030201"+"0d0c0b0a"+"ed890000"+"00000000"; got != want {
		t.Errorf("overlay %s, want %s", got, want)
	}
	if _, err := s.mknod(rootID, "dev", unix.S_IFBLK|0o600, 0x0801); err != 0 {
		t.Fatal(err)
	}
	if got, want := hostOverlay(t, s.host("dev")), "01000000"+"04030201"+"0d0c0b0a"+"80610000"+"01080000"; got != want {
		t.Errorf("overlay %s, want %s", got, want)
	}
}

// TestSymlinks: real links with relaxed and off, stand-ins with strict; the
// guest cannot tell.
func TestSymlinks(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		for _, target := range []string{"t", "/etc/passwd", "../../out", strings.Repeat("x", 4095), "sp ace\xff"} {
			l, err := s.symlink(rootID, "l", target)
			s.must(err)
			if l.Attr.Mode != unix.S_IFLNK|0o777 || l.Attr.Size != uint64(len(target)) {
				t.Errorf("link to %.20q: %o, %d bytes", target, l.Attr.Mode, l.Attr.Size)
			}
			if got, err := s.readlink(l.NodeID); err != 0 || got != target {
				t.Errorf("readlink: %.20q, %v", got, err)
			}
			fi, err2 := os.Lstat(s.host("l"))
			if err2 != nil || (fi.Mode().Type() == os.ModeSymlink) != (virt != "strict") {
				t.Errorf("on the host: %v, %v", fi, err2)
			}
			if virt == "strict" && fi.Mode() != 0o600 {
				t.Errorf("stand-in has host mode %v", fi.Mode())
			}
			_, err = s.setattr(l.NodeID, w.SetattrIn{Valid: w.FattrMtime, Mtime: 5, MtimeNsec: 6})
			s.want(err, 0, "times of a link")
			s.mayChown(l.NodeID, 1, 2)
			if a := s.mustAttr(l.NodeID); a.Mtime != 5 || a.MtimeNsec != 6 {
				t.Errorf("times %d.%d", a.Mtime, a.MtimeNsec)
			}
			s.must(s.unlink(rootID, "l"))
		}
		e, _ := s.mustCreate(rootID, "f", 0o600)
		_, err := s.readlink(e.NodeID)
		s.want(err, unix.EINVAL, "readlink of a file")
		_, err = s.readlink(rootID)
		s.want(err, unix.EINVAL, "readlink of a directory")
	})
}

// TestStandInsAreNotFiles: what the guest sees as a link or a device cannot
// be opened, truncated or given attributes.
func TestStandInsAreNotFiles(t *testing.T) {
	s := virtShare(t, "strict")
	link, err := s.symlink(rootID, "link", "target")
	s.must(err)
	nodes := map[string]uint64{"link": link.NodeID}
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK, "chr": unix.S_IFCHR, "blk": unix.S_IFBLK} {
		e, err := s.mknod(rootID, name, mode|0o640, 0x0103)
		s.must(err)
		nodes[name] = e.NodeID
		rdev := uint32(0)
		if mode == unix.S_IFCHR || mode == unix.S_IFBLK {
			rdev = 0x0103
		}
		if e.Attr.Mode != mode|0o640 || e.Attr.Rdev != rdev {
			t.Errorf("%s: mode %o, rdev %#x", name, e.Attr.Mode, e.Attr.Rdev)
		}
		if fi, err := os.Lstat(s.host(name)); err != nil || !fi.Mode().IsRegular() || fi.Mode() != 0o600 {
			t.Errorf("%s on the host: %v, %v", name, fi, err)
		}
		s.want(s.chmod(e.NodeID, 0o604), 0, "chmod of %s", name)
		if a := s.mustAttr(e.NodeID); a.Mode != mode|0o604 {
			t.Errorf("%s after chmod: %o", name, a.Mode)
		}
		for _, d := range s.list(rootID, 4096, false) {
			if d.name == name && d.typ != mode>>12 {
				t.Errorf("%s listed as type %d", name, d.typ)
			}
		}
	}
	for name, node := range nodes {
		if _, err := s.open(node, unix.O_RDWR); err != unix.ENXIO && err != unix.ELOOP {
			t.Errorf("open %s: %v", name, err)
		}
		s.want(s.truncate(node, 0), unix.EINVAL, "truncate %s", name)
		s.want(s.setxattr(node, "user.x", "1", 0), unix.EPERM, "setxattr %s", name)
	}
	if got, _ := s.readlink(link.NodeID); got != "target" {
		t.Errorf("link now reads %q", got)
	}
}

// TestSpecialFilesWithoutOverlay: FIFOs and sockets are real, devices refused.
func TestSpecialFilesWithoutOverlay(t *testing.T) {
	s := virtShare(t, "off")
	s.uid, s.gid = 12, 13
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK} {
		e, err := s.mknod(rootID, name, mode|0o640, 0)
		s.must(err)
		if e.Attr.Mode != mode|0o640 || os.Geteuid() == 0 && e.Attr.UID != 12 {
			t.Errorf("%s: %+v", name, e.Attr)
		}
	}
	for _, mode := range []uint32{unix.S_IFCHR, unix.S_IFBLK} {
		_, err := s.mknod(rootID, "dev", mode|0o600, 0x0103)
		s.want(err, unix.EPERM, "device")
	}
}

// TestIdentityMap: what carries no overlay belongs to the guest's user if it
// is the server's, else to nobody; host modes show through.
func TestIdentityMap(t *testing.T) {
	for _, virt := range []string{"strict", "relaxed"} {
		s := virtShare(t, virt)
		for name, mode := range map[string]os.FileMode{"file": 0o640, "exec": 0o755} {
			if err := os.WriteFile(s.host(name), nil, mode); err != nil {
				t.Fatal(err)
			}
			if a := s.mustLookup(rootID, name).Attr; a.UID != 1000 || a.GID != 1001 || a.Mode != unix.S_IFREG|uint32(mode) {
				t.Errorf("%s: %+v", name, a)
			}
		}
		if err := os.Symlink("x", s.host("link")); err != nil {
			t.Fatal(err)
		}
		l := s.mustLookup(rootID, "link")
		if l.Attr.UID != 1000 || l.Attr.Mode != unix.S_IFLNK|0o777 {
			t.Errorf("link: %+v", l.Attr)
		}
		if got, err := s.readlink(l.NodeID); err != 0 || got != "x" {
			t.Errorf("readlink of a host link: %q, %v", got, err)
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(s.host("file"), 33, 33); err != nil {
				t.Fatal(err)
			}
			if a := s.mustLookup(rootID, "file").Attr; a.UID != nobody || a.GID != nobody {
				t.Errorf("foreign file: %+v", a)
			}
		}
		// A chmod freezes the mapped owner into an overlay.
		e := s.mustLookup(rootID, "exec")
		s.must(s.chmod(e.NodeID, 0o700))
		if a := s.mustAttr(e.NodeID); a.UID != 1000 || a.GID != 1001 || a.Mode != unix.S_IFREG|0o700 {
			t.Errorf("after chmod: %+v", a)
		}
		if fi, _ := os.Stat(s.host("exec")); fi.Mode() != 0o755 {
			t.Errorf("host mode became %v", fi.Mode())
		}
	}
}

func TestIdentityMapIsOffWithOff(t *testing.T) {
	s := virtShare(t, "off")
	if err := os.WriteFile(s.host("f"), nil, 0o640); err != nil {
		t.Fatal(err)
	}
	setHostOverlay(t, s.host("f"), overlay{9, 9, unix.S_IFREG | 0o777, 0}.encode(make([]byte, 20)))
	a := s.mustLookup(rootID, "f").Attr
	if int(a.UID) != os.Geteuid() || a.Mode != unix.S_IFREG|0o640 {
		t.Errorf("attributes: %+v", a)
	}
}

// TestBadOverlay: an attribute that cannot be believed makes the file EIO,
// and it can still be listed and removed.
func TestBadOverlay(t *testing.T) {
	good := overlay{1, 2, unix.S_IFREG | 0o644, 0}.encode(make([]byte, 20))
	bad := map[string][]byte{
		"empty":           {},
		"short":           good[:19],
		"long":            append(append([]byte{}, good...), 0),
		"much too long":   make([]byte, 300),
		"version 2":       append([]byte{2}, good[1:]...),
		"directory":       overlay{1, 2, unix.S_IFDIR | 0o755, 0}.encode(make([]byte, 20)),
		"unknown type":    overlay{1, 2, 0o170000, 0}.encode(make([]byte, 20)),
		"zero everything": make([]byte, 20),
	}
	for what, value := range bad {
		s := virtShare(t, "strict")
		if err := os.WriteFile(s.host("f"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		setHostOverlay(t, s.host("f"), value)
		_, err := s.lookup(rootID, "f")
		s.want(err, unix.EIO, "%s", what)
		if list := s.list(rootID, 4096, true); len(list) != 1 || list[0].node != 0 {
			t.Errorf("%s: listed as %+v", what, list)
		}
		s.want(s.unlink(rootID, "f"), 0, "unlink with %s", what)
		if n := s.srv.fds.Load(); n != 1 {
			t.Errorf("%s: %d descriptors held", what, n)
		}
	}
	s := virtShare(t, "strict")
	if err := os.Mkdir(s.host("d"), 0o700); err != nil {
		t.Fatal(err)
	}
	setHostOverlay(t, s.host("d"), good)
	_, err := s.lookup(rootID, "d")
	s.want(err, unix.EIO, "a directory that says it is a file")
}

// TestOverlayIsCachedByCtime: another writer's change is seen at the next
// GETATTR, and an unchanged inode costs no attribute read.
func TestOverlayIsCachedByCtime(t *testing.T) {
	s := virtShare(t, "strict")
	e, _ := s.mustCreate(rootID, "f", 0o600)
	for i := range uint32(50) {
		setHostOverlay(t, s.host("f"), overlay{i, i + 1, unix.S_IFREG | i, 0}.encode(make([]byte, 20)))
		if a := s.mustAttr(e.NodeID); a.UID != i || a.GID != i+1 || a.Mode != unix.S_IFREG|i {
			t.Fatalf("change %d not seen: %+v", i, a)
		}
	}
	if err := unix.Removexattr(s.host("f"), "user.msb.override_stat"); err != nil {
		t.Fatal(err)
	}
	if a := s.mustAttr(e.NodeID); a.UID != 1000 || a.Mode != unix.S_IFREG|0o600 {
		t.Errorf("removal not seen: %+v", a)
	}
}

// TestWithoutXattrat forces the way of kernels before 6.13.
func TestWithoutXattrat(t *testing.T) {
	s := virtShare(t, "strict")
	s.srv.xattrat = false
	e, _ := s.mustCreate(rootID, "f", 0o640)
	s.must(s.chown(e.NodeID, 5, 6))
	d, err := s.mkdir(rootID, "d", 0o711)
	s.must(err)
	s.must(s.setxattr(e.NodeID, "user.k", "v", 0))
	if v, err := s.getxattr(e.NodeID, "user.k", 10); err != 0 || v != "v" {
		t.Errorf("getxattr: %q, %v", v, err)
	}
	if l, err := s.listxattr(e.NodeID, 100); err != 0 || l != "user.k\x00" {
		t.Errorf("listxattr: %q, %v", l, err)
	}
	s.must(s.removexattr(e.NodeID, "user.k"))
	if a := s.mustAttr(e.NodeID); a.UID != 5 || a.Mode != unix.S_IFREG|0o640 {
		t.Errorf("file: %+v", a)
	}
	if a := s.mustAttr(d.NodeID); a.Mode != unix.S_IFDIR|0o711 {
		t.Errorf("directory: %+v", a)
	}
}
