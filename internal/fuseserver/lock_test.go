package fuseserver

import (
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const all = math.MaxInt64 // the end of a range without end

// lock sends SETLK, or SETLKW and waits for its end.
func (cl *client) lock(op w.Opcode, node uint64, in w.LkIn) errno {
	cl.t.Helper()
	_, err := cl.do(op, node, 0, pack(in, w.Append))
	return err
}

func (cl *client) getlk(node uint64, in w.LkIn) (w.FileLock, errno) {
	cl.t.Helper()
	b, err := cl.do(w.OpGetlk, node, w.Size[w.LkOut](), pack(in, w.Append))
	var out w.LkOut
	w.Decode(b, &out)
	return out.Lk, err
}

func (cl *client) flush(node, fh, owner uint64) errno {
	cl.t.Helper()
	_, err := cl.do(w.OpFlush, node, 0, pack(w.FlushIn{Fh: fh, LockOwner: owner}, w.Append))
	return err
}

// lk is a lock of a whole file.
func lk(fh, owner uint64, typ uint32) w.LkIn {
	return w.LkIn{Fh: fh, Owner: owner, Lk: w.FileLock{End: all, Type: typ}}
}

// ranged is lk for a range, both ends included.
func ranged(fh, owner uint64, typ uint32, start, end uint64) w.LkIn {
	in := lk(fh, owner, typ)
	in.Lk.Start, in.Lk.End = start, end
	return in
}

// fl is a flock of a handle.
func fl(fh uint64, typ uint32) w.LkIn {
	in := lk(fh, fh, typ)
	in.Flags = w.LkFlock
	return in
}

// guestFile is a file that one guest has open.
type guestFile struct {
	*share
	node, fh uint64
}

func (s *share) openFile(name string, flags uint32) *guestFile {
	s.t.Helper()
	e := s.mustLookup(rootID, name)
	fh, err := s.open(e.NodeID, flags)
	s.must(err)
	return &guestFile{s, e.NodeID, fh}
}

// two returns the file "f" of a directory as two guests have it open, and its
// path on the host.
func two(t *testing.T) (a, b *guestFile, path string) {
	t.Helper()
	dir := t.TempDir()
	path = dir + "/f"
	if err := os.WriteFile(path, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	return serveDir(t, dir, nil).openFile("f", unix.O_RDWR), serveDir(t, dir, nil).openFile("f", unix.O_RDWR), path
}

func (g *guestFile) set(in w.LkIn) errno { g.t.Helper(); return g.lock(w.OpSetlk, g.node, in) }

func TestLocksAreGranted(t *testing.T) {
	const locks = uint32(w.InitPosixLocks | w.InitFlockLocks)
	s := newShare(t, nil)
	if got := s.init().Flags & locks; got != locks {
		t.Errorf("a writable share grants %#x of %#x", got, locks)
	}
	s = newShare(t, func(c *Config) { c.Readonly = true })
	if got := s.init().Flags & locks; got != 0 {
		t.Errorf("a read-only share grants %#x: its guest could stop writers elsewhere", got)
	}
	if string(endWaitsName) != agentproto.EndWaitsAttr+"\x00" {
		t.Errorf("the agent speaks to %q, the server listens to %q", agentproto.EndWaitsAttr, endWaitsName)
	}
}

// TestLocksExclude: every kind of lock taken through one server keeps the same
// kind out of the other one and of the host's programs, and the other way
// round; shared ones go together.
func TestLocksExclude(t *testing.T) {
	kinds := map[string]struct {
		guest func(fh uint64, typ uint32) w.LkIn
		host  func(fd int, typ int16) error
	}{
		"flock": {fl, func(fd int, typ int16) error { return unix.Flock(fd, flockOps[typ]|unix.LOCK_NB) }},
		"fcntl": {func(fh uint64, typ uint32) w.LkIn { return lk(fh, 7, typ) }, func(fd int, typ int16) error {
			return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: typ, Whence: unix.SEEK_SET})
		}},
	}
	for name, kind := range kinds {
		t.Run(name, func(t *testing.T) {
			a, b, path := two(t)
			host, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			parties := map[string]func(typ uint32) error{
				"a":    func(typ uint32) error { return plain(a.set(kind.guest(a.fh, typ))) },
				"b":    func(typ uint32) error { return plain(b.set(kind.guest(b.fh, typ))) },
				"host": func(typ uint32) error { return kind.host(int(host.Fd()), int16(typ)) },
			}
			for holder, hold := range parties {
				for _, tt := range []struct{ held, wanted, want int }{
					{unix.F_WRLCK, unix.F_WRLCK, int(unix.EAGAIN)}, {unix.F_WRLCK, unix.F_RDLCK, int(unix.EAGAIN)},
					{unix.F_RDLCK, unix.F_WRLCK, int(unix.EAGAIN)}, {unix.F_RDLCK, unix.F_RDLCK, 0},
				} {
					if err := hold(uint32(tt.held)); err != nil {
						t.Fatalf("%s: lock %d: %v", holder, tt.held, err)
					}
					for other, try := range parties {
						if other == holder {
							continue
						}
						if err := try(uint32(tt.wanted)); !sameErrno(err, errno(tt.want)) {
							t.Errorf("%s has %d, %s asks for %d: %v, want %v", holder, tt.held, other, tt.wanted, err, errno(tt.want))
						}
						if err := try(unix.F_UNLCK); err != nil {
							t.Errorf("%s: unlock: %v", other, err)
						}
					}
					if err := hold(unix.F_UNLCK); err != nil {
						t.Errorf("%s: unlock: %v", holder, err)
					}
				}
			}
		})
	}
}

func plain(err errno) error {
	if err == 0 {
		return nil
	}
	return err
}

func sameErrno(err error, want errno) bool {
	return err == nil && want == 0 || err == want
}

// TestLockRanges: one owner's ranges merge and split as on any host, and GETLK
// tells what is in the way.
func TestLockRanges(t *testing.T) {
	a, b, _ := two(t)
	a.must(a.set(ranged(a.fh, 1, unix.F_WRLCK, 10, 29)))
	a.must(a.set(ranged(a.fh, 1, unix.F_RDLCK, 15, 19))) // splits it
	a.must(a.set(ranged(a.fh, 1, unix.F_UNLCK, 10, 12)))
	tests := map[string]struct {
		ask  w.LkIn
		want w.FileLock
	}{
		"before":         {ranged(b.fh, 2, unix.F_WRLCK, 0, 12), w.FileLock{Start: 0, End: 12, Type: unix.F_UNLCK}},
		"first part":     {ranged(b.fh, 2, unix.F_RDLCK, 0, 14), w.FileLock{Start: 13, End: 14, Type: unix.F_WRLCK}},
		"shared part":    {ranged(b.fh, 2, unix.F_WRLCK, 15, 19), w.FileLock{Start: 15, End: 19, Type: unix.F_RDLCK}},
		"shared, shared": {ranged(b.fh, 2, unix.F_RDLCK, 15, 19), w.FileLock{Start: 15, End: 19, Type: unix.F_UNLCK}},
		"last part":      {ranged(b.fh, 2, unix.F_WRLCK, 29, all), w.FileLock{Start: 20, End: 29, Type: unix.F_WRLCK}},
		"after":          {ranged(b.fh, 2, unix.F_WRLCK, 30, all), w.FileLock{Start: 30, End: all, Type: unix.F_UNLCK}},
	}
	for name, tt := range tests {
		if got, err := b.getlk(b.node, tt.ask); err != 0 || got != tt.want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
	if got, err := a.getlk(a.node, ranged(a.fh, 1, unix.F_WRLCK, 0, all)); err != 0 || got.Type != unix.F_UNLCK {
		t.Errorf("an owner is in its own way: %+v, %v", got, err)
	}
	if got, err := a.getlk(a.node, ranged(a.fh, 3, unix.F_WRLCK, 0, all)); err != 0 || got.Type != unix.F_WRLCK {
		t.Errorf("another owner of the same guest: %+v, %v", got, err)
	}
	// Up to the end of the file means up to wherever that will be.
	b.must(b.set(ranged(b.fh, 2, unix.F_WRLCK, 1000, all)))
	a.want(a.set(ranged(a.fh, 1, unix.F_RDLCK, 1<<40, 1<<40)), unix.EAGAIN, "far beyond the end")
}

// TestLocksEndWithTheirFile: FLUSH drops the locks of its owner and no others,
// RELEASE drops flock and what was locked through the handle, and what nobody
// locks costs no descriptor.
func TestLocksEndWithTheirFile(t *testing.T) {
	a, b, _ := two(t)
	idle := a.srv.fds.Load()
	const process, other, file = 100, 200, 300
	a.must(a.set(ranged(a.fh, process, unix.F_WRLCK, 0, 9)))
	a.must(a.set(ranged(a.fh, other, unix.F_WRLCK, 10, 19)))
	second, err := a.open(a.node, unix.O_RDWR)
	a.must(err)
	a.must(a.set(ranged(second, file, unix.F_WRLCK, 20, 29)))
	a.must(a.set(fl(second, unix.F_WRLCK)))
	free := func(start uint64) bool {
		l, err := b.getlk(b.node, ranged(b.fh, 1, unix.F_WRLCK, start, start))
		b.must(err)
		return l.Type == unix.F_UNLCK
	}
	a.must(a.flush(a.node, a.fh, 999))
	a.must(a.flush(a.node, second, process)) // closing another file of that process is enough
	if !free(0) || free(10) || free(20) {
		t.Errorf("after FLUSH of one process: free %v %v %v", free(0), free(10), free(20))
	}
	b.want(b.set(fl(b.fh, unix.F_RDLCK)), unix.EAGAIN, "flock before RELEASE")
	a.must(a.release(a.node, second))
	if free(10) || !free(20) {
		t.Errorf("after RELEASE of one handle: free %v %v", free(10), free(20))
	}
	b.must(b.set(fl(b.fh, unix.F_WRLCK)))
	a.must(a.set(lk(a.fh, other, unix.F_UNLCK)))
	if !free(10) {
		t.Error("still locked after F_UNLCK")
	}
	if n := a.srv.fds.Load(); n != idle {
		t.Errorf("%d descriptors held, %d before the locks", n, idle)
	}
}

// TestLocksEndWithTheirServer: a guest that is reset, or whose server ends,
// leaves no lock behind.
func TestLocksEndWithTheirServer(t *testing.T) {
	for name, end := range map[string]func(a *guestFile){
		"reset":   func(a *guestFile) { a.init() },
		"destroy": func(a *guestFile) { a.do(w.OpDestroy, 0, 0) },
		"close":   func(a *guestFile) { a.srv.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			a, b, _ := two(t)
			a.must(a.set(lk(a.fh, 1, unix.F_WRLCK)))
			a.must(a.set(fl(a.fh, unix.F_WRLCK)))
			end(a)
			b.want(b.set(lk(b.fh, 1, unix.F_WRLCK)), 0, "fcntl")
			b.want(b.set(fl(b.fh, unix.F_WRLCK)), 0, "flock")
		})
	}
}

// TestReadOnlyFileLocks: a shared lock needs no permission to write on the
// host, and a file that its guest opened for reading only can be locked.
func TestReadOnlyFileLocks(t *testing.T) {
	a, b, path := two(t)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	r := a.share.openFile("f", unix.O_RDONLY)
	r.must(r.set(lk(r.fh, 1, unix.F_RDLCK)))
	r.must(r.set(fl(r.fh, unix.F_WRLCK)))
	b.want(b.set(lk(b.fh, 1, unix.F_WRLCK)), lockErrno(path), "an exclusive lock")
	b.want(b.set(fl(b.fh, unix.F_RDLCK)), unix.EAGAIN, "flock")
}

// lockErrno is what an exclusive lock of a file with a shared one gives: the
// host lets only root have a descriptor for it.
func lockErrno(string) errno {
	if os.Geteuid() == 0 {
		return unix.EAGAIN
	}
	return unix.ENOLCK
}

// TestBadLocks: what no kernel sends is refused and changes nothing.
func TestBadLocks(t *testing.T) {
	a, b, _ := two(t)
	dir, err := a.opendir(rootID)
	a.must(err)
	flags := lk(a.fh, 1, unix.F_WRLCK)
	flags.Flags = 2
	tests := map[string]struct {
		node uint64
		in   w.LkIn
		want errno
	}{
		"type":             {a.node, lk(a.fh, 1, 3), unix.EINVAL},
		"large type":       {a.node, lk(a.fh, 1, 1<<16), unix.EINVAL},
		"flags":            {a.node, flags, unix.EINVAL},
		"backwards":        {a.node, ranged(a.fh, 1, unix.F_WRLCK, 5, 4), unix.EINVAL},
		"end too large":    {a.node, ranged(a.fh, 1, unix.F_WRLCK, 0, all+1), unix.EINVAL},
		"start too large":  {a.node, ranged(a.fh, 1, unix.F_WRLCK, 1<<63, math.MaxUint64), unix.EINVAL},
		"unknown handle":   {a.node, lk(1<<40, 1, unix.F_WRLCK), unix.EBADF},
		"another's handle": {rootID, lk(a.fh, 1, unix.F_WRLCK), unix.EBADF},
		"directory":        {rootID, lk(dir, 1, unix.F_WRLCK), unix.EBADF},
	}
	for name, tt := range tests {
		for _, op := range []w.Opcode{w.OpGetlk, w.OpSetlk, w.OpSetlkw} {
			_, err := a.do(op, tt.node, 24, pack(tt.in, w.Append))
			a.want(err, tt.want, "%s, opcode %d", name, op)
		}
	}
	for _, in := range []w.LkIn{fl(a.fh, unix.F_WRLCK), lk(a.fh, 1, unix.F_UNLCK)} {
		_, err := a.getlk(a.node, in)
		a.want(err, unix.EINVAL, "GETLK %+v", in)
	}
	b.must(b.set(lk(b.fh, 1, unix.F_WRLCK)))
	ro := serveDir(t, a.dir, func(c *Config) { c.Readonly = true }).openFile("f", unix.O_RDONLY)
	for _, in := range []w.LkIn{fl(ro.fh, unix.F_RDLCK), lk(ro.fh, 1, unix.F_RDLCK), lk(ro.fh, 1, unix.F_UNLCK)} {
		ro.want(ro.set(in), unix.EROFS, "a lock of a read-only guest")
	}
}

// TestLockLimits: owners and their descriptors are bounded; beyond the bounds
// the guest gets ENOLCK, what it has stays, and what it gives back is there
// again.
func TestLockLimits(t *testing.T) {
	t.Run("owners", func(t *testing.T) {
		a, _, _ := two(t)
		idle := a.srv.fds.Load()
		for o := range uint64(maxOwners) {
			a.must(a.set(ranged(a.fh, o, unix.F_WRLCK, o, o)))
		}
		a.want(a.set(ranged(a.fh, maxOwners, unix.F_WRLCK, maxOwners, maxOwners)), unix.ENOLCK, "one owner too many")
		a.must(a.set(ranged(a.fh, 5, unix.F_WRLCK, 2000, 2000)))
		a.must(a.flush(a.node, a.fh, 5))
		a.must(a.set(ranged(a.fh, maxOwners, unix.F_WRLCK, maxOwners, maxOwners)))
		a.must(a.release(a.node, a.fh))
		if n := a.srv.fds.Load(); n != idle-1 {
			t.Errorf("%d descriptors held after RELEASE, want %d", n, idle-1)
		}
	})
	t.Run("descriptors", func(t *testing.T) {
		a := newShare(t, func(c *Config) { c.FDBudget = 20 })
		e, fh := a.mustCreate(rootID, "f", 0o600)
		var err errno
		for o := uint64(0); o < 100 && err == 0; o++ {
			err = a.lock(w.OpSetlk, e.NodeID, ranged(fh, o, unix.F_WRLCK, o, o))
		}
		a.want(err, unix.ENOLCK, "beyond the budget")
		if n := a.srv.fds.Load(); n > 20 {
			t.Errorf("%d descriptors for a budget of 20", n)
		}
	})
	t.Run("refused", func(t *testing.T) {
		a, b, _ := two(t)
		b.must(b.set(lk(b.fh, 1, unix.F_WRLCK)))
		idle := a.srv.fds.Load()
		for o := range uint64(2 * maxOwners) {
			a.want(a.set(lk(a.fh, o, unix.F_WRLCK)), unix.EAGAIN, "owner %d", o)
		}
		if n := a.srv.fds.Load(); n != idle {
			t.Errorf("%d descriptors held for nothing", n-idle)
		}
	})
}
