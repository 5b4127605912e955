package vhostuser_test

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// blocking echoes, after passing the gate for requests that start with '!'.
// Those that start with '?' are detached and pass the gate elsewhere.
type blocking struct{ *gate }

func (b blocking) Serve(r *vhostuser.Request) (int, bool) {
	buf := make([]byte, r.InLen())
	r.CopyIn(buf)
	switch buf[0] {
	case '!':
		b.pass()
	case '?':
		d := r.Detach()
		go func() {
			b.pass()
			d.Complete(d.CopyOut(buf))
		}()
		return 0, false
	}
	return r.CopyOut(buf), true
}

func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s did not end", what)
	}
}

// send submits s on a queue driven by hand and returns its chain.
func send(t *testing.T, q *frontend.Queue, s string) *frontend.Chain {
	t.Helper()
	c, err := q.NewChain([]int{len(s)}, []int{len(s)})
	if err != nil {
		t.Fatal(err)
	}
	c.Put([]byte(s))
	q.Submit(c)
	return c
}

// receive waits for a completion and checks its text.
func receive(t *testing.T, q *frontend.Queue, want string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		if c := q.Poll(); c != nil {
			if got := string(c.Reply()); got != want {
				t.Fatalf("reply %q, want %q", got, want)
			}
			return
		}
		q.Called(10)
	}
	t.Fatalf("no reply %q", want)
}

// TestControlNeverWaits: a request that blocks for ever delays neither control
// messages nor the other queues, and GET_VRING_BASE is answered although it
// cannot be finished.
func TestControlNeverWaits(t *testing.T) {
	g := newGate()
	s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
	t.Cleanup(g.release)
	defer g.release()
	q := s.Queue(1)
	send(t, q, "!stuck")
	<-g.entered
	within(t, "control", func() {
		r := s.Memory().Regions[0]
		if err := errors.Join(s.Negotiate(), s.RemoveRegion(r), s.AddRegion(r)); err != nil {
			t.Error(err)
		}
		if base, err := q.Stop(); base != 1 || err != nil {
			t.Errorf("base = %d, %v", base, err)
		}
	})
	s.mustEcho(t, 0)
}

// TestStopWaitsAMoment: a request that is nearly done is published before
// GET_VRING_BASE is answered, so that a reset finds no write under way.
func TestStopWaitsAMoment(t *testing.T) {
	stopped := make(chan struct{})
	h := handlerFunc(func(r *vhostuser.Request) (int, bool) {
		stopped <- struct{}{}
		<-stopped
		return r.CopyOut([]byte("x")), true
	})
	s := serve(t, h, vhostuser.Options{}, frontend.Options{})
	q := s.Queue(1)
	send(t, q, "x")
	<-stopped
	time.AfterFunc(5*time.Millisecond, func() { stopped <- struct{}{} })
	if base, err := q.Stop(); base != 1 || err != nil {
		t.Errorf("base = %d, %v", base, err)
	}
}

// TestPauseAndGoOn: a machine that is paused in the middle of requests gets
// their replies when it goes on.
func TestPauseAndGoOn(t *testing.T) {
	for _, text := range []string{"!inline", "?detached"} {
		t.Run(text, func(t *testing.T) {
			g := newGate()
			s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
			defer g.release()
			q := s.Queue(1)
			send(t, q, "before")
			receive(t, q, "before")
			send(t, q, text)
			<-g.entered
			base, err := q.Stop()
			if base != 2 || err != nil {
				t.Fatalf("base = %d, %v", base, err)
			}
			used := q.UsedIndex()
			g.release()
			s.mustEcho(t, 0)
			if q.UsedIndex() != used {
				t.Error("a stopped ring was written")
			}
			if err := q.Start(base); err != nil {
				t.Fatal(err)
			}
			receive(t, q, text)
			send(t, q, "after")
			receive(t, q, "after")
		})
	}
}

// TestResetForgets: after a reset of the device the replies of the requests
// that were in flight go nowhere.
func TestResetForgets(t *testing.T) {
	for _, text := range []string{"!inline", "?detached"} {
		t.Run(text, func(t *testing.T) {
			g := newGate()
			s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
			defer g.release()
			q := s.Queue(1)
			send(t, q, text)
			<-g.entered
			if _, err := q.Stop(); err != nil {
				t.Fatal(err)
			}
			q.Reset()
			if err := q.Start(0); err != nil {
				t.Fatal(err)
			}
			g.release()
			send(t, q, "after")
			receive(t, q, "after")
			if q.UsedIndex() != 1 {
				t.Errorf("%d completions on the new ring", q.UsedIndex())
			}
		})
	}
}

// TestDisable: a disabled ring takes no requests and finds them when it is
// enabled again.
func TestDisable(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	q := s.Queue(1)
	send(t, q, "one")
	receive(t, q, "one")
	if err := q.Enable(false); err != nil {
		t.Fatal(err)
	}
	send(t, q, "two")
	q.Kick()
	s.mustEcho(t, 0)
	if q.UsedIndex() != 1 {
		t.Error("a disabled ring was served")
	}
	if err := q.Enable(true); err != nil {
		t.Fatal(err)
	}
	receive(t, q, "two")
}

// TestRemoveRegionInFlight: memory that a request uses stays mapped until the
// request has ended, and the ring pauses while it is not in memory.
func TestRemoveRegionInFlight(t *testing.T) {
	for _, text := range []string{"!inline", "?detached"} {
		t.Run(text, func(t *testing.T) {
			g := newGate()
			s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
			defer g.release()
			q, r := s.Queue(1), s.Memory().Regions[0]
			c := send(t, q, text)
			<-g.entered
			if n := mappings(t); n != 2 {
				t.Errorf("guest memory is mapped %d times, want ours and the device's", n)
			}
			if err := s.RemoveRegion(r); err != nil {
				t.Fatal(err)
			}
			if n := mappings(t); n != 2 {
				t.Errorf("guest memory is mapped %d times while a request uses it", n)
			}
			g.release()
			for deadline := time.Now().Add(patience); mappings(t) != 1; runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatal("guest memory is still mapped")
				}
			}
			if string(c.Out[0]) != text {
				t.Errorf("reply in memory %q", c.Out[0])
			}
			if err := s.AddRegion(r); err != nil {
				t.Fatal(err)
			}
			receive(t, q, text)
			s.mustEcho(t, 0)
		})
	}
}

// mappings counts how often guest memory is mapped in this process.
func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "/memfd:guest-memory")
}

// TestRingAfterMemoryChange: the ring is looked for again after each change of
// the memory table, and not served where it no longer fits.
func TestRingAfterMemoryChange(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{Regions: 2})
	q := s.Queue(1)
	send(t, q, "one")
	receive(t, q, "one")
	last := s.Memory().Regions[1] // holds the rings
	if err := s.RemoveRegion(last); err != nil {
		t.Fatal(err)
	}
	half := last
	half.Size /= 2 // the rings are in the second half
	if err := s.AddRegion(half); err != nil {
		t.Fatal(err)
	}
	send(t, q, "two")
	q.Kick()
	if _, err := s.Call(1, nil); err != nil {
		t.Fatal(err)
	}
	if q.UsedIndex() != 1 {
		t.Error("a ring outside memory was served")
	}
	if err := errors.Join(s.RemoveRegion(half), s.AddRegion(last)); err != nil {
		t.Fatal(err)
	}
	receive(t, q, "two")
}

// TestBadRegions: regions that cannot be mapped or overlap are refused.
func TestBadRegions(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	r := s.Memory().Regions[0]
	tests := map[string]frontend.Region{
		"same again":     r,
		"overlap":        {GPA: r.GPA + 4096, Size: 4096, User: 1 << 50},
		"user overlap":   {GPA: 1 << 50, Size: 4096, User: r.User},
		"empty":          {GPA: 1 << 50, User: 1 << 50},
		"wraps":          {GPA: ^uint64(0) - 4095, Size: 8192, User: 1 << 50},
		"user wraps":     {GPA: 1 << 50, Size: 8192, User: ^uint64(0) - 4095},
		"offset wraps":   {GPA: 1 << 50, Size: 8192, User: 1 << 50, Offset: ^uint64(0) - 4095},
		"past the file":  {GPA: 1 << 50, Size: r.Size, User: 1 << 50, Offset: 4096},
		"huge":           {GPA: 1 << 50, Size: 1 << 60, User: 1 << 50},
		"huge at offset": {GPA: 1 << 50, Size: 1 << 63, User: 1 << 50, Offset: 1 << 62},
	}
	for name, bad := range tests {
		t.Run(name, func(t *testing.T) {
			var refused *frontend.Refused
			if err := s.AddRegion(bad); !errors.As(err, &refused) {
				t.Errorf("ADD_MEM_REG = %v", err)
			}
			if err := s.SetMemTable(r, bad); !errors.As(err, &refused) {
				t.Errorf("SET_MEM_TABLE = %v", err)
			}
			if name != "same again" {
				if err := s.RemoveRegion(bad); !errors.As(err, &refused) {
					t.Errorf("REM_MEM_REG = %v", err)
				}
			}
		})
	}
	s.mustEcho(t, 1)
}

// TestTruncatedMemory: a front end that takes guest memory away breaks its own
// queue and nothing else. With a seal against shrinking it cannot.
func TestTruncatedMemory(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{Unsealed: true})
	q := s.Queue(1)
	s.mustEcho(t, 0)
	// The rings are at the end of memory: from here on neither side has one.
	if err := s.Memory().Truncate(4096); err != nil {
		t.Fatal(err)
	}
	q.Kick()
	if !q.Broken(int(patience.Milliseconds())) {
		t.Error("the queue is not broken")
	}
	s2 := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	s2.mustEcho(t, 1)
}

// TestTruncatedUnderDetached: the same for a request on another goroutine.
func TestTruncatedUnderDetached(t *testing.T) {
	g := newGate()
	s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{Unsealed: true})
	q := s.Queue(1)
	send(t, q, "?x")
	<-g.entered
	if err := s.Memory().Truncate(4096); err != nil {
		t.Fatal(err)
	}
	g.release()
	if !q.Broken(int(patience.Milliseconds())) {
		t.Error("the queue is not broken")
	}
}

// TestEventfdFlags: the flags of received descriptors belong to the front end
// too; QEMU's power-off hung when they were changed. Nor is a kick ever read.
func TestEventfdFlags(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	q := s.Queue(1)
	before := q.EventFlags()
	send(t, q, "one")
	receive(t, q, "one")
	if after := q.EventFlags(); !slices.Equal(before, after) {
		t.Errorf("flags were %#x, are %#x", before, after)
	}
	if n := q.PendingKicks(); n != uint64(q.Kicks) || n == 0 {
		t.Errorf("%d kicks sent, %d still in the eventfd", q.Kicks, n)
	}
}

// TestKicksOnlyWhenAsleep: while the device is busy the driver need not kick.
func TestKicksOnlyWhenAsleep(t *testing.T) {
	g := newGate()
	s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
	defer g.release()
	q := s.Queue(1)
	send(t, q, "!first")
	<-g.entered
	kicks := q.Kicks
	for range 100 {
		send(t, q, "more")
	}
	if n := q.Kicks - kicks; n != 0 {
		t.Errorf("%d kicks for 100 requests while the device was busy", n)
	}
	g.release()
	receive(t, q, "!first")
	for range 100 {
		receive(t, q, "more")
	}
}

// TestCallsPerBatch: a batch of requests is signalled once, or once in 32.
func TestCallsPerBatch(t *testing.T) {
	g := newGate()
	s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{NoEventIdx: true})
	defer g.release()
	q := s.Queue(1)
	send(t, q, "!first")
	<-g.entered
	q.Called(0) // the one at the start
	for range 64 {
		send(t, q, "more")
	}
	g.release()
	for q.UsedIndex() < 65 {
		runtime.Gosched()
	}
	// Every published batch calls when the driver always wants calls.
	if n := q.PendingCalls(); n > 4 {
		t.Errorf("%d calls for 65 completions", n)
	}
}

// TestSteadyStateDoesNotAllocate: no garbage per request, so no collector.
func TestSteadyStateDoesNotAllocate(t *testing.T) {
	h := handlerFunc(func(r *vhostuser.Request) (int, bool) {
		var b [64]byte
		r.CopyIn(b[:])
		return r.CopyOut(b[:16]), true
	})
	s := serve(t, h, vhostuser.Options{}, frontend.Options{})
	q := s.Queue(1)
	for range 32 {
		c, err := q.NewChain([]int{40, 16}, []int{16, 104})
		if err != nil {
			t.Fatal(err)
		}
		q.Submit(c)
	}
	turn := func() {
		for range 1000 {
			c := q.Poll()
			for c == nil {
				q.Wait()
				c = q.Poll()
			}
			q.Submit(c)
		}
	}
	turn()
	if n := testing.AllocsPerRun(20, turn); n > 1 { // the test's own timers
		t.Errorf("%.0f allocations in 1000 requests", n)
	}
}

// TestIdle: a device with nothing to do does not wake up.
func TestIdle(t *testing.T) {
	started := make(chan int, 2)
	s := serve(t, &tid{started: started}, vhostuser.Options{}, frontend.Options{})
	s.mustEcho(t, 0)
	s.mustEcho(t, 1)
	a, b := <-started, <-started
	before := switches(t, a) + switches(t, b)
	time.Sleep(200 * time.Millisecond) // a span to observe, not to wait for something
	if n := switches(t, a) + switches(t, b) - before; n > 2 {
		t.Errorf("%d wake-ups of idle queues in 200 ms", n)
	}
}

// tid is an echo that says which threads its queues have.
type tid struct {
	echo
	started chan int
}

func (h *tid) NewState(int) any {
	h.started <- unix.Gettid()
	return nil
}

// switches returns the voluntary context switches of a thread.
func switches(t *testing.T, tid int) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/task/" + itoa(tid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "voluntary_ctxt_switches:"); ok {
			return atoi(t, strings.TrimSpace(v))
		}
	}
	t.Fatal("no voluntary_ctxt_switches")
	return 0
}
