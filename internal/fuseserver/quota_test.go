package fuseserver

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// account is a volume with a ledger, and what serves it.
type account struct {
	t      *testing.T
	dir    string // the volume
	path   string // the ledger
	l      *ledger.Ledger
	shares []*share
}

func newAccount(t *testing.T, limits ledger.Limits) *account {
	t.Helper()
	base := t.TempDir()
	a := &account{t: t, dir: filepath.Join(base, "vol"), path: filepath.Join(base, "ledger")}
	if err := os.Mkdir(a.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(a.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = ledger.Format(f, limits, true)
	}
	if err == nil {
		a.l, err = ledger.Open(f)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return a
}

// serve serves the volume to one more guest.
func (a *account) serve() *share {
	a.t.Helper()
	f, err := os.OpenFile(a.path, os.O_RDWR, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	s := serveDir(a.t, a.dir, func(c *Config) { c.Ledger = f })
	a.shares = append(a.shares, s)
	return s
}

func (a *account) used() ledger.Delta {
	a.t.Helper()
	s, err := a.l.State()
	if err != nil {
		a.t.Fatal(err)
	}
	return s.Used
}

// truth is the sum of charges: of the tree, and of what guests have open without
// a name.
func (a *account) truth() ledger.Delta {
	a.t.Helper()
	sum, seen := a.walk(), map[uint64]bool{}
	for _, s := range a.shares {
		s.srv.quota.orphans(func(ino uint64, measure func() (ledger.Delta, bool)) {
			if charge, nameless := measure(); nameless && !seen[ino] {
				sum, seen[ino] = sum.Plus(charge), true
			}
		})
	}
	return sum
}

// walk is the sum of charges of the tree.
func (a *account) walk() ledger.Delta {
	a.t.Helper()
	d, err := os.Open(a.dir)
	if err != nil {
		a.t.Fatal(err)
	}
	defer d.Close()
	found, err := ledger.Walk(context.Background(), d, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	return found.Charges
}

// bound fails if the ledger says less than there is.
func (a *account) bound(when string) {
	a.t.Helper()
	truth := a.truth()
	if u := a.used(); u.Bytes < truth.Bytes || u.Inodes < truth.Inodes {
		a.t.Fatalf("%s: the ledger says %v, there is %v", when, u, truth)
	}
}

// settled reports whether the ledger becomes equal to what there is while nothing
// happens, but that servers let go of what a guest remembers; got is what it says.
func (a *account) settled(within time.Duration) (got, truth ledger.Delta, ok bool) {
	a.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(10 * time.Millisecond) {
		if got, truth = a.used(), a.truth(); got == truth {
			return got, truth, true
		}
		if time.Now().After(deadline) {
			return got, truth, false
		}
	}
}

func (a *account) equal(when string) {
	a.t.Helper()
	if got, truth, ok := a.settled(3 * time.Second); !ok {
		a.t.Fatalf("%s: the ledger says %v, there is %v", when, got, truth)
	}
}

// settle has the ledger walk if a writer had to go on without another one's
// consent, after which it is exact.
func (a *account) settle() {
	a.t.Helper()
	for range 20 {
		s, err := a.l.State()
		if err == nil && s.Unsettled {
			_, err = a.l.Settle(context.Background(), func(context.Context) (ledger.Delta, error) { return a.walk(), nil })
		}
		if _, _, ok := a.settled(time.Second); ok && err == nil {
			return
		}
		if err != nil {
			a.t.Fatal(err)
		}
	}
	a.equal("after a walk")
}

// TestCharges: each operation of a guest is charged what a walk finds, and what
// it frees comes back, also when two servers have the volume.
func TestCharges(t *testing.T) {
	tests := map[string]func(s *share){
		"create":  func(s *share) { s.mustCreate(rootID, "new", 0o600) },
		"write":   func(s *share) { e, fh := s.mustCreate(rootID, "new", 0o600); s.write(e.NodeID, fh, 0, pattern(10_000)) },
		"inside":  func(s *share) { f := s.openFile("f", unix.O_RDWR); s.write(f.node, f.fh, 5, "x") },
		"at once": func(s *share) { f := s.openFile("f", unix.O_RDWR); s.write(f.node, f.fh, 9_999, pattern(9_000)) },
		"append": func(s *share) {
			f := s.openFile("f", unix.O_RDWR)
			s.writeWith(f.node, w.WriteIn{Fh: f.fh, Flags: unix.O_APPEND}, pattern(5000))
		},
		"hole":       func(s *share) { f := s.openFile("f", unix.O_RDWR); s.write(f.node, f.fh, 1<<20, "x") },
		"cut":        func(s *share) { s.must(s.truncate(s.mustLookup(rootID, "f").NodeID, 1)) },
		"lengthen":   func(s *share) { s.must(s.truncate(s.mustLookup(rootID, "f").NodeID, 1<<20)) },
		"O_TRUNC":    func(s *share) { s.openFile("f", unix.O_RDWR|unix.O_TRUNC) },
		"O_CREAT":    func(s *share) { _, _, err := s.create(rootID, "f", unix.O_RDWR|unix.O_TRUNC, 0o600); s.must(err) },
		"mkdir":      func(s *share) { _, err := s.mkdir(rootID, "new", 0o700); s.must(err) },
		"rmdir":      func(s *share) { s.must(s.rmdir(rootID, "d")) },
		"unlink":     func(s *share) { s.must(s.unlink(rootID, "f")) },
		"link":       func(s *share) { _, err := s.link(s.mustLookup(rootID, "f").NodeID, rootID, "l"); s.must(err) },
		"unlink one": func(s *share) { s.link(s.mustLookup(rootID, "f").NodeID, rootID, "l"); s.must(s.unlink(rootID, "f")) },
		"rename":     func(s *share) { s.must(s.rename(rootID, "f", s.mustLookup(rootID, "d").NodeID, "g", 0)) },
		"over":       func(s *share) { s.mustCreate(rootID, "new", 0o600); s.must(s.rename(rootID, "new", rootID, "f", 0)) },
		"over itself": func(s *share) {
			s.link(s.mustLookup(rootID, "f").NodeID, rootID, "l")
			s.must(s.rename(rootID, "f", rootID, "l", 0))
		},
		"exchange": func(s *share) { s.must(s.rename(rootID, "f", rootID, "d", unix.RENAME_EXCHANGE)) },
		"symlink":  func(s *share) { _, err := s.symlink(rootID, "s", "short"); s.must(err) },
		"long symlink": func(s *share) {
			_, err := s.symlink(rootID, "s", strings.Repeat("x", 200))
			s.must(err)
			s.must(s.unlink(rootID, "s"))
			_, err = s.symlink(rootID, "s", strings.Repeat("x", 60))
			s.must(err)
		},
		"fifo":  func(s *share) { _, err := s.mknod(rootID, "p", unix.S_IFIFO|0o600, 0); s.must(err) },
		"xattr": func(s *share) { s.must(s.setxattr(s.mustLookup(rootID, "f").NodeID, "user.a", pattern(1000), 0)) },
		"no xattr": func(s *share) {
			n := s.mustLookup(rootID, "d").NodeID
			s.setxattr(n, "user.a", pattern(1000), 0)
			s.must(s.removexattr(n, "user.a"))
		},
		"tmpfile": func(s *share) {
			b, err := s.do(w.OpTmpfile, rootID, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_TMPFILE, Mode: 0o100600}, w.Append))
			if err == unix.EOPNOTSUPP {
				return
			}
			s.must(err)
			var e w.EntryOut
			var o w.OpenOut
			rest, _ := w.Decode(b, &e)
			w.Decode(rest, &o)
			s.write(e.NodeID, o.Fh, 0, pattern(9000))
			s.link(e.NodeID, rootID, "named")
		},
		"copy": func(s *share) {
			f := s.openFile("f", unix.O_RDONLY)
			e, fh := s.mustCreate(rootID, "new", 0o600)
			_, err := s.do(w.OpCopyFileRange, f.node, 8, pack(w.CopyFileRangeIn{FhIn: f.fh, NodeIDOut: e.NodeID, FhOut: fh, Len: 1 << 30}, w.Append))
			s.must(err)
		},
		"fallocate": func(s *share) { s.must(s.fallocate("f", 0, 0, 1<<20)) },
		"punch":     func(s *share) { s.must(s.fallocate("f", unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 0, 1<<20)) },
		"zero":      func(s *share) { s.must(s.fallocate("f", unix.FALLOC_FL_ZERO_RANGE, 0, 1<<20)) },
		"many names": func(s *share) {
			for i := range 300 {
				s.mustCreate(rootID, entryName(i)+strings.Repeat("n", 200), 0o600)
			}
		},
	}
	for _, servers := range []int{1, 2} {
		for name, run := range tests {
			t.Run(name, func(t *testing.T) {
				a := newAccount(t, ledger.Limits{Bytes: 1 << 30, Inodes: 10_000})
				s := a.serve()
				if servers == 2 {
					a.serve()
				}
				e, fh := s.mustCreate(rootID, "f", 0o600)
				_, err := s.write(e.NodeID, fh, 0, pattern(10_000))
				s.must(err)
				s.must(s.release(e.NodeID, fh))
				_, err = s.mkdir(rootID, "d", 0o700)
				s.must(err)
				a.bound("before")
				run(s)
				a.bound("after")
				a.equal("in the end")
				s.init() // the guest is reset: what had no name is gone
				a.equal("after a reset")
			})
		}
	}
}

func (s *share) fallocate(name string, mode uint32, off, length uint64) errno {
	f := s.openFile(name, unix.O_RDWR)
	_, err := s.do(w.OpFallocate, f.node, 0, pack(w.FallocateIn{Fh: f.fh, Mode: mode, Offset: off, Length: length}, w.Append))
	return err
}

// TestQuotaBypasses: no way leads beyond the limit, nothing that is refused is
// done, and what is freed can be used again at once.
func TestQuotaBypasses(t *testing.T) {
	const limit = 1 << 20
	fill := func(s *share) errno {
		e, fh, err := s.create(rootID, "big", unix.O_RDWR, 0o600)
		for off := uint64(0); err == 0; off += 64 << 10 {
			_, err = s.write(e.NodeID, fh, off, pattern(64<<10))
		}
		s.forget(e.NodeID, 1)
		s.release(e.NodeID, fh)
		return err
	}
	until := func(t *testing.T, do func(i int) errno) {
		t.Helper()
		for i := range 100_000 {
			if err := do(i); err != 0 {
				if err != unix.ENOSPC {
					t.Errorf("%v, want ENOSPC", err)
				}
				return
			}
		}
		t.Error("never refused")
	}
	tests := map[string]func(t *testing.T, a *account, s *share){
		"second mount": func(t *testing.T, a *account, s *share) {
			s.want(fill(s), unix.ENOSPC, "fill")
			other := a.serve()
			_, _, err := other.create(rootID, "more", unix.O_RDWR, 0o600)
			other.must(err)
			f := other.openFile("more", unix.O_RDWR)
			_, err = other.write(f.node, f.fh, 0, pattern(64<<10))
			other.want(err, unix.ENOSPC, "write through another server")
			other.want(other.truncate(f.node, 64<<10), unix.ENOSPC, "truncate")
			if n := other.mustAttr(f.node).Size; n != 0 {
				t.Errorf("what was refused is %d bytes long", n)
			}
			s.must(s.unlink(rootID, "big"))
			_, err = other.write(f.node, f.fh, 0, pattern(64<<10))
			other.want(err, 0, "after deleting")
		},
		"sparse": func(t *testing.T, a *account, s *share) {
			e, fh := s.mustCreate(rootID, "f", 0o600)
			_, err := s.write(e.NodeID, fh, 2*limit, "x")
			s.want(err, unix.ENOSPC, "a hole")
			s.want(s.truncate(e.NodeID, 2*limit), unix.ENOSPC, "truncate")
			s.want(s.fallocate("f", 0, 0, 2*limit), unix.ENOSPC, "fallocate")
			s.want(s.fallocate("f", unix.FALLOC_FL_KEEP_SIZE, 0, 4096), unix.EOPNOTSUPP, "KEEP_SIZE beyond the end")
			s.must(s.truncate(e.NodeID, 4096))
			s.must(s.fallocate("f", unix.FALLOC_FL_KEEP_SIZE, 0, 4096))
		},
		"unlinked, open": func(t *testing.T, a *account, s *share) {
			s.want(fill(s), unix.ENOSPC, "fill")
			f := s.openFile("big", unix.O_RDWR)
			other := a.serve().openFile("big", unix.O_RDONLY)
			s.must(s.unlink(rootID, "big"))
			s.want(fill(s), unix.ENOSPC, "while it is open here")
			a.bound("while it is open here")
			s.must(s.unlink(rootID, "big"))
			s.must(s.release(f.node, f.fh))
			s.forget(f.node, 9)
			a.equal("while it is open there")
			if n := a.used().Bytes; n < limit-128<<10 {
				t.Errorf("%d bytes used, while another guest has the file open", n)
			}
			other.must(other.release(other.node, other.fh))
			other.forget(other.node, 9)
			a.equal("in the end")
			if n := a.used().Bytes; n != 0 {
				t.Errorf("%d bytes used", n)
			}
		},
		"remembered elsewhere": func(t *testing.T, a *account, s *share) {
			s.want(fill(s), unix.ENOSPC, "fill")
			other := a.serve()
			e := other.mustLookup(rootID, "big") // as after a listing
			s.must(s.unlink(rootID, "big"))
			for deadline := time.Now().Add(5 * time.Second); a.used().Bytes > 0; {
				if time.Now().After(deadline) {
					t.Fatalf("used %v, because a guest remembers the file", a.used())
				}
			}
			_, err := other.getattr(e.NodeID)
			other.want(err, unix.ESTALE, "what it remembers")
			other.forget(e.NodeID, 1)
			s.want(fill(s), unix.ENOSPC, "fill again")
		},
		"grown without a name": func(t *testing.T, a *account, s *share) {
			e, fh := s.mustCreate(rootID, "f", 0o600)
			s.must(s.unlink(rootID, "f"))
			until(t, func(i int) errno { _, err := s.write(e.NodeID, fh, uint64(i)<<12, "x"); return err })
			a.bound("full")
			s.must(s.release(e.NodeID, fh))
			s.forget(e.NodeID, 1)
			a.equal("closed")
		},
		"empty files": func(t *testing.T, a *account, s *share) {
			until(t, func(i int) errno { _, _, err := s.create(rootID, entryName(i), unix.O_RDWR, 0o600); return err })
		},
		"hard links": func(t *testing.T, a *account, s *share) {
			e, _ := s.mustCreate(rootID, "f", 0o600)
			until(t, func(i int) errno { _, err := s.link(e.NodeID, rootID, entryName(i)); return err })
		},
		"symlinks": func(t *testing.T, a *account, s *share) {
			until(t, func(i int) errno { _, err := s.symlink(rootID, entryName(i), strings.Repeat("x", 100)); return err })
		},
		"directories": func(t *testing.T, a *account, s *share) {
			until(t, func(i int) errno { _, err := s.mkdir(rootID, strings.Repeat("n", 200)+entryName(i), 0o700); return err })
		},
		"xattrs": func(t *testing.T, a *account, s *share) {
			until(t, func(i int) errno {
				e, fh, err := s.create(rootID, entryName(i), unix.O_RDWR, 0o600)
				if err == 0 {
					s.must(s.release(e.NodeID, fh))
					err = s.setxattr(e.NodeID, "user.a", pattern(2000), 0)
				}
				return err
			})
		},
		"an attribute again": func(t *testing.T, a *account, s *share) {
			e, fh := s.mustCreate(rootID, "f", 0o600)
			n := e.NodeID
			s.must(s.setxattr(n, "user.a", pattern(3000), 0))
			until(t, func(i int) errno { _, err := s.write(n, fh, uint64(i)<<12, "x"); return err })
			s.must(s.setxattr(n, "user.a", pattern(3000), 0))
			s.must(s.setxattr(n, "user.a", pattern(2000), unix.XATTR_REPLACE))
			s.want(s.setxattr(n, "user.b", pattern(2500), 0), unix.ENOSPC, "another attribute")
			s.must(s.removexattr(n, "user.a"))
		},
		"nameless": func(t *testing.T, a *account, s *share) {
			until(t, func(int) errno {
				_, err := s.do(w.OpTmpfile, rootID, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{Flags: unix.O_RDWR | unix.O_TMPFILE, Mode: 0o100600}, w.Append))
				return err
			})
		},
		"restart": func(t *testing.T, a *account, s *share) {
			s.want(fill(s), unix.ENOSPC, "fill")
			s.init()
			_, err := s.mkdir(rootID, "d", 0o700)
			for range 100 {
				if err == 0 {
					_, err = s.mkdir(rootID, entryName(int(s.unique)), 0o700)
				}
			}
			s.want(err, unix.ENOSPC, "after a restart")
		},
	}
	for name, run := range tests {
		t.Run(name, func(t *testing.T) {
			a := newAccount(t, ledger.Limits{Bytes: limit, Inodes: 1024})
			run(t, a, a.serve())
			if u := a.used(); u.Bytes > limit || u.Inodes > 1024 {
				t.Errorf("used %v, more than the limits", u)
			}
			a.bound("in the end")
		})
	}
}

// TestFullVolume: on a full volume a write inside a file passes, and df shows what
// is left.
func TestFullVolume(t *testing.T) {
	const limit = 256 << 10
	a := newAccount(t, ledger.Limits{Bytes: limit, Inodes: 100})
	s := a.serve()
	e, fh := s.mustCreate(rootID, "f", 0o600)
	_, err := s.write(e.NodeID, fh, 0, pattern(limit))
	s.must(err)
	for off := range uint64(limit / 4096) {
		if _, err := s.write(e.NodeID, fh, off*4096, pattern(4096)); err != 0 {
			t.Fatalf("write inside at %d: %v", off, err)
		}
	}
	_, err = s.write(e.NodeID, fh, limit, "x")
	s.want(err, unix.ENOSPC, "beyond")
	var out w.StatfsOut
	b, err := s.do(w.OpStatfs, rootID, w.Size[w.StatfsOut]())
	s.must(err)
	w.Decode(b, &out)
	if out.Blocks*uint64(out.Frsize) != limit || out.Bfree != 0 || out.Bavail != 0 || out.Files != 100 || out.Ffree != 99 {
		t.Errorf("statfs %+v", out)
	}
	s.must(s.truncate(e.NodeID, 0))
	_, err = s.write(e.NodeID, fh, 0, pattern(limit))
	s.want(err, 0, "after cutting it")
	a.equal("in the end")
}

// TestWritersAtOnce: four servers that fill a volume together never exceed its
// limit, and lose nothing of it.
func TestWritersAtOnce(t *testing.T) {
	const limit = 8 << 20
	a := newAccount(t, ledger.Limits{Bytes: limit, Inodes: 1 << 20})
	for range 4 {
		a.serve()
	}
	var writers sync.WaitGroup
	for i, s := range a.shares {
		writers.Go(func() {
			refused := 0
			for n := 0; refused < 20; n++ {
				e, fh, err := s.create(rootID, entryName(i*100_000+n%7), unix.O_RDWR, 0o600)
				if err == 0 {
					_, err = s.writeWith(e.NodeID, w.WriteIn{Fh: fh, Flags: unix.O_APPEND}, pattern(3000*(1+n%9)))
					s.release(e.NodeID, fh)
					s.forget(e.NodeID, 1)
				}
				if err == unix.ENOSPC {
					refused++
				} else if err != 0 {
					t.Errorf("writer %d: %v", i, err)
					return
				}
			}
		})
	}
	stop, looked := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				looked <- n
				return
			default:
			}
			truth := a.truth() // nothing is freed: all of it is there still when the ledger is read
			if u := a.used(); u.Bytes < truth.Bytes || truth.Bytes > limit {
				t.Errorf("the ledger says %v, there is %v of %d", u, truth, limit)
			}
		}
	}()
	writers.Wait()
	close(stop)
	t.Logf("looked %d times", <-looked)
	a.settle()
	if u := a.used(); u.Bytes < limit-256<<10 {
		t.Errorf("only %d of %d could be used", u.Bytes, limit)
	}
}

// TestHostDeletesWhatGrows: one server appends to a file that a program on the
// host deletes meanwhile, again and again; nothing stays charged.
func TestHostDeletesWhatGrows(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s, host := a.alone(), a.host()
	for round := range 60 {
		e, fh := s.mustCreate(rootID, "f", 0o600)
		var both sync.WaitGroup
		both.Go(func() {
			for range 40 {
				if _, err := s.writeWith(e.NodeID, w.WriteIn{Fh: fh, Flags: unix.O_APPEND}, pattern(8192)); err != 0 {
					t.Error(err)
					return
				}
			}
		})
		both.Go(func() {
			time.Sleep(time.Duration(round) * 10 * time.Microsecond) // another instant in each round
			if err := host.fs.Remove(t.Context(), "/f"); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		s.release(e.NodeID, fh)
		s.forget(e.NodeID, 1)
	}
	a.equal("after the last round")
}
