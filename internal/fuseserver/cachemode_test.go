package fuseserver

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// TestCacheModes: every reply says how long it may be kept, and every handle
// what becomes of pages.
func TestCacheModes(t *testing.T) {
	const plus = w.InitReaddirplus | w.InitReaddirplusAuto
	for mode, want := range map[string]struct {
		sec       uint64
		nsec      uint32
		file, dir uint32
		flags     w.InitFlags
	}{
		"auto":   {0, 900e6, 0, 0, w.InitAutoInvalData | plus},
		"none":   {0, 0, w.FopenDirectIO, 0, w.InitAutoInvalData},
		"always": {86400, 0, w.FopenKeepCache, w.FopenKeepCache | w.FopenCacheDir, w.InitCacheSymlinks | plus},
	} {
		t.Run(mode, func(t *testing.T) {
			s := newShare(t, func(c *Config) { c.Cache = mode })
			if out := s.init(); w.InitFlags(out.Flags)&(w.InitAutoInvalData|w.InitCacheSymlinks|plus) != want.flags {
				t.Errorf("flags %#x", out.Flags)
			}
			for what, e := range entryReplies(s) {
				if e.EntryValid != want.sec || e.EntryValidNsec != want.nsec || e.AttrValid != want.sec || e.AttrValidNsec != want.nsec {
					t.Errorf("%s: name valid for %d.%09d s, attributes for %d.%09d s", what, e.EntryValid, e.EntryValidNsec, e.AttrValid, e.AttrValidNsec)
				}
			}
			for what, a := range attrReplies(s) {
				if a.AttrValid != want.sec || a.AttrValidNsec != want.nsec {
					t.Errorf("%s: valid for %d.%09d s", what, a.AttrValid, a.AttrValidNsec)
				}
			}
			for what, got := range openReplies(s) {
				flags := want.file
				if what == "opendir" {
					flags = want.dir
				}
				if got != flags {
					t.Errorf("%s: open flags %#x, want %#x", what, got, flags)
				}
			}
		})
	}
}

// entryReplies are the entries in the replies to everything that gives one.
func entryReplies(s *share) map[string]w.EntryOut {
	all := map[string]w.EntryOut{}
	add := func(what string, e w.EntryOut, err errno) {
		s.must(err)
		all[what] = e
	}
	e, _, err := s.create(rootID, "f", unix.O_RDWR, 0o600)
	add("create", e, err)
	e, err = s.lookup(rootID, "f")
	add("lookup", e, err)
	e, err = s.link(e.NodeID, rootID, "hard")
	add("link", e, err)
	e, err = s.mkdir(rootID, "d", 0o700)
	add("mkdir", e, err)
	e, err = s.symlink(rootID, "sym", "f")
	add("symlink", e, err)
	e, err = s.mknod(rootID, "fifo", unix.S_IFIFO|0o600, 0)
	add("mknod", e, err)
	fh, err := s.opendir(rootID)
	s.must(err)
	b, err := s.do(w.OpReaddirplus, rootID, 4096, pack(w.ReadIn{Fh: fh, Size: 4096}, w.Append))
	s.must(err)
	for len(b) > 0 {
		var e w.EntryOut
		var d w.Dirent
		b, _ = w.Decode(b, &e)
		rest, _ := w.Decode(b, &d)
		if name := string(rest[:d.Namelen]); e.NodeID != 0 {
			all["readdirplus of "+name] = e
		}
		b = b[w.DirentLen(int(d.Namelen)):]
	}
	return all
}

// attrReplies are the replies that hold attributes alone.
func attrReplies(s *share) map[string]w.AttrOut {
	node := s.mustLookup(rootID, "f").NodeID
	all := map[string]w.AttrOut{}
	add := func(what string, b []byte, err errno) {
		s.must(err)
		var a w.AttrOut
		w.Decode(b, &a)
		all[what] = a
	}
	b, err := s.do(w.OpGetattr, node, w.AttrOutSize, pack(w.GetattrIn{}, w.Append))
	add("getattr", b, err)
	b, err = s.do(w.OpSetattr, node, w.AttrOutSize, pack(w.SetattrIn{Valid: w.FattrMode, Mode: 0o640}, w.Append))
	add("setattr", b, err)
	b, err = s.do(w.OpStatx, node, w.StatxOutSize, pack(w.StatxIn{}, w.Append))
	s.must(err)
	var x w.StatxOut
	w.Decode(b, &x)
	all["statx"] = w.AttrOut{AttrValid: x.AttrValid, AttrValidNsec: x.AttrValidNsec}
	return all
}

// openReplies are the open flags of handles, however they were made; the file
// changes in between, which the flags must not depend on.
func openReplies(s *share) map[string]uint32 {
	all := map[string]uint32{}
	open := func(what string, op w.Opcode, node uint64, flags uint32) {
		b, err := s.do(op, node, w.OpenOutSize, pack(w.OpenIn{Flags: flags}, w.Append))
		s.must(err)
		var o w.OpenOut
		w.Decode(b, &o)
		all[what] = o.OpenFlags
	}
	node := s.mustLookup(rootID, "f").NodeID
	open("open", w.OpOpen, node, unix.O_RDONLY)
	if err := os.WriteFile(s.host("f"), []byte("changed by another"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	open("open of a changed file", w.OpOpen, node, unix.O_RDWR)
	open("open to append", w.OpOpen, node, unix.O_WRONLY|unix.O_APPEND)
	open("open and truncate", w.OpOpen, node, unix.O_RDWR|unix.O_TRUNC)
	open("opendir", w.OpOpendir, rootID, 0)
	b, err := s.do(w.OpCreate, rootID, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_CREAT, Mode: unix.S_IFREG | 0o600}, w.Append), z("g"))
	s.must(err)
	var e w.EntryOut
	var o w.OpenOut
	rest, _ := w.Decode(b, &e)
	w.Decode(rest, &o)
	all["create"] = o.OpenFlags
	return all
}
