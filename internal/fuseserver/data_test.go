package fuseserver

import (
	"bytes"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func pattern(n int) string {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}

// TestLargePayloads: 1 MiB in 4 KiB pieces, and more pieces than one system
// call takes, arrive whole.
func TestLargePayloads(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	data := pattern(1<<20 + 4321)
	if n, err := s.write(e.NodeID, fh, 100, data); err != 0 || int(n) != len(data) {
		t.Fatalf("wrote %d, %v", n, err)
	}
	if got, err := s.read(e.NodeID, fh, 100, uint32(len(data))); err != 0 || got != data {
		t.Errorf("read %d bytes, %v; equal %v", len(got), err, got == data)
	}
	if b, err := os.ReadFile(s.host("f")); err != nil || string(b[100:]) != data {
		t.Error("the host sees other bytes")
	}
	pieces := func(data []byte, size int) [][]byte {
		var v [][]byte
		for len(data) > 0 {
			v = append(v, data[:min(size, len(data))])
			data = data[min(size, len(data)):]
		}
		return v
	}
	small := []byte(pattern(5000))
	in := append([][]byte{pack(w.WriteIn{Fh: fh, Offset: 7, Size: 5000}, w.Append)}, pieces(small, 2)...)
	if b, err := s.do(w.OpWrite, e.NodeID, 8, in...); err != 0 || b[0] != 5000%256 || b[1] != 5000/256 {
		t.Fatalf("write in 2500 pieces: % x, %v", b, err)
	}
	msg := message(w.OpRead, e.NodeID, pack(w.ReadIn{Fh: fh, Offset: 7, Size: 5000}, w.Append), nil)
	out := make([]byte, replySize+5000)
	if used := s.raw([][]byte{msg}, pieces(out, 2)); used != len(out) || !bytes.Equal(out[replySize:], small) {
		t.Errorf("read into 2500 pieces: used %d", used)
	}
}

func TestReadAtTheEnd(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.write(e.NodeID, fh, 0, "12345")
	for _, tt := range []struct {
		off  uint64
		want string
	}{{0, "12345"}, {3, "45"}, {5, ""}, {1 << 40, ""}} {
		if got, err := s.read(e.NodeID, fh, tt.off, 4096); err != 0 || got != tt.want {
			t.Errorf("at %d: %q, %v", tt.off, got, err)
		}
	}
	if got, err := s.read(e.NodeID, fh, 0, 0); err != 0 || got != "" {
		t.Errorf("no bytes: %q, %v", got, err)
	}
	wr, err := s.open(e.NodeID, unix.O_WRONLY)
	s.must(err)
	_, err = s.read(e.NodeID, wr, 0, 1)
	s.want(err, unix.EBADF, "read of a write-only handle")
	rd, err := s.open(e.NodeID, unix.O_RDONLY)
	s.must(err)
	_, err = s.write(e.NodeID, rd, 0, "x")
	s.want(err, unix.EBADF, "write to a read-only handle")
}

// TestColdReads: what is not in the page cache comes from a worker, whole.
func TestColdReads(t *testing.T) {
	s := newShare(t, nil)
	data := pattern(300_000)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	if _, err := s.write(e.NodeID, fh, 0, data); err != 0 {
		t.Fatal(err)
	}
	_, err := s.do(w.OpFsync, e.NodeID, 0, pack(w.FsyncIn{Fh: fh}, w.Append))
	s.must(err)
	f, oserr := os.Open(s.host("f"))
	if oserr != nil {
		t.Fatal(oserr)
	}
	defer f.Close()
	var queues sync.WaitGroup
	for range 4 {
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		queues.Go(func() {
			c := newClient(t, s.srv)
			for off := 0; off < len(data); off += 100_000 {
				if got, err := c.read(e.NodeID, fh, uint64(off), 100_000); err != 0 || got != data[off:off+100_000] {
					t.Errorf("at %d: %d bytes, %v", off, len(got), err)
				}
			}
		})
	}
	queues.Wait()
}

// TestAppend: O_APPEND of the moment of the write decides, whatever offset
// the guest names; pages from its cache keep their place.
func TestAppend(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.write(e.NodeID, fh, 0, "base")
	ap, err := s.open(e.NodeID, unix.O_WRONLY|unix.O_APPEND)
	s.must(err)
	for _, tt := range []struct {
		in   w.WriteIn
		want string
	}{
		{w.WriteIn{Fh: ap, Offset: 0, Flags: unix.O_APPEND}, "base++"},
		{w.WriteIn{Fh: ap, Offset: 0}, "++se++"},
		{w.WriteIn{Fh: fh, Offset: 0, Flags: unix.O_APPEND}, "++se++++"},
		{w.WriteIn{Fh: ap, Offset: 2, Flags: unix.O_APPEND, WriteFlags: w.WriteCache}, "++++++++"},
	} {
		if _, err := s.writeWith(e.NodeID, tt.in, "++"); err != 0 {
			t.Fatal(err)
		}
		if got, _ := s.read(e.NodeID, fh, 0, 100); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestSyncWrites(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	for _, flags := range []uint32{unix.O_SYNC, unix.O_DSYNC} {
		if n, err := s.writeWith(e.NodeID, w.WriteIn{Fh: fh, Flags: flags}, "data"); err != 0 || n != 4 {
			t.Errorf("flags %#x: %d, %v", flags, n, err)
		}
		sy, err := s.open(e.NodeID, unix.O_WRONLY|flags)
		s.must(err)
		if n, err := s.write(e.NodeID, sy, 4, "more"); err != 0 || n != 4 {
			t.Errorf("opened with %#x: %d, %v", flags, n, err)
		}
	}
	if got, _ := s.read(e.NodeID, fh, 0, 100); got != "datamore" {
		t.Errorf("content %q", got)
	}
	for _, op := range []w.Opcode{w.OpFsync, w.OpFlush} {
		_, err := s.do(op, e.NodeID, 0, pack(w.FlushIn{Fh: fh}, w.Append))
		s.must(err)
	}
	_, err := s.do(w.OpFsync, e.NodeID, 0, pack(w.FsyncIn{Fh: fh, Flags: w.FsyncDatasync}, w.Append))
	s.must(err)
	dir, err := s.opendir(rootID)
	s.must(err)
	_, err = s.do(w.OpFsyncdir, rootID, 0, pack(w.FsyncIn{Fh: dir}, w.Append))
	s.must(err)
	_, err = s.do(w.OpSyncfs, rootID, 0, pack(w.SyncfsIn{}, w.Append))
	s.must(err)
}

func TestTruncate(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.write(e.NodeID, fh, 0, "1234567890")
	s.must(s.truncate(e.NodeID, 4))
	s.must(s.truncate(e.NodeID, 8))
	if got, _ := s.read(e.NodeID, fh, 0, 100); got != "1234\x00\x00\x00\x00" {
		t.Errorf("content %q", got)
	}
	rd, err := s.open(e.NodeID, unix.O_RDONLY)
	s.must(err)
	for _, h := range []uint64{fh, rd} {
		a, err := s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrSize | w.FattrFh, Fh: h, Size: 2})
		if err != 0 || a.Size != 2 {
			t.Errorf("through handle %d: %d bytes, %v", h, a.Size, err)
		}
	}
	_, err = s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrSize | w.FattrFh, Fh: 999, Size: 2})
	s.want(err, unix.EBADF, "truncate through no handle")
	tr, err := s.open(e.NodeID, unix.O_RDWR|unix.O_TRUNC)
	s.must(err)
	if a := s.mustAttr(e.NodeID); a.Size != 0 {
		t.Errorf("O_TRUNC left %d bytes", a.Size)
	}
	s.must(s.release(e.NodeID, tr))
	// Freeing much goes through a worker.
	s.must(s.truncate(e.NodeID, 4<<30))
	a, err := s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrSize | w.FattrMode | w.FattrMtime, Mode: 0o640, Mtime: 7})
	if err != 0 || a.Size != 0 || a.Mode&0o777 != 0o640 || a.Mtime != 7 {
		t.Errorf("huge truncate: %+v, %v", a, err)
	}
	s.must(s.truncate(e.NodeID, 4<<30))
	if _, err := s.open(e.NodeID, unix.O_WRONLY|unix.O_TRUNC); err != 0 || s.mustAttr(e.NodeID).Size != 0 {
		t.Errorf("huge O_TRUNC: %v", err)
	}
}

// TestHugeDeletedFile: its last descriptor is closed by a worker.
func TestHugeDeletedFile(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.must(s.truncate(e.NodeID, 1<<30))
	s.must(s.unlink(rootID, "f"))
	s.must(s.release(e.NodeID, fh))
	s.forget(e.NodeID, 1)
}

func TestSparseFiles(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.write(e.NodeID, fh, 1<<20, "data")
	seek := func(off uint64, whence uint32) (uint64, errno) {
		b, err := s.do(w.OpLseek, e.NodeID, 8, pack(w.LseekIn{Fh: fh, Offset: off, Whence: whence}, w.Append))
		var o w.LseekOut
		w.Decode(b, &o)
		return o.Offset, err
	}
	if off, err := seek(0, unix.SEEK_DATA); err != 0 || off != 1<<20 {
		t.Errorf("SEEK_DATA: %d, %v", off, err)
	}
	if off, err := seek(1<<20, unix.SEEK_HOLE); err != 0 || off < 1<<20+4 {
		t.Errorf("SEEK_HOLE: %d, %v", off, err)
	}
	_, err := seek(1<<30, unix.SEEK_DATA)
	s.want(err, unix.ENXIO, "SEEK_DATA beyond the end")
	falloc := func(mode uint32, off, length uint64) errno {
		_, err := s.do(w.OpFallocate, e.NodeID, 0, pack(w.FallocateIn{Fh: fh, Mode: mode, Offset: off, Length: length}, w.Append))
		return err
	}
	s.must(falloc(unix.FALLOC_FL_KEEP_SIZE, 2<<20, 4096))
	if a := s.mustAttr(e.NodeID); a.Size != 1<<20+4 {
		t.Errorf("KEEP_SIZE changed the size to %d", a.Size)
	}
	s.must(falloc(0, 2<<20, 4096))
	if a := s.mustAttr(e.NodeID); a.Size != 2<<20+4096 {
		t.Errorf("allocated to %d", a.Size)
	}
	s.must(falloc(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<20, 4096))
	if got, _ := s.read(e.NodeID, fh, 1<<20, 4); got != "\x00\x00\x00\x00" {
		t.Errorf("punched: %q", got)
	}
}

func TestCopyFileRange(t *testing.T) {
	s := newShare(t, nil)
	a, afh := s.mustCreate(rootID, "a", 0o600)
	b, bfh := s.mustCreate(rootID, "b", 0o600)
	data := pattern(100_000)
	s.write(a.NodeID, afh, 0, data)
	in := w.CopyFileRangeIn{FhIn: afh, OffIn: 10, FhOut: bfh, NodeIDOut: b.NodeID, OffOut: 20, Len: 1 << 60}
	out, err := s.do(w.OpCopyFileRange, a.NodeID, 8, pack(in, w.Append))
	s.must(err)
	var n w.WriteOut
	w.Decode(out, &n)
	if int(n.Size) != len(data)-10 {
		t.Errorf("copied %d", n.Size)
	}
	if got, _ := s.read(b.NodeID, bfh, 20, 200_000); got != data[10:] {
		t.Error("other bytes arrived")
	}
}

func TestXattrs(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		f, _ := s.mustCreate(rootID, "f", 0o600)
		d, err := s.mkdir(rootID, "d", 0o700)
		s.must(err)
		for _, node := range []uint64{f.NodeID, d.NodeID} {
			s.must(s.setxattr(node, "user.one", "1", 0))
			s.must(s.setxattr(node, "user.two", strings.Repeat("2", 100), 0))
			s.must(s.setxattr(node, "user.empty", "", 0))
			s.want(s.setxattr(node, "user.one", "x", unix.XATTR_CREATE), unix.EEXIST, "XATTR_CREATE")
			s.want(s.setxattr(node, "user.none", "x", unix.XATTR_REPLACE), unix.ENODATA, "XATTR_REPLACE")
			if v, err := s.getxattr(node, "user.two", 4096); err != 0 || v != strings.Repeat("2", 100) {
				t.Errorf("getxattr: %q, %v", v, err)
			}
			if v, err := s.getxattr(node, "user.two", 0); err != 0 || v != "\x64\x00\x00\x00\x00\x00\x00\x00" {
				t.Errorf("size: %q, %v", v, err)
			}
			_, err := s.getxattr(node, "user.two", 99)
			s.want(err, unix.ERANGE, "getxattr into too few bytes")
			_, err = s.getxattr(node, "user.none", 10)
			s.want(err, unix.ENODATA, "getxattr of nothing")
			list, err := s.listxattr(node, 4096)
			s.must(err)
			if got := strings.Split(strings.TrimSuffix(list, "\x00"), "\x00"); len(got) != 3 || strings.Contains(list, "msb") {
				t.Errorf("listxattr: %q", list)
			}
			if v, err := s.listxattr(node, 0); err != 0 || int(v[0]) != len(list) {
				t.Errorf("list size: %q, want %d", v, len(list))
			}
			_, err = s.listxattr(node, uint32(len(list)-1))
			s.want(err, unix.ERANGE, "listxattr into too few bytes")
			s.must(s.removexattr(node, "user.one"))
			s.want(s.removexattr(node, "user.one"), unix.ENODATA, "remove twice")
		}
	})
}

// TestReservedXattrs: the overlay and everything of its prefix do not exist
// for the guest; other name spaces are not served.
func TestReservedXattrs(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		e, _ := s.mustCreate(rootID, "f", 0o600)
		before := hostOverlay(t, s.host("f"))
		for _, name := range []string{"user.msb.override_stat", "user.msb._probe", "user.msb.x"} {
			_, err := s.getxattr(e.NodeID, name, 100)
			s.want(err, unix.ENODATA, "get %s", name)
			s.want(s.setxattr(e.NodeID, name, "x", 0), unix.EPERM, "set %s", name)
			s.want(s.removexattr(e.NodeID, name), unix.EPERM, "remove %s", name)
		}
		for _, name := range []string{"security.capability", "security.selinux", "trusted.x", "system.posix_acl_access",
			"system.posix_acl_default", "USER.x", "userx", "user", "x"} {
			_, err := s.getxattr(e.NodeID, name, 100)
			s.want(err, unix.EOPNOTSUPP, "get %s", name)
			s.want(s.setxattr(e.NodeID, name, "x", 0), unix.EOPNOTSUPP, "set %s", name)
			s.want(s.removexattr(e.NodeID, name), unix.EOPNOTSUPP, "remove %s", name)
		}
		s.want(s.setxattr(e.NodeID, "user."+strings.Repeat("n", 251), "x", 0), unix.ERANGE, "name of 256 bytes")
		if l, err := s.listxattr(e.NodeID, 0); err != 0 || l[0] != 0 {
			t.Errorf("list size %v, %v", l, err)
		}
		if after := hostOverlay(t, s.host("f")); after != before {
			t.Errorf("overlay changed from %s to %s", before, after)
		}
	})
}
