package fuseserver

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// queue is one more queue of a server.
func (a *account) queue(s *share) *share {
	return &share{client: newClient(a.t, s.srv), dir: s.dir, srv: s.srv}
}

// holder is somebody else who can hold the locks of inodes.
func (a *account) holder() *ledger.Writer {
	a.t.Helper()
	f, err := os.OpenFile(a.path, os.O_RDWR, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	h, err := ledger.NewWriter(f, ledger.Options{})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { h.Close() })
	return h
}

// hold waits for the lock of an inode.
func hold(w *ledger.Writer, ino uint64) {
	for !w.TryHold(ino) {
		time.Sleep(time.Millisecond)
	}
}

// TestAttributesOfARemovedDirectory: they are nobody's any more, and cannot grow.
func TestAttributesOfARemovedDirectory(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 20})
	s := a.serve()
	for range 20 {
		e, err := s.mkdir(rootID, "d", 0o700)
		s.must(err)
		s.must(s.setxattr(e.NodeID, "user.a", pattern(3000), 0))
		s.must(s.rmdir(rootID, "d"))
		s.want(s.setxattr(e.NodeID, "user.b", pattern(3000), 0), unix.ENOENT, "an attribute more")
		s.must(s.removexattr(e.NodeID, "user.a"))
		s.forget(e.NodeID, 1)
	}
	a.equal("in the end")
	if u := a.used(); u != (ledger.Delta{}) {
		t.Errorf("used %v", u)
	}
}

// longACL is an access list of so many entries that it does not fit into an inode
// without cost.
func longACL() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	entry := func(tag, perm uint16, id uint32) {
		b = binary.LittleEndian.AppendUint16(b, tag)
		b = binary.LittleEndian.AppendUint16(b, perm)
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	entry(0x01, 7, ^uint32(0))
	for id := range uint32(8) {
		entry(0x02, 7, 1000+id)
	}
	entry(0x04, 5, ^uint32(0))
	entry(0x10, 7, ^uint32(0))
	entry(0x20, 5, ^uint32(0))
	return b
}

// TestInheritedAccessLists: what is made in a directory with a default access list
// costs what it inherits, and gives just that back.
func TestInheritedAccessLists(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 20})
	if err := unix.Setxattr(a.dir, "system.posix_acl_default", longACL(), 0); err != nil {
		prereq.Missing(t, "a file system with access lists in the temporary directory: %v", err)
	}
	a.settle()
	s, host := a.serve(), a.host()
	for i := range 5 {
		name := fmt.Sprint(i)
		e, fh := s.mustCreate(rootID, "f"+name, 0o600)
		s.must(s.release(e.NodeID, fh))
		_, err := s.mkdir(rootID, "d"+name, 0o700)
		s.must(err)
		_, err = s.symlink(rootID, "l"+name, "target")
		s.must(err)
		_, err = s.mknod(rootID, "n"+name, unix.S_IFREG|0o600, 0)
		s.must(err)
		if err := host.fs.Mkdir(t.Context(), "/h"+name); err != nil {
			t.Fatal(err)
		}
		if err := host.fs.Write(t.Context(), "/h"+name+"/f", []byte("x"), volumefs.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	a.equal("made")
	s.want(fillNames(s), unix.ENOSPC, "fill")
	a.bound("full")
	if u := a.used(); u.Bytes > 1<<20 {
		t.Errorf("used %v", u)
	}
	for i := range 5 {
		name := fmt.Sprint(i)
		s.must(s.unlink(rootID, "f"+name))
		s.must(s.unlink(rootID, "l"+name))
		s.must(s.unlink(rootID, "n"+name))
		s.must(s.rmdir(rootID, "d"+name))
		if err := host.fs.RemoveDir(t.Context(), "/h"+name); err != nil {
			t.Error(err)
		}
	}
	a.equal("removed")
}

// fillNames makes files until something refuses.
func fillNames(s *share) errno {
	for i := range 100_000 {
		if _, _, err := s.create(rootID, "more"+fmt.Sprint(i), unix.O_RDWR, 0o600); err != 0 {
			return err
		}
	}
	return 0
}

// TestCopyOfWhatGrows: no more is copied than was charged, should the source grow
// while the target is waited for.
func TestCopyOfWhatGrows(t *testing.T) {
	const limit = 5 << 20
	a := newAccount(t, ledger.Limits{Bytes: limit})
	s := a.serve()
	other, third := a.queue(s), a.holder()
	src, sfh := s.mustCreate(rootID, "src", 0o600)
	dst, dfh := s.mustCreate(rootID, "dst", 0o600)
	s.write(src.NodeID, sfh, 0, "x")
	hold(third, a.ino("dst"))
	var copied sync.WaitGroup
	copied.Go(func() {
		_, _ = other.do(w.OpCopyFileRange, src.NodeID, 8, pack(w.CopyFileRangeIn{FhIn: sfh, NodeIDOut: dst.NodeID, FhOut: dfh, Len: 4 << 20}, w.Append))
	})
	for stripe := s.srv.quota.stripeOf(a.ino("dst")); stripe.TryLock(); stripe.Unlock() {
		time.Sleep(time.Millisecond) // until the copy has it, and waits for the target's lock
	}
	for i := range uint64(40) {
		if _, err := s.write(src.NodeID, sfh, i*100_000, pattern(100_000)); err != 0 {
			t.Fatal(err)
		}
	}
	third.Unhold(a.ino("dst"))
	copied.Wait()
	a.bound("copied")
	if u := a.walk(); u.Bytes > limit {
		t.Errorf("there is %v", u)
	}
}

// TestTruncateOfAClosedHandle: the handle through which a file is cut is closed
// meanwhile; nobody waits for himself.
func TestTruncateOfAClosedHandle(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s := a.alone()
	other := a.queue(s)
	for range 10 {
		e, fh := s.mustCreate(rootID, "f", 0o600)
		for off := uint64(0); off < 80<<20; off += 1 << 20 {
			_, err := s.write(e.NodeID, fh, off, pattern(1<<20))
			s.must(err)
		}
		var cut sync.WaitGroup
		cut.Go(func() {
			_, err := other.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrSize | w.FattrFh, Fh: fh})
			if err != 0 && err != unix.EBADF {
				t.Errorf("truncate: %v", err)
			}
		})
		time.Sleep(time.Millisecond) // about when the cut is at work: any instant will do
		s.must(s.release(e.NodeID, fh))
		cut.Wait()
		s.must(s.unlink(rootID, "f"))
		s.forget(e.NodeID, 1)
	}
	a.equal("in the end")
}

// TestNumbersUsedAgain: files are deleted, closed and made on many queues, so that a
// number is soon another file's.
func TestNumbersUsedAgain(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s := a.serve()
	end := time.Now().Add(3 * time.Second)
	var all sync.WaitGroup
	for i := range 6 {
		q := a.queue(s)
		all.Go(func() {
			name := fmt.Sprint("f", i)
			for n := 1; time.Now().Before(end); n++ {
				e, fh, err := q.create(rootID, name, unix.O_RDWR, 0o600)
				if err != 0 {
					t.Errorf("create: %v", err)
					return
				}
				q.write(e.NodeID, fh, 0, pattern(n%16*4096+1))
				q.unlink(rootID, name)
				q.release(e.NodeID, fh)
				q.forget(e.NodeID, 1)
			}
		})
	}
	all.Wait()
	a.equal("in the end")
	if u := a.used(); u != (ledger.Delta{}) {
		t.Errorf("used %v", u)
	}
}

// TestHostRenamesALink: the host renames a name over another one of what has become
// the same file, which does nothing.
func TestHostRenamesALink(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s, host, third := a.serve(), a.host(), a.holder()
	for round := range 10 {
		for _, name := range []string{"x", "y"} {
			e, fh := s.mustCreate(rootID, name, 0o600)
			s.must(s.release(e.NodeID, fh))
		}
		y := s.mustLookup(rootID, "y")
		_, err := s.link(y.NodeID, rootID, "z")
		s.must(err)
		root := a.ino(".")
		hold(third, root)
		var both sync.WaitGroup
		both.Go(func() { s.must(s.rename(rootID, "z", rootID, "x", 0)) })
		time.Sleep(time.Duration(round) * time.Millisecond) // who comes first differs from round to round
		both.Go(func() { _ = host.fs.Rename(t.Context(), "/x", "/y", volumefs.WriteOptions{}) })
		time.Sleep(10 * time.Millisecond) // so that both have looked, and wait, in most rounds
		third.Unhold(root)
		both.Wait()
		a.equal(fmt.Sprintf("round %d", round))
		for _, name := range []string{"x", "y", "z"} {
			_ = s.unlink(rootID, name)
		}
	}
}

// TestHostBesideALease: a program on the host gets the lock of a file that a guest
// writes without end, without anybody having to go on in doubt.
func TestHostBesideALease(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s, host := a.alone(), a.host()
	e, fh := s.mustCreate(rootID, "y", 0o600)
	stop := make(chan struct{})
	var writes sync.WaitGroup
	writes.Go(func() {
		q := a.queue(s)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := q.write(e.NodeID, fh, 0, pattern(1000)); err != 0 {
					t.Error(err)
					return
				}
			}
		}
	})
	for range 8 {
		_, err := s.link(e.NodeID, rootID, "z")
		s.must(err)
		if err := host.fs.Remove(t.Context(), "/z"); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	writes.Wait()
	if st, err := a.l.State(); err != nil || st.Unsettled {
		t.Errorf("%+v, %v", st, err)
	}
	a.equal("in the end")
}
