package fuseserver

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// A fuzz input is a script: one byte for the kind of share, then requests of
//
//	opcode, node selector, handle selector, length of the body, body
//
// The selectors pick from the ids that earlier replies gave out, so that the
// fuzzer reaches deep states without guessing 64-bit numbers; the handle
// replaces the first eight bytes of the body, where most requests have it.
// Selector 255 leaves wild values.

type script []byte

func (s script) add(op w.Opcode, node, fh byte, parts ...[]byte) script {
	n := length(parts)
	s = append(s, byte(op), node, fh, byte(n))
	for _, p := range parts {
		s = append(s, p...)
	}
	return s
}

// seeds have one well-formed request of every opcode in them.
func seeds() []script {
	fh := make([]byte, 8)
	in := func(b []byte) []byte { return b }
	base := func(kind byte) script {
		return script{kind}.
			add(w.OpLookup, 0, 255, z("d")).
			add(w.OpCreate, 0, 255, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_CREAT, Mode: 0o100644}, w.Append), z("new")).
			add(w.OpWrite, 2, 0, pack(w.WriteIn{Size: 4}, w.Append), []byte("data")).
			add(w.OpRead, 2, 0, pack(w.ReadIn{Size: 64}, w.Append)).
			add(w.OpGetattr, 2, 255, in(pack(w.GetattrIn{}, w.Append)))
	}
	var all []script
	for kind := range byte(4) {
		s := base(kind)
		all = append(all, s,
			append(script{}, s...).add(w.OpSymlink, 0, 255, z("l"), z("../canary")).add(w.OpReadlink, 3, 255).add(w.OpLookup, 0, 255, z("escape")).
				add(w.OpOpen, 4, 255, pack(w.OpenIn{}, w.Append)).add(w.OpLookup, 4, 255, z("inside")),
			append(script{}, s...).add(w.OpMknod, 1, 255, pack(w.MknodIn{Mode: unix.S_IFIFO | 0o600}, w.Append), z("p")).
				add(w.OpMkdir, 0, 255, pack(w.MkdirIn{Mode: 0o755}, w.Append), z("e")).
				add(w.OpRename2, 0, 255, pack(w.Rename2In{NewDir: 1}, w.Append), z("new"), z("../canary")).
				add(w.OpRename, 0, 255, pack(w.RenameIn{NewDir: 1}, w.Append), z("new"), z("newer")).
				add(w.OpLink, 0, 255, pack(w.LinkIn{OldNodeID: 3}, w.Append), z("hard")).
				add(w.OpUnlink, 0, 255, z("newer")).add(w.OpRmdir, 0, 255, z("e")),
			append(script{}, s...).add(w.OpSetattr, 2, 255, pack(w.SetattrIn{Valid: 0x3f, Mode: 0o600, Size: 3}, w.Append)).
				add(w.OpSetxattr, 2, 255, pack(w.SetxattrIn{Size: 1}, w.Append), z("user.x"), []byte("v")).
				add(w.OpGetxattr, 2, 255, pack(w.GetxattrIn{Size: 100}, w.Append), z("user.msb.override_stat")).
				add(w.OpListxattr, 2, 255, pack(w.GetxattrIn{Size: 100}, w.Append)).
				add(w.OpRemovexattr, 2, 255, z("user.x")).
				add(w.OpAccess, 2, 255, pack(w.AccessIn{Mask: 7}, w.Append)).
				add(w.OpStatfs, 0, 255).add(w.OpStatx, 2, 255, pack(w.StatxIn{}, w.Append)),
			append(script{}, s...).add(w.OpOpendir, 0, 255, pack(w.OpenIn{}, w.Append)).
				add(w.OpReaddir, 0, 1, pack(w.ReadIn{Size: 512}, w.Append)).
				add(w.OpReaddirplus, 0, 1, pack(w.ReadIn{Size: 4096}, w.Append)).
				add(w.OpFsyncdir, 0, 1, pack(w.FsyncIn{}, w.Append)).
				add(w.OpReleasedir, 0, 1, pack(w.ReleaseIn{}, w.Append)),
			append(script{}, s...).add(w.OpFallocate, 2, 0, pack(w.FallocateIn{Length: 4096}, w.Append)).
				add(w.OpLseek, 2, 0, pack(w.LseekIn{Whence: unix.SEEK_HOLE}, w.Append)).
				add(w.OpCopyFileRange, 2, 0, fh, make([]byte, 48)).
				add(w.OpFlush, 2, 0, pack(w.FlushIn{}, w.Append)).
				add(w.OpFsync, 2, 0, pack(w.FsyncIn{}, w.Append)).
				add(w.OpRelease, 2, 0, pack(w.ReleaseIn{}, w.Append)),
			append(script{}, s...).add(w.OpSetlk, 2, 0, pack(lk(0, 1, unix.F_WRLCK), w.Append)).
				add(w.OpGetlk, 2, 0, pack(lk(0, 2, unix.F_RDLCK), w.Append)).
				add(w.OpSetlkw, 2, 0, pack(ranged(0, 2, unix.F_RDLCK, 5, 9), w.Append)). // waits
				add(w.OpSetlk, 2, 0, pack(fl(0, unix.F_WRLCK), w.Append)).
				add(w.OpSetlkw, 2, 0, pack(fl(0, unix.F_UNLCK), w.Append)).
				add(w.OpSetxattr, 0, 255, pack(w.SetxattrIn{Size: 1}, w.Append), z("user.msb.end_waits"), []byte("1")).
				add(w.OpSetlkw, 2, 0, pack(lk(0, 3, unix.F_WRLCK), w.Append)).
				add(w.OpInterrupt, 0, 255, pack(w.InterruptIn{Unique: 9}, w.Append)).
				add(w.OpFlush, 2, 0, pack(w.FlushIn{LockOwner: 1}, w.Append)).
				add(w.OpSetlkw, 2, 0, pack(lk(0, 1, unix.F_WRLCK), w.Append)).
				add(w.OpSetxattr, 0, 255, pack(w.SetxattrIn{Size: 4}, w.Append), z("user.msb.end_waits"), []byte("stop")).
				add(w.OpRelease, 2, 0, pack(w.ReleaseIn{}, w.Append)),
			append(script{}, s...).add(w.OpTmpfile, 1, 255, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_TMPFILE, Mode: 0o100600}, w.Append)).
				add(w.OpForget, 2, 255, pack(w.ForgetIn{Nlookup: 1}, w.Append)).
				add(w.OpBatchForget, 0, 255, pack(w.BatchForgetIn{Count: 1}, w.Append), pack(w.ForgetOne{NodeID: 2, Nlookup: 9}, w.Append)).
				add(w.OpInterrupt, 0, 255, pack(w.InterruptIn{}, w.Append)).
				add(w.OpDestroy, 0, 255).
				add(w.OpInit, 0, 255, pack(w.InitIn{Major: 7, Minor: 38}, w.Append)))
	}
	return all
}

// trap is a directory with a share in it and things around it that a guest
// must not touch; the share holds links that lead to them.
type trap struct{ outer string }

func newTrap(t testing.TB) trap {
	outer := t.TempDir()
	for _, d := range []string{"share/d", "canarydir"} {
		if err := os.MkdirAll(filepath.Join(outer, d), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"canary", "canarydir/inside", "share/f", "share/d/g"} {
		if err := os.WriteFile(filepath.Join(outer, f), []byte(f), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"escape": "../canary", "escapedir": "../canarydir", "abs": outer + "/canary"} {
		if err := os.Symlink(target, filepath.Join(outer, "share", name)); err != nil {
			t.Fatal(err)
		}
	}
	return trap{outer}
}

// outside says all about what is not the share.
func (tr trap) outside(t testing.TB) string {
	var st unix.Stat_t
	if err := unix.Lstat(tr.outer, &st); err != nil {
		t.Fatal(err)
	}
	ents, err := os.ReadDir(tr.outer)
	if err != nil {
		t.Fatal(err)
	}
	digest := fmt.Sprintf("%o %d:%d %v\n", st.Mode, st.Uid, st.Gid, st.Mtim)
	for _, e := range ents {
		if e.Name() != "share" {
			digest += treeDigest(t, filepath.Join(tr.outer, e.Name()))
		}
	}
	return digest
}

// FuzzRequests: the guest owns these bytes. Whatever it sends, the server
// neither panics nor hangs, every reply is well formed, nothing outside the
// share changes, a read-only share does not change at all, and the end of the
// session gives every descriptor back.
func FuzzRequests(f *testing.F) {
	for _, s := range seeds() {
		f.Add([]byte(s))
	}
	signal.Ignore(unix.SIGXFSZ)
	f.Fuzz(func(t *testing.T, data []byte) {
		limitFileSize(t)
		if len(data) == 0 {
			return
		}
		tr := newTrap(t)
		outside := tr.outside(t)
		dir := filepath.Join(tr.outer, "share")
		kind := data[0] % 4
		inside := ""
		if kind == 3 {
			inside = treeDigest(t, dir)
		}
		var book *bookOf
		if kind == 0 {
			book = newBookOf(t, dir)
		}
		s := serveDir(t, dir, func(c *Config) {
			if book != nil {
				c.Ledger = book.open(t)
			}
			c.StatVirt = []string{"strict", "relaxed", "off", "strict"}[kind]
			c.Readonly = kind == 3
			c.FDBudget = 24
			c.Logf = nil
		})
		play(t, s, data[1:])
		if got := tr.outside(t); got != outside {
			t.Errorf("outside the share was\n%s\nand is\n%s", outside, got)
		}
		if kind == 3 && treeDigest(t, dir) != inside {
			t.Error("a read-only share changed")
		}
		s.srv.endSession()
		if n := s.srv.fds.Load(); n != 0 {
			t.Errorf("%d descriptors held without a session", n)
		}
		if book != nil {
			s.srv.Close()
			book.check(t)
		}
	})
}

// bookOf is the ledger of a share that had something in it.
type bookOf struct {
	a      *account
	before ledger.Delta
}

func newBookOf(t *testing.T, dir string) *bookOf {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 20, Inodes: 100})
	a.dir = dir
	return &bookOf{a, a.walk()}
}

func (b *bookOf) open(t *testing.T) *os.File {
	f, err := os.OpenFile(b.a.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// check wants the ledger to say what the guest added. Below nothing it says
// nothing.
func (b *bookOf) check(t *testing.T) {
	added := b.a.walk().Minus(b.before)
	if u := b.a.used(); u != (ledger.Delta{Bytes: max(0, added.Bytes), Inodes: max(0, added.Inodes)}) {
		t.Errorf("the guest added %v, the ledger says %v", added, u)
	}
}

// limitFileSize keeps a fuzzer that asks for a terabyte off the disk.
func limitFileSize(t testing.TB) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &lim); err != nil {
		t.Fatal(err)
	}
	if lim.Cur > 256<<20 {
		was := lim
		lim.Cur = 256 << 20
		t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_FSIZE, &was) })
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &lim); err != nil {
			t.Fatal(err)
		}
	}
}

// play sends the requests of a script.
func play(t *testing.T, s *share, data []byte) {
	nodes, handles := []uint64{rootID}, []uint64{}
	for range 40 {
		if len(data) < 4 {
			return
		}
		op, node, fh := w.Opcode(data[0]), data[1], data[2]
		n := min(int(data[3]), len(data)-4)
		body := append([]byte{}, data[4:4+n]...)
		data = data[4+n:]
		if op == w.OpSyncfs {
			continue // the host has better things to do
		}
		id := uint64(node)<<8 | uint64(fh)
		if node != 255 {
			id = nodes[int(node)%len(nodes)]
		}
		if fh != 255 && len(handles) > 0 && len(body) >= 8 {
			binary.LittleEndian.PutUint64(body, handles[int(fh)%len(handles)])
		}
		if op == w.OpLink && len(body) >= 8 {
			binary.LittleEndian.PutUint64(body, nodes[int(body[0])%len(nodes)])
		}
		if op == w.OpSetlkw {
			put(s, id, body)
			continue
		}
		reply := exchange(t, s, op, id, body)
		var e w.EntryOut
		var o w.OpenOut
		switch op {
		case w.OpLookup, w.OpMkdir, w.OpMknod, w.OpSymlink, w.OpLink, w.OpCreate, w.OpTmpfile:
			if rest, ok := w.Decode(reply, &e); ok {
				nodes = append(nodes, e.NodeID)
				if _, ok := w.Decode(rest, &o); ok {
					handles = append(handles, o.Fh)
				}
			}
		case w.OpOpen, w.OpOpendir:
			if _, ok := w.Decode(reply, &o); ok {
				handles = append(handles, o.Fh)
			}
		}
	}
}

// put sends a request whose answer may come later, or at the end of the session.
func put(s *share, node uint64, body []byte) {
	s.unique++
	msg := message(w.OpSetlkw, node, body, func(h *w.InHeader) { h.Unique = s.unique })
	p := &parkedRequest{[][]byte{msg[:headerSize], msg[headerSize:]}, [][]byte{make([]byte, replySize)}, make(chan int, 1)}
	s.c.serve(p.in, p.out, p)
}

// exchange sends one request with a true length and checks the reply's form.
func exchange(t *testing.T, s *share, op w.Opcode, node uint64, body []byte) []byte {
	s.unique++
	msg := message(op, node, body, func(h *w.InHeader) { h.Unique = s.unique })
	out := make([]byte, 6000)
	used := s.raw([][]byte{msg[:headerSize], msg[headerSize:]}, [][]byte{out[:16], out[16:5000], out[5000:]})
	var oh w.OutHeader
	if used == 0 {
		return nil
	}
	reply, ok := w.Decode(out[:used], &oh)
	if !ok || int(oh.Len) != used || oh.Unique != s.unique || oh.Error > 0 || oh.Error <= -512 || oh.Error != 0 && used != replySize {
		t.Fatalf("opcode %d: used %d, header %+v", op, used, oh)
	}
	return reply
}
