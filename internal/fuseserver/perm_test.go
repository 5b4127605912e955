package fuseserver

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

func hostMode(t testing.TB, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Mode & 0o7777
}

// TestHostPermissions: what the guest's modes become on the host.
func TestHostPermissions(t *testing.T) {
	type row struct{ file, dir uint32 } // host modes after create with 04715 and mkdir with 01015
	tests := map[string]struct {
		virt, perms         string
		asRoot              bool
		made, zero          row // after making; after chmod 0
		guestFile, guestDir uint32
	}{
		"private":      {"strict", "private", true, row{0o600, 0o700}, row{0o600, 0o700}, 0o4715, 0o1015},
		"mirror":       {"strict", "mirror", true, row{0o715, 0o715}, row{0o600, 0o700}, 0o4715, 0o1015},
		"off, as user": {"off", "", false, row{0o715, 0o715}, row{0o600, 0o700}, 0o715, 0o715},
		"off, as root": {"off", "", true, row{0o715, 0o1015}, row{0, 0}, 0o715, 0o1015},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.asRoot {
				prereq.Root(t, "give files away")
			}
			s := newShare(t, func(c *Config) { c.StatVirt, c.HostPerms, c.AsRoot = tt.virt, tt.perms, tt.asRoot })
			f, _ := s.mustCreate(rootID, "f", 0o4715)
			d, err := s.mkdir(rootID, "d", 0o1015)
			s.must(err)
			m, err := s.mknod(rootID, "m", unix.S_IFREG|0o4715, 0)
			s.must(err)
			if got := (row{hostMode(t, s.host("f")), hostMode(t, s.host("d"))}); got != tt.made {
				t.Errorf("made: %o, want %o", got, tt.made)
			}
			if hostMode(t, s.host("m")) != tt.made.file {
				t.Errorf("mknod: %o", hostMode(t, s.host("m")))
			}
			if f.Attr.Mode&0o7777 != tt.guestFile || m.Attr.Mode&0o7777 != tt.guestFile || d.Attr.Mode&0o7777 != tt.guestDir {
				t.Errorf("the guest sees %o, %o, %o", f.Attr.Mode, m.Attr.Mode, d.Attr.Mode)
			}
			s.must(s.chmod(f.NodeID, 0))
			s.must(s.chmod(d.NodeID, 0))
			if got := (row{hostMode(t, s.host("f")), hostMode(t, s.host("d"))}); got != tt.zero {
				t.Errorf("after chmod 0: %o, want %o", got, tt.zero)
			}
			if _, err := s.open(f.NodeID, unix.O_RDWR); err != 0 {
				t.Errorf("open of mode 0: %v", err)
			}
			if _, _, err := s.create(d.NodeID, "in", unix.O_RDWR, 0o600); err != 0 {
				t.Errorf("create in a directory of mode 0: %v", err)
			}
		})
	}
}

// TestReadOnlyModeIsWritableByItsCreator: the creating descriptor is the handle.
func TestReadOnlyModeIsWritableByItsCreator(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		e, fh, err := s.create(rootID, "f", unix.O_RDWR|unix.O_EXCL, 0o400)
		s.must(err)
		if _, err := s.write(e.NodeID, fh, 0, "data"); err != 0 {
			t.Errorf("write through the creating handle: %v", err)
		}
	})
}

func TestOwners(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		if virt == "off" {
			prereq.Root(t, "give files away")
		}
		s := virtShare(t, virt)
		s.uid, s.gid = 1234, 5678
		f, _ := s.mustCreate(rootID, "f", 0o640)
		d, err := s.mkdir(rootID, "d", 0o750)
		s.must(err)
		m, err := s.mknod(rootID, "m", unix.S_IFREG|0o600, 0)
		s.must(err)
		l, err := s.symlink(rootID, "l", "x")
		s.must(err)
		for name, e := range map[string]w.EntryOut{"f": f, "d": d, "m": m, "l": l} {
			if virt == "relaxed" && name == "l" {
				continue // a real link shows the identity map
			}
			if e.Attr.UID != 1234 || e.Attr.GID != 5678 {
				t.Errorf("%s belongs to %d:%d", name, e.Attr.UID, e.Attr.GID)
			}
			s.must(s.chown(e.NodeID, 42, 43))
			if a := s.mustAttr(e.NodeID); a.UID != 42 || a.GID != 43 {
				t.Errorf("%s after chown: %d:%d", name, a.UID, a.GID)
			}
			_, err := s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrGID, GID: 44})
			s.must(err)
			if a := s.mustAttr(e.NodeID); a.UID != 42 || a.GID != 44 {
				t.Errorf("%s after chgrp: %d:%d", name, a.UID, a.GID)
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(s.host("f"), &st); err != nil {
			t.Fatal(err)
		}
		if onHost := st.Uid == 42; onHost != (virt == "off") {
			t.Errorf("on the host f belongs to %d", st.Uid)
		}
	})
}

// TestSetgidDirectory: group and bit are inherited, and nobody gets a setgid
// file of a group he may not be in.
func TestSetgidDirectory(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		if virt == "off" {
			prereq.Root(t, "give files away")
		}
		s := virtShare(t, virt)
		d, err := s.mkdir(rootID, "d", 0o755)
		s.must(err)
		s.must(s.chown(d.NodeID, 0, 77))
		s.must(s.chmod(d.NodeID, 0o2777))
		for _, tt := range []struct {
			what     string
			uid, gid uint32
			mode     uint32
			want     uint32
		}{
			{"stranger, setgid executable", 1000, 1000, 0o2755, 0o755},
			{"stranger, setgid not executable", 1000, 1000, 0o2644, 0o2644},
			{"member", 1000, 77, 0o2755, 0o2755},
			{"root", 0, 0, 0o2755, 0o2755},
		} {
			s.uid, s.gid = tt.uid, tt.gid
			f, _ := s.mustCreate(d.NodeID, "f", tt.mode)
			m, err := s.mknod(d.NodeID, "m", unix.S_IFREG|tt.mode, 0)
			s.must(err)
			sub, err := s.mkdir(d.NodeID, "sub", 0o755)
			s.must(err)
			if virt == "off" {
				tt.want &^= unix.S_ISUID | unix.S_ISGID
			}
			for name, e := range map[string]w.EntryOut{"f": f, "m": m} {
				if e.Attr.GID != 77 || e.Attr.Mode&0o7777 != tt.want || e.Attr.UID != tt.uid {
					t.Errorf("%s: %s is %d:%d %o, want %o", tt.what, name, e.Attr.UID, e.Attr.GID, e.Attr.Mode, tt.want)
				}
			}
			if sub.Attr.GID != 77 || sub.Attr.Mode&0o7777 != 0o2755 {
				t.Errorf("%s: sub is %d %o", tt.what, sub.Attr.GID, sub.Attr.Mode)
			}
			s.uid, s.gid = 0, 0
			s.must(s.unlink(d.NodeID, "f"))
			s.must(s.unlink(d.NodeID, "m"))
			s.must(s.rmdir(d.NodeID, "sub"))
		}
	})
}

// TestKillPrivileges: set-id bits go when a caller without CAP_FSETID changes
// the data, and when the owner changes; in the overlay and on the host.
func TestKillPrivileges(t *testing.T) {
	const setid = 0o6755
	events := map[string]func(s *share, node, fh uint64) errno{
		"write": func(s *share, node, fh uint64) errno {
			_, err := s.writeWith(node, w.WriteIn{Fh: fh, WriteFlags: w.WriteKillSuidgid}, "x")
			return err
		},
		"truncate": func(s *share, node, fh uint64) errno {
			_, err := s.setattr(node, w.SetattrIn{Valid: w.FattrSize | w.FattrKillSuidgid, Size: 1})
			return err
		},
		"open with O_TRUNC": func(s *share, node, fh uint64) errno {
			_, err := s.do(w.OpOpen, node, 16, pack(w.OpenIn{Flags: unix.O_WRONLY | unix.O_TRUNC, OpenFlags: w.OpenKillSuidgid}, w.Append))
			return err
		},
		"chown":  func(s *share, node, fh uint64) errno { return s.chown(node, 9, 9) },
		"chgrp0": func(s *share, node, fh uint64) errno { return s.chown(node, 0, 0) },
		"fallocate": func(s *share, node, fh uint64) errno {
			s.uid = 1000
			defer func() { s.uid = 0 }()
			_, err := s.do(w.OpFallocate, node, 0, pack(w.FallocateIn{Fh: fh, Length: 10}, w.Append))
			return err
		},
	}
	eachVirt(t, func(t *testing.T, virt string) {
		if virt == "off" {
			prereq.Root(t, "give files away")
		}
		for what, event := range events {
			for _, mode := range []uint32{setid, 0o2644, 0o755} {
				s := virtShare(t, virt)
				e, fh := s.mustCreate(rootID, "f", 0o600)
				s.must(s.chmod(e.NodeID, mode))
				if virt == "off" { // only the host can have set the bits
					if err := unix.Chmod(s.host("f"), mode); err != nil {
						t.Fatal(err)
					}
				}
				if a := s.mustAttr(e.NodeID); a.Mode&0o7777 != mode {
					t.Fatalf("chmod %o gave %o", mode, a.Mode)
				}
				s.want(event(s, e.NodeID, fh), 0, "%s", what)
				want := mode &^ unix.S_ISUID
				if mode&unix.S_IXGRP != 0 {
					want &^= unix.S_ISGID
				}
				if a := s.mustAttr(e.NodeID); a.Mode&0o7777 != want {
					t.Errorf("%s on %o: %o, want %o", what, mode, a.Mode&0o7777, want)
				}
			}
		}
		// A caller with CAP_FSETID keeps them.
		s := virtShare(t, virt)
		e, fh := s.mustCreate(rootID, "f", 0o600)
		s.must(s.chmod(e.NodeID, setid))
		if virt == "off" {
			if err := unix.Chmod(s.host("f"), setid); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.write(e.NodeID, fh, 0, "x"); err != 0 {
			t.Fatal(err)
		}
		if a := s.mustAttr(e.NodeID); a.Mode&0o7777 != setid {
			t.Errorf("a privileged write left %o", a.Mode&0o7777)
		}
		d, err := s.mkdir(rootID, "d", 0o755)
		s.must(err)
		s.must(s.chmod(d.NodeID, 0o2755))
		s.must(s.chown(d.NodeID, 3, 3))
		if a := s.mustAttr(d.NodeID); a.Mode&0o7777 != 0o2755 {
			t.Errorf("a directory lost its setgid bit to chown: %o", a.Mode&0o7777)
		}
	})
}

// TestHostSetidFileIsCleared: a set-id file that the host made and that has no
// overlay is cleared on the host, also by a server that may keep the bits.
func TestHostSetidFileIsCleared(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		if err := os.WriteFile(s.host("f"), []byte("x"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Chmod(s.host("f"), 0o4755); err != nil {
			t.Fatal(err)
		}
		e := s.mustLookup(rootID, "f")
		fh, err := s.open(e.NodeID, unix.O_WRONLY)
		s.must(err)
		if _, err := s.writeWith(e.NodeID, w.WriteIn{Fh: fh, WriteFlags: w.WriteKillSuidgid}, "y"); err != 0 {
			t.Fatal(err)
		}
		if m := hostMode(t, s.host("f")); m != 0o755 {
			t.Errorf("host mode %o", m)
		}
	})
}

func TestAccess(t *testing.T) {
	s := newShare(t, nil)
	e, _ := s.mustCreate(rootID, "f", 0o640)
	s.must(s.chown(e.NodeID, 10, 20))
	for _, tt := range []struct {
		uid, gid, mask uint32
		err            errno
	}{
		{0, 0, unix.R_OK | unix.W_OK, 0}, {0, 0, unix.X_OK, unix.EACCES},
		{10, 1, unix.R_OK | unix.W_OK, 0}, {10, 1, unix.X_OK, unix.EACCES},
		{11, 20, unix.R_OK, 0}, {11, 20, unix.W_OK, unix.EACCES},
		{11, 21, unix.R_OK, unix.EACCES}, {11, 21, 0, 0},
	} {
		s.uid, s.gid = tt.uid, tt.gid
		_, err := s.do(w.OpAccess, e.NodeID, 0, pack(w.AccessIn{Mask: tt.mask}, w.Append))
		s.want(err, tt.err, "%d:%d mask %o", tt.uid, tt.gid, tt.mask)
	}
}

func TestTimes(t *testing.T) {
	s := newShare(t, nil)
	e, _ := s.mustCreate(rootID, "f", 0o600)
	past := int64(-12345)
	a, err := s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrAtime | w.FattrMtime,
		Atime: 1 << 33, AtimeNsec: 999_999_999, Mtime: uint64(past), MtimeNsec: 1})
	s.must(err)
	if a.Atime != 1<<33 || a.AtimeNsec != 999_999_999 || int64(a.Mtime) != past || a.MtimeNsec != 1 {
		t.Errorf("times: %+v", a)
	}
	a, err = s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrAtime | w.FattrAtimeNow})
	s.must(err)
	if a.Atime < 1_700_000_000 || a.Atime > 1<<32 || int64(a.Mtime) != past {
		t.Errorf("atime now: %+v", a)
	}
}
