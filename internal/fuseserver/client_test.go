package fuseserver

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

func TestMain(m *testing.M) {
	unix.Umask(0)
	if config := os.Getenv(serveEnv); config != "" {
		os.Exit(serveFuse(config))
	}
	if spec := os.Getenv(lockEnv); spec != "" {
		os.Exit(lockProgram(spec))
	}
	os.Exit(m.Run())
}

// share is a directory with a server and a guest that speaks to it.
type share struct {
	*client
	dir string
	srv *Server
}

// newShare serves a fresh directory. The server's invariants are checked at
// the end: closing it gives every descriptor back.
func newShare(t testing.TB, change func(*Config)) *share {
	t.Helper()
	return serveDir(t, t.TempDir(), change)
}

func serveDir(t testing.TB, dir string, change func(*Config)) *share {
	t.Helper()
	root := openDir(t, dir)
	proc := openDir(t, "/proc/self/fd")
	cfg := Config{Root: root, ProcSelfFd: proc, AsRoot: os.Geteuid() == 0, GuestUID: 1000, GuestGID: 1001,
		Logf: func(f string, a ...any) { t.Logf(f, a...) }}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if n := s.fds.Load(); n != 0 {
			t.Errorf("%d descriptors are still charged after Close", n)
		}
	})
	sh := &share{client: newClient(t, s), dir: dir, srv: s}
	sh.init()
	return sh
}

func openDir(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func (s *share) host(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// client is one queue of a guest.
type client struct {
	t        testing.TB
	c        *call
	unique   uint64
	uid, gid uint32
}

func newClient(t testing.TB, s *Server) *client { return &client{t: t, c: newCall(s)} }

// parkedRequest is the completion of a request that went to a worker.
type parkedRequest struct {
	in, out [][]byte
	done    chan int
}

func (p *parkedRequest) detach() (completion, [][]byte, [][]byte) { return p, p.in, p.out }
func (p *parkedRequest) CopyOut(b []byte) int                     { return scatter(p.out, b) }
func (p *parkedRequest) Complete(n int)                           { p.done <- n }

// raw sends the segments as they are and returns the used length.
func (cl *client) raw(in, out [][]byte) int {
	p := &parkedRequest{in, out, make(chan int, 1)}
	n, done := cl.c.serve(in, out, p)
	if !done {
		n = <-p.done
	}
	return n
}

// do sends one request and returns the body of the reply. room is the size of
// the guest's buffer for it.
func (cl *client) do(op w.Opcode, node uint64, room int, parts ...[]byte) ([]byte, errno) {
	cl.t.Helper()
	cl.unique++
	h := w.InHeader{Opcode: op, Unique: cl.unique, NodeID: node, UID: cl.uid, GID: cl.gid}
	h.Len = uint32(headerSize + length(parts))
	in := append([][]byte{w.Append(nil, &h)}, parts...)
	out := [][]byte{make([]byte, replySize)}
	for left := room; left > 0; left -= 4096 {
		out = append(out, make([]byte, min(left, 4096)))
	}
	n := cl.raw(in, out)
	flat := bytes.Join(out, nil)
	if cl.c.h.Opcode == w.OpForget || cl.c.h.Opcode == w.OpBatchForget {
		return nil, 0
	}
	var oh w.OutHeader
	body, ok := w.Decode(flat[:max(n, 0)], &oh)
	if !ok || int(oh.Len) != n || oh.Unique != cl.unique || oh.Error > 0 || oh.Error <= -512 || oh.Error != 0 && n != replySize {
		cl.t.Fatalf("%d: bad reply: used %d, header %+v", op, n, oh)
	}
	return body, errno(-oh.Error)
}

func pack[T any](v T, enc func([]byte, *T) []byte) []byte { return enc(nil, &v) }

func (cl *client) init() w.InitOut {
	cl.t.Helper()
	in := w.InitIn{Major: 7, Minor: 38, MaxReadahead: 128 << 10, Flags: 0x7bfffffb, Flags2: 0xb}
	b, err := cl.do(w.OpInit, 0, w.InitOutSize, pack(in, w.Append))
	cl.must(err)
	var out w.InitOut
	w.Decode(b, &out)
	return out
}

func (cl *client) must(err errno) {
	cl.t.Helper()
	if err != 0 {
		cl.t.Fatalf("unexpected error: %v (%d)", err, int(err))
	}
}

func (cl *client) want(got, want errno, format string, args ...any) {
	cl.t.Helper()
	if got != want {
		cl.t.Errorf("%s: %v, want %v", fmt.Sprintf(format, args...), got, want)
	}
}

func z(s string) []byte { return append([]byte(s), 0) }

func (cl *client) entry(b []byte, err errno) (w.EntryOut, errno) {
	var e w.EntryOut
	w.Decode(b, &e)
	return e, err
}

func (cl *client) lookup(dir uint64, name string) (w.EntryOut, errno) {
	cl.t.Helper()
	return cl.entry(cl.do(w.OpLookup, dir, w.EntryOutSize, z(name)))
}

func (cl *client) mustLookup(dir uint64, name string) w.EntryOut {
	cl.t.Helper()
	e, err := cl.lookup(dir, name)
	cl.must(err)
	return e
}

func (cl *client) forget(node, n uint64) {
	cl.do(w.OpForget, node, 0, pack(w.ForgetIn{Nlookup: n}, w.Append))
}

func (cl *client) getattr(node uint64) (w.Attr, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpGetattr, node, w.AttrOutSize, pack(w.GetattrIn{}, w.Append))
	var a w.AttrOut
	w.Decode(b, &a)
	return a.Attr, err
}

func (cl *client) mustAttr(node uint64) w.Attr {
	cl.t.Helper()
	a, err := cl.getattr(node)
	cl.must(err)
	return a
}

func (cl *client) setattr(node uint64, in w.SetattrIn) (w.Attr, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpSetattr, node, w.AttrOutSize, pack(in, w.Append))
	var a w.AttrOut
	w.Decode(b, &a)
	return a.Attr, err
}

func (cl *client) chmod(node uint64, mode uint32) errno {
	cl.t.Helper()
	_, err := cl.setattr(node, w.SetattrIn{Valid: w.FattrMode, Mode: mode})
	return err
}

func (cl *client) chown(node uint64, uid, gid uint32) errno {
	cl.t.Helper()
	_, err := cl.setattr(node, w.SetattrIn{Valid: w.FattrUID | w.FattrGID, UID: uid, GID: gid})
	return err
}

// mayChown is chown, which an ordinary user's server refuses without an
// overlay and cannot fail at otherwise. It reports whether it was done.
func (cl *client) mayChown(node uint64, uid, gid uint32) bool {
	cl.t.Helper()
	err := cl.chown(node, uid, gid)
	if cl.c.s.virt == virtOff && os.Geteuid() != 0 {
		cl.want(err, unix.EPERM, "chown by an ordinary user")
		return false
	}
	cl.must(err)
	return true
}

func (cl *client) truncate(node, size uint64) errno {
	cl.t.Helper()
	_, err := cl.setattr(node, w.SetattrIn{Valid: w.FattrSize, Size: size})
	return err
}

func (cl *client) create(dir uint64, name string, flags, mode uint32) (w.EntryOut, uint64, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpCreate, dir, w.EntryOutSize+w.OpenOutSize,
		pack(w.CreateIn{Flags: flags | unix.O_CREAT, Mode: unix.S_IFREG | mode}, w.Append), z(name))
	var e w.EntryOut
	var o w.OpenOut
	rest, _ := w.Decode(b, &e)
	w.Decode(rest, &o)
	return e, o.Fh, err
}

func (cl *client) mustCreate(dir uint64, name string, mode uint32) (w.EntryOut, uint64) {
	cl.t.Helper()
	e, fh, err := cl.create(dir, name, unix.O_RDWR|unix.O_EXCL, mode)
	cl.must(err)
	return e, fh
}

func (cl *client) mkdir(dir uint64, name string, mode uint32) (w.EntryOut, errno) {
	cl.t.Helper()
	return cl.entry(cl.do(w.OpMkdir, dir, w.EntryOutSize, pack(w.MkdirIn{Mode: mode}, w.Append), z(name)))
}

func (cl *client) mknod(dir uint64, name string, mode, rdev uint32) (w.EntryOut, errno) {
	cl.t.Helper()
	return cl.entry(cl.do(w.OpMknod, dir, w.EntryOutSize, pack(w.MknodIn{Mode: mode, Rdev: rdev}, w.Append), z(name)))
}

func (cl *client) symlink(dir uint64, name, target string) (w.EntryOut, errno) {
	cl.t.Helper()
	return cl.entry(cl.do(w.OpSymlink, dir, w.EntryOutSize, z(name), z(target)))
}

func (cl *client) readlink(node uint64) (string, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpReadlink, node, 4096)
	return string(b), err
}

func (cl *client) link(node, dir uint64, name string) (w.EntryOut, errno) {
	cl.t.Helper()
	return cl.entry(cl.do(w.OpLink, dir, w.EntryOutSize, pack(w.LinkIn{OldNodeID: node}, w.Append), z(name)))
}

func (cl *client) unlink(dir uint64, name string) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpUnlink, dir, 0, z(name))
	return err
}

func (cl *client) rmdir(dir uint64, name string) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpRmdir, dir, 0, z(name))
	return err
}

func (cl *client) rename(dir uint64, from string, to uint64, name string, flags uint32) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpRename2, dir, 0, pack(w.Rename2In{NewDir: to, Flags: flags}, w.Append), z(from), z(name))
	return err
}

func (cl *client) open(node uint64, flags uint32) (uint64, errno) {
	cl.t.Helper()
	return cl.openOp(w.OpOpen, node, flags)
}

func (cl *client) opendir(node uint64) (uint64, errno) {
	cl.t.Helper()
	return cl.openOp(w.OpOpendir, node, 0)
}

func (cl *client) openOp(op w.Opcode, node uint64, flags uint32) (uint64, errno) {
	cl.t.Helper()
	b, err := cl.do(op, node, w.OpenOutSize, pack(w.OpenIn{Flags: flags}, w.Append))
	var o w.OpenOut
	w.Decode(b, &o)
	return o.Fh, err
}

func (cl *client) release(node, fh uint64) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpRelease, node, 0, pack(w.ReleaseIn{Fh: fh}, w.Append))
	return err
}

func (cl *client) releasedir(node, fh uint64) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpReleasedir, node, 0, pack(w.ReleaseIn{Fh: fh}, w.Append))
	return err
}

func (cl *client) read(node, fh, off uint64, size uint32) (string, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpRead, node, int(size), pack(w.ReadIn{Fh: fh, Offset: off, Size: size}, w.Append))
	return string(b), err
}

func (cl *client) write(node, fh, off uint64, data string) (uint32, errno) {
	cl.t.Helper()
	return cl.writeWith(node, w.WriteIn{Fh: fh, Offset: off}, data)
}

func (cl *client) writeWith(node uint64, in w.WriteIn, data string) (uint32, errno) {
	cl.t.Helper()
	in.Size = uint32(len(data))
	parts := [][]byte{w.Append(nil, &in)}
	for d := []byte(data); len(d) > 0; d = d[min(len(d), 4096):] {
		parts = append(parts, d[:min(len(d), 4096)])
	}
	b, err := cl.do(w.OpWrite, node, w.Size[w.WriteOut](), parts...)
	var o w.WriteOut
	w.Decode(b, &o)
	return o.Size, err
}

func (cl *client) setxattr(node uint64, name, value string, flags uint32) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpSetxattr, node, 0, pack(w.SetxattrIn{Size: uint32(len(value)), Flags: flags}, w.Append), z(name), []byte(value))
	return err
}

func (cl *client) getxattr(node uint64, name string, size uint32) (string, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpGetxattr, node, max(int(size), 8), pack(w.GetxattrIn{Size: size}, w.Append), z(name))
	return string(b), err
}

func (cl *client) listxattr(node uint64, size uint32) (string, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpListxattr, node, max(int(size), 8), pack(w.GetxattrIn{Size: size}, w.Append))
	return string(b), err
}

func (cl *client) removexattr(node uint64, name string) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpRemovexattr, node, 0, z(name))
	return err
}

// dirent is one entry of a listing; node is 0 for READDIR.
type dirent struct {
	name string
	typ  uint32
	off  uint64
	ino  uint64
	node uint64
	attr w.Attr
}

// page reads one reply of a listing.
func (cl *client) page(node, fh, off uint64, size uint32, plus bool) ([]dirent, errno) {
	cl.t.Helper()
	op := w.OpReaddir
	if plus {
		op = w.OpReaddirplus
	}
	b, err := cl.do(op, node, int(size), pack(w.ReadIn{Fh: fh, Offset: off, Size: size}, w.Append))
	if err != 0 {
		return nil, err
	}
	var list []dirent
	for len(b) > 0 {
		var e w.EntryOut
		if plus {
			b, _ = w.Decode(b, &e)
		}
		var d w.Dirent
		rest, ok := w.Decode(b, &d)
		if !ok || w.DirentLen(int(d.Namelen)) > len(b) {
			cl.t.Fatalf("torn entry: %d bytes left, %+v", len(b), d)
		}
		list = append(list, dirent{string(rest[:d.Namelen]), d.Type, d.Off, d.Ino, e.NodeID, e.Attr})
		b = b[w.DirentLen(int(d.Namelen)):]
	}
	return list, 0
}

// list reads a whole directory with replies of the given size, without "."
// and "..".
func (cl *client) list(node uint64, size uint32, plus bool) []dirent {
	cl.t.Helper()
	fh, err := cl.opendir(node)
	cl.must(err)
	defer cl.releasedir(node, fh)
	var all []dirent
	for off := uint64(0); ; {
		page, err := cl.page(node, fh, off, size, plus)
		cl.must(err)
		if len(page) == 0 {
			return all
		}
		for _, d := range page {
			off = d.off
			if d.name != "." && d.name != ".." {
				all = append(all, d)
			}
		}
	}
}

// eachVirt is for tests whose subject does not depend on the policy.
func eachVirt(t *testing.T, run func(t *testing.T, virt string)) {
	for _, v := range []string{"strict", "relaxed", "off"} {
		t.Run(v, func(t *testing.T) { run(t, v) })
	}
}

func virtShare(t testing.TB, virt string) *share {
	t.Helper()
	return newShare(t, func(c *Config) { c.StatVirt = virt })
}
