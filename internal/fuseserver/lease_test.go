package fuseserver

import (
	"fmt"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// alone returns a share of a server that knows that no other one writes.
func (a *account) alone() *share {
	s := a.serve()
	for !s.srv.quota.alone.Load() {
		time.Sleep(pollEvery / 10) // until its next poll
	}
	return s
}

// ino is the number of a file's inode.
func (a *account) ino(name string) uint64 {
	a.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(a.dir+"/"+name, &st); err != nil {
		a.t.Fatal(err)
	}
	return st.Ino
}

// TestLease: a server that is alone keeps the lock of a file that it writes, for a
// while, until the file is closed, and until another one comes.
func TestLease(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	f, err := os.OpenFile(a.path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	host, err := ledger.NewWriter(f, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	free := func(ino uint64) bool {
		ok := host.TryHold(ino)
		if ok {
			host.Unhold(ino)
		}
		return ok
	}
	s := a.alone()
	e, fh := s.mustCreate(rootID, "f", 0o600)
	ino := a.ino("f")
	kept := false
	for i := range uint64(100) { // at some instants there is none
		if _, err := s.write(e.NodeID, fh, i*1000, pattern(1000)); err != 0 {
			t.Fatal(err)
		}
		kept = kept || !free(ino)
	}
	if !kept {
		t.Error("a file that is written to is never kept")
	}
	a.bound("while it is written")
	if _, err := s.write(e.NodeID, fh, 0, "x"); err != 0 {
		t.Fatal(err)
	}
	s.must(s.release(e.NodeID, fh))
	if !free(ino) {
		t.Error("a closed file is kept")
	}
	_, err2 := s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrSize, Size: 5000})
	s.must(err2)
	a.equal("cut by its name")

	fh, err2 = s.open(e.NodeID, unix.O_RDWR)
	s.must(err2)
	other := a.serve()
	o := other.openFile("f", unix.O_RDWR)
	for i := range uint64(50) { // both find out about each other while they write
		_, err2 = s.writeWith(e.NodeID, w.WriteIn{Fh: fh, Flags: unix.O_APPEND}, pattern(3000))
		s.must(err2)
		if i%5 == 0 {
			other.must(other.truncate(o.node, 100*i))
		}
	}
	a.bound("while two write it")
	if st, err := a.l.State(); err != nil || st.Unsettled {
		t.Errorf("somebody did not get the file's lock in time: %+v, %v", st, err)
	}
	a.equal("in the end")
}

// TestChangedWithoutName: one server deletes a file while another one, which has it
// open, makes it longer or shorter.
func TestChangedWithoutName(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	s, other := a.serve(), a.serve()
	for round := range 60 {
		e, fh := s.mustCreate(rootID, "f", 0o600)
		_, err := s.write(e.NodeID, fh, 0, pattern(50_000))
		s.must(err)
		s.must(s.release(e.NodeID, fh))
		s.forget(e.NodeID, 1)
		o := other.openFile("f", unix.O_RDWR)
		var both sync.WaitGroup
		both.Go(func() {
			time.Sleep(time.Duration(round) * 20 * time.Microsecond) // another instant in each round
			s.must(s.unlink(rootID, "f"))
		})
		both.Go(func() {
			for i := range uint64(10) {
				if _, err := other.write(o.node, o.fh, 50_000+i*9000, pattern(9000)); err != 0 {
					t.Error(err)
				}
				if i%3 == 2 {
					if err := other.truncate(o.node, 10_000*i); err != 0 {
						t.Error(err)
					}
				}
			}
		})
		both.Wait()
		a.bound(fmt.Sprintf("round %d", round))
		if round%10 == 0 {
			a.equal(fmt.Sprintf("round %d, while it is open", round))
		}
		other.must(other.release(o.node, o.fh))
		other.forget(o.node, 1)
	}
	a.equal("after the last round")
}

// insideEnv makes TestLeaseChild a server that is alone and writes inside of the
// file "f" without end: "DIRECTORY LEDGER".
const insideEnv = "FUSESERVER_TEST_INSIDE"

func TestLeaseChild(t *testing.T) {
	spec := os.Getenv(insideEnv)
	if spec == "" {
		return // it is a part of TestStoppedWithALease
	}
	a := &account{t: t}
	if _, err := fmt.Sscan(spec, &a.dir, &a.path); err != nil {
		t.Fatal(err)
	}
	f := a.alone().openFile("f", unix.O_RDWR)
	for i := 0; ; i++ {
		_, err := f.write(f.node, f.fh, 900_000, pattern(100_000))
		f.must(err)
		if i%10 == 0 {
			fmt.Println(i)
		}
	}
}

// TestStoppedWithALease: a server that is alone is stopped, perhaps inside of a
// write, while another one comes and cuts the file. When it goes on, its write may
// make the file longer again; the ledger does not say less than there is without
// asking for a walk.
func TestStoppedWithALease(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30})
	for round := range 4 {
		host := a.host()
		if err := host.fs.Write(t.Context(), "/f", []byte(pattern(1_000_000)), volumefs.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
		child := a.childOf("TestLeaseChild", fmt.Sprintf("%s=%s %s", insideEnv, a.dir, a.path), 2)
		_ = child.Process.Signal(syscall.SIGSTOP)
		s := a.serve()
		e := s.mustLookup(rootID, "f")
		began := time.Now()
		s.must(s.truncate(e.NodeID, 10))
		if d := time.Since(began); d > 5*time.Second {
			t.Errorf("round %d: cutting the file took %v", round, d)
		}
		_ = child.Process.Signal(syscall.SIGCONT)
		for size := int64(0); size < 1_000_000; { // it writes again
			var st unix.Stat_t
			if err := unix.Stat(a.dir+"/f", &st); err != nil {
				t.Fatal(err)
			}
			size = st.Size
		}
		deadline := time.Now().Add(5 * time.Second)
		for low := true; low; {
			st, err := a.l.State()
			if err != nil {
				t.Fatal(err)
			}
			walk := a.walk()
			low = !st.Unsettled && (st.Used.Bytes < walk.Bytes || st.Used.Inodes < walk.Inodes)
			if low && time.Now().After(deadline) {
				t.Fatalf("round %d: the ledger says %v and asks for no walk, there is %v", round, st.Used, walk)
			}
		}
		_ = child.Process.Kill()
		_ = child.Wait()
		s.init()
		if err := s.srv.Close(); err != nil {
			t.Error(err)
		}
		a.shares = nil
		a.settle()
	}
}
