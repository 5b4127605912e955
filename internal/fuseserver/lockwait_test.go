package fuseserver

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// ask sends SETLKW as a thread of the guest; the answer comes on the channel.
// It returns when the server has taken or put aside the request.
func (g *guestFile) ask(thread uint32, in w.LkIn) *asked {
	g.t.Helper()
	g.unique++
	h := w.InHeader{Opcode: w.OpSetlkw, Unique: g.unique, NodeID: g.node, PID: thread}
	args := pack(in, w.Append)
	h.Len = uint32(headerSize + len(args))
	a := &asked{parkedRequest{[][]byte{w.Append(nil, &h), args}, [][]byte{make([]byte, replySize)}, make(chan int, 1)}, g, g.unique}
	c := newCall(g.srv)
	if n, done := c.serve(a.in, a.out, a); done {
		a.done <- n
	}
	return a
}

// asked is a SETLKW under way.
type asked struct {
	parkedRequest
	g      *guestFile
	unique uint64
}

// waits reports whether there is no answer yet.
func (a *asked) waits() bool { return len(a.done) == 0 }

// answer waits for the answer, which must come soon.
func (a *asked) answer() errno {
	a.g.t.Helper()
	select {
	case n := <-a.done:
		var oh w.OutHeader
		if _, ok := w.Decode(a.out[0][:n], &oh); !ok || int(oh.Len) != n || oh.Unique != a.unique {
			a.g.t.Errorf("bad reply of %d bytes: %+v", n, oh)
		}
		return errno(-oh.Error)
	case <-time.After(20 * time.Second):
		a.g.t.Fatal("no answer")
	}
	return 0
}

// waiting returns the number of requests that a server has put aside.
func (g *guestFile) waiting() int {
	t := g.srv.session.Load().locks
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.waits)
}

// TestUnlockNeverWaits: Linux sends flock(LOCK_UN) as SETLKW.
func TestUnlockNeverWaits(t *testing.T) {
	a, b, _ := two(t)
	for _, make := range []func(uint64, uint32) w.LkIn{fl, func(fh uint64, typ uint32) w.LkIn { return lk(fh, 1, typ) }} {
		b.must(b.set(make(b.fh, unix.F_WRLCK)))
		a.want(a.ask(1, make(a.fh, unix.F_UNLCK)).answer(), 0, "unlock of nothing")
		b.want(b.ask(1, make(b.fh, unix.F_UNLCK)).answer(), 0, "unlock")
		a.must(a.set(make(a.fh, unix.F_WRLCK)))
		a.must(a.set(make(a.fh, unix.F_UNLCK)))
	}
}

// TestWaitsAreGranted: a blocking lock comes when the holder lets go, whoever
// that is and however it does so.
func TestWaitsAreGranted(t *testing.T) {
	a, b, path := two(t)
	host, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	second, e := a.open(a.node, unix.O_RDWR)
	a.must(e)
	hostLock := func(typ int16) errno {
		return fcntlLock(int(host.Fd()), unix.F_OFD_SETLK, &unix.Flock_t{Type: typ})
	}
	tests := map[string]struct {
		take, give func() errno
		ask        w.LkIn
	}{
		"flock in the same guest":     {func() errno { return a.set(fl(second, unix.F_WRLCK)) }, func() errno { return a.set(fl(second, unix.F_UNLCK)) }, fl(a.fh, unix.F_WRLCK)},
		"flock becomes shared":        {func() errno { return a.set(fl(second, unix.F_WRLCK)) }, func() errno { return a.set(fl(second, unix.F_RDLCK)) }, fl(a.fh, unix.F_RDLCK)},
		"flock of another guest":      {func() errno { return b.set(fl(b.fh, unix.F_WRLCK)) }, func() errno { return b.set(fl(b.fh, unix.F_UNLCK)) }, fl(a.fh, unix.F_WRLCK)},
		"fcntl in the same guest":     {func() errno { return a.set(lk(second, 2, unix.F_WRLCK)) }, func() errno { return a.set(lk(second, 2, unix.F_UNLCK)) }, lk(a.fh, 1, unix.F_WRLCK)},
		"a part is let go":            {func() errno { return a.set(lk(second, 2, unix.F_WRLCK)) }, func() errno { return a.set(ranged(second, 2, unix.F_UNLCK, 3, 4)) }, ranged(a.fh, 1, unix.F_WRLCK, 4, 4)},
		"fcntl becomes shared":        {func() errno { return a.set(lk(second, 2, unix.F_WRLCK)) }, func() errno { return a.set(lk(second, 2, unix.F_RDLCK)) }, lk(a.fh, 1, unix.F_RDLCK)},
		"a process closes its file":   {func() errno { return a.set(lk(second, 2, unix.F_WRLCK)) }, func() errno { return a.flush(a.node, second, 2) }, lk(a.fh, 1, unix.F_WRLCK)},
		"fcntl of another guest":      {func() errno { return b.set(lk(b.fh, 1, unix.F_WRLCK)) }, func() errno { return b.flush(b.node, b.fh, 1) }, lk(a.fh, 1, unix.F_WRLCK)},
		"fcntl of a host's program":   {func() errno { return hostLock(unix.F_WRLCK) }, func() errno { return hostLock(unix.F_UNLCK) }, lk(a.fh, 1, unix.F_WRLCK)},
		"shared, of a host's program": {func() errno { return hostLock(unix.F_RDLCK) }, func() errno { return hostLock(unix.F_UNLCK) }, lk(a.fh, 1, unix.F_WRLCK)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			a.must(tt.take())
			r := a.ask(1, tt.ask)
			if !r.waits() || a.waiting() != 1 {
				t.Fatal("it does not wait")
			}
			a.must(tt.give())
			a.want(r.answer(), 0, "the lock")
			for _, in := range []w.LkIn{fl(a.fh, unix.F_UNLCK), fl(second, unix.F_UNLCK), lk(a.fh, 1, unix.F_UNLCK), lk(a.fh, 2, unix.F_UNLCK)} {
				a.must(a.set(in))
			}
		})
	}
	if a.waiting() != 0 {
		t.Error("somebody waits still")
	}
}

// TestWaitsEnd: a wait that will not be granted ends when the guest's agent
// says so, when the request is interrupted, when its handle is released and
// when the session ends; then nothing is kept of it.
func TestWaitsEnd(t *testing.T) {
	endWaits := func(a *guestFile, value string) { a.must(a.setxattr(rootID, "user.msb.end_waits", value, 0)) }
	tests := map[string]struct {
		end  func(a *guestFile, r *asked)
		want errno
	}{
		"stop":      {func(a *guestFile, r *asked) { endWaits(a, "stop") }, unix.EINTR},
		"thread":    {func(a *guestFile, r *asked) { endWaits(a, "9 77\n12") }, unix.EINTR},
		"interrupt": {func(a *guestFile, r *asked) { a.interrupt(r.unique) }, unix.EINTR},
		"release":   {func(a *guestFile, r *asked) { a.must(a.release(a.node, r.handle())) }, unix.EBADF},
		"reset":     {func(a *guestFile, r *asked) { a.init() }, unix.EINTR},
		"close":     {func(a *guestFile, r *asked) { a.srv.Close() }, unix.EINTR},
	}
	for name, tt := range tests {
		for kind, in := range map[string]func(uint64) w.LkIn{
			"flock": func(fh uint64) w.LkIn { return fl(fh, unix.F_WRLCK) },
			"fcntl": func(fh uint64) w.LkIn { return lk(fh, 1, unix.F_WRLCK) },
		} {
			t.Run(name+", "+kind, func(t *testing.T) {
				a, b, _ := two(t)
				b.must(b.set(in(b.fh)))
				second, err := a.open(a.node, unix.O_RDWR)
				a.must(err)
				r := a.ask(77, in(second))
				endWaits(a, "78 79")
				a.interrupt(r.unique + 1)
				if !r.waits() {
					t.Fatal("somebody else's end ended it")
				}
				tt.end(a, r)
				a.want(r.answer(), tt.want, "the answer")
				if se := a.srv.session.Load(); se != nil && (a.waiting() != 0 || len(se.locks.owners) != 0) {
					t.Errorf("%d waits and %d owners are left", a.waiting(), len(se.locks.owners))
				}
			})
		}
	}
}

// TestInterruptOvertakes: on several queues an interrupt may come before the
// request that it is about, which then does not wait.
func TestInterruptOvertakes(t *testing.T) {
	for _, in := range []func(uint64) w.LkIn{
		func(fh uint64) w.LkIn { return fl(fh, unix.F_WRLCK) },
		func(fh uint64) w.LkIn { return lk(fh, 1, unix.F_WRLCK) },
	} {
		a, b, _ := two(t)
		b.must(b.set(in(b.fh)))
		for range 40 {
			a.interrupt(a.unique + 1)
			a.want(a.ask(77, in(a.fh)).answer(), unix.EINTR, "a request that was interrupted before it came")
		}
		r := a.ask(77, in(a.fh))
		if !r.waits() {
			t.Error("a request that nobody interrupted does not wait")
		}
		a.interrupt(r.unique)
		a.want(r.answer(), unix.EINTR, "the answer")
		if n := len(a.srv.session.Load().locks.owners); a.waiting() != 0 || n != 0 {
			t.Errorf("%d waits and %d owners are left", a.waiting(), n)
		}
	}
}

func (r *asked) handle() uint64 { return binary.LittleEndian.Uint64(r.in[1]) }

func (cl *client) interrupt(unique uint64) {
	h := w.InHeader{Opcode: w.OpInterrupt, Len: headerSize + 8, Unique: unique | 1<<63}
	cl.raw([][]byte{w.Append(nil, &h), pack(w.InterruptIn{Unique: unique}, w.Append)}, nil)
}

// TestStoppingGuestDoesNotWait: once the agent has said that it stops, a lock
// that is not free is refused, so that a program which tries again does not
// hold up the end.
func TestStoppingGuestDoesNotWait(t *testing.T) {
	a, b, _ := two(t)
	b.must(b.set(lk(b.fh, 1, unix.F_WRLCK)))
	a.must(a.setxattr(rootID, "user.msb.end_waits", "stop", 0))
	a.want(a.ask(1, lk(a.fh, 1, unix.F_WRLCK)).answer(), unix.ENOLCK, "a lock that is not free")
	b.must(b.set(lk(b.fh, 1, unix.F_UNLCK)))
	a.want(a.ask(1, lk(a.fh, 1, unix.F_WRLCK)).answer(), 0, "a free lock")
	a.init()
	a.want(errno(0), 0, "a new session")
	a.uid = 1000
	a.want(a.setxattr(rootID, "user.msb.end_waits", "stop", 0), unix.EPERM, "a program that is not root")
	a.uid = 0
	a.want(a.setxattr(a.mustLookup(rootID, "f").NodeID, "user.msb.end_waits", "stop", 0), unix.EPERM, "on a file")
	a.want(a.setxattr(rootID, "user.msb.end_waits", "12 x", 0), unix.EINVAL, "no number")
	a.want(a.setxattr(rootID, "user.msb.end_waits", "-1", 0), unix.EINVAL, "a negative number")
}

// TestWaitLimits: the requests put aside are bounded, the guest gets ENOLCK
// beyond that, and in the order of arrival all get the lock in the end.
func TestWaitLimits(t *testing.T) {
	a, b, _ := two(t)
	b.must(b.set(lk(b.fh, 1, unix.F_WRLCK)))
	var list []*asked
	for i := range maxWaits {
		list = append(list, a.ask(uint32(i+1), lk(a.fh, uint64(i), unix.F_WRLCK)))
	}
	a.want(a.ask(999, lk(a.fh, 999, unix.F_WRLCK)).answer(), unix.ENOLCK, "one too many")
	if n := a.waiting(); n != maxWaits {
		t.Fatalf("%d wait, want %d", n, maxWaits)
	}
	b.must(b.set(lk(b.fh, 1, unix.F_UNLCK)))
	for i, r := range list {
		a.want(r.answer(), 0, "request %d", i)
		a.must(a.flush(a.node, a.fh, uint64(i)))
	}
}

// TestFlushDoesNotEndAWait: a thread that waits goes on when another one of its
// process closes a file; the locks that the process had are dropped.
func TestFlushDoesNotEndAWait(t *testing.T) {
	a, b, _ := two(t)
	b.must(b.set(ranged(b.fh, 1, unix.F_WRLCK, 0, 0)))
	a.must(a.set(ranged(a.fh, 7, unix.F_WRLCK, 1, 1)))
	r := a.ask(1, ranged(a.fh, 7, unix.F_WRLCK, 0, 0))
	a.must(a.flush(a.node, a.fh, 7))
	b.must(b.set(ranged(b.fh, 1, unix.F_WRLCK, 1, 1)))
	if !r.waits() {
		t.Fatal("the wait ended")
	}
	b.must(b.set(lk(b.fh, 1, unix.F_UNLCK)))
	a.want(r.answer(), 0, "the lock")
	b.want(b.set(ranged(b.fh, 1, unix.F_WRLCK, 0, 0)), unix.EAGAIN, "what the wait got")
}

// TestIdleLocksDoNothing: a lock that is held, and a wait that is granted,
// leave no goroutine and no timer behind.
func TestIdleLocksDoNothing(t *testing.T) {
	a, b, _ := two(t)
	b.must(b.set(lk(b.fh, 1, unix.F_WRLCK)))
	r := a.ask(1, lk(a.fh, 1, unix.F_WRLCK))
	b.must(b.set(lk(b.fh, 1, unix.F_UNLCK)))
	a.want(r.answer(), 0, "the lock")
	table := a.srv.session.Load().locks
	table.done.Wait()
	table.mu.Lock()
	defer table.mu.Unlock()
	if table.running {
		t.Error("nobody waits and somebody looks")
	}
}

// TestLocksThroughVirtqueues: a wait holds up neither its queue nor the device,
// a queue may have more of them than it has threads, and a device whose front
// end leaves ends them.
func TestLocksThroughVirtqueues(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.must(s.release(e.NodeID, fh))
	holder := serveDir(t, s.dir, nil).openFile("f", unix.O_RDWR)
	holder.must(holder.set(lk(holder.fh, 1, unix.F_WRLCK)))
	guest, ended := throughVirtqueues(t, s.srv)
	m := &queueClient{t, guest, 1, 0}
	init := w.InitIn{Major: w.Major, Minor: 38, Flags: math.MaxUint32}
	m.call(w.OpInit, 0, w.InitOutSize, pack(init, w.Append))
	var out w.EntryOut
	w.Decode(m.call(w.OpLookup, rootID, w.EntryOutSize, z("f")), &out)
	var open w.OpenOut
	w.Decode(m.call(w.OpOpen, out.NodeID, w.OpenOutSize, pack(w.OpenIn{Flags: unix.O_RDWR}, w.Append)), &open)
	const waiters = 40
	got := make(chan string, waiters)
	for i := range waiters {
		h := w.InHeader{Opcode: w.OpSetlkw, Unique: uint64(1000 + i), NodeID: out.NodeID, PID: uint32(i + 1)}
		args := pack(ranged(open.Fh, uint64(i), unix.F_RDLCK, 0, all), w.Append)
		h.Len = uint32(headerSize + len(args))
		go func() {
			reply, err := guest.Do(1, [][]byte{w.Append(nil, &h), args}, []int{replySize})
			var oh w.OutHeader
			w.Decode(reply, &oh)
			got <- fmt.Sprint(err, oh.Error, oh.Unique == h.Unique, len(reply))
		}()
	}
	me := &guestFile{share: s}
	for deadline := time.Now().Add(20 * time.Second); me.waiting() < waiters && time.Now().Before(deadline); {
		m.call(w.OpGetattr, rootID, w.AttrOutSize, pack(w.GetattrIn{}, w.Append)) // the queue goes on
	}
	if n := me.waiting(); n != waiters {
		t.Errorf("%d requests wait, want %d", n, waiters)
	}
	holder.must(holder.set(lk(holder.fh, 1, unix.F_UNLCK)))
	for range waiters {
		if s := <-got; s != "<nil> 0 true 16" {
			t.Errorf("reply %q", s)
		}
	}
	ended()
}
