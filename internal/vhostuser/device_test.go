package vhostuser_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// TestEcho passes payloads of all shapes through every combination of ring and
// memory features.
func TestEcho(t *testing.T) {
	tests := map[string]frontend.Options{
		"all features":     {},
		"no event index":   {NoEventIdx: true},
		"no indirect":      {NoIndirect: true},
		"neither":          {NoEventIdx: true, NoIndirect: true},
		"SET_MEM_TABLE":    {MemTable: true},
		"five regions":     {Regions: 5, MemMiB: 20},
		"table of regions": {Regions: 5, MemMiB: 20, MemTable: true},
		"ring of 16":       {QueueSize: 16},
		"four queues":      {Queues: 4},
	}
	for name, o := range tests {
		t.Run(name, func(t *testing.T) {
			s := serve(t, echo{}, vhostuser.Options{Queues: max(o.Queues, 2)}, o)
			for i := range max(o.Queues, 2) {
				for _, n := range []int{1, 16, 40, 4096, 4097, 3*4096 + 5} {
					echoBytes(t, s, i, n)
				}
			}
		})
	}
}

func echoBytes(t *testing.T, s *served, queue, n int) {
	t.Helper()
	want := make([]byte, n)
	for i := range want {
		want[i] = byte(rand.Uint32())
	}
	got, err := s.Do(queue, [][]byte{want[:n/2], want[n/2:]}, []int{n - n/3, n / 3})
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("queue %d: %d bytes came back as %d, %v", queue, n, len(got), err)
	}
}

// TestEchoLarge passes the largest request that Linux sends.
func TestEchoLarge(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	echoBytes(t, s, 1, 1<<20)
	echoBytes(t, s, 1, 1<<20)
}

// TestConcurrent keeps both queues busy from many goroutines.
func TestConcurrent(t *testing.T) {
	for _, o := range []frontend.Options{{}, {NoEventIdx: true}, {QueueSize: 64}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			s := serve(t, echo{}, vhostuser.Options{}, o)
			var wg sync.WaitGroup
			for g := range 16 {
				wg.Go(func() {
					for i := range 500 {
						want := fmt.Sprintf("%d/%d", g, i)
						if got, err := s.Do(g%2, [][]byte{[]byte(want)}, []int{64}); err != nil || string(got) != want {
							t.Errorf("echo of %q = %q, %v", want, got, err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestDetached completes requests from other goroutines, in any order, while
// the queue's thread completes others.
func TestDetached(t *testing.T) {
	h := handlerFunc(func(r *vhostuser.Request) (int, bool) {
		buf := make([]byte, r.InLen())
		r.CopyIn(buf)
		if buf[0]%2 == 0 {
			return r.CopyOut(buf), true
		}
		d := r.Detach()
		go func() { d.Complete(d.CopyOut(buf)) }()
		return 0, false
	})
	s := serve(t, h, vhostuser.Options{}, frontend.Options{})
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := range 200 {
				want := []byte{byte(i), byte(g), byte(i >> 8)}
				if got, err := s.Do(1, [][]byte{want}, []int{3}); err != nil || !bytes.Equal(got, want) {
					t.Errorf("echo of %v = %v, %v", want, got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestDetachedTwice: completing a request twice is a bug of the handler.
func TestDetachedTwice(t *testing.T) {
	r := vhostuser.NewRequest(1, nil, [][]byte{make([]byte, 4)}, nil, nil)
	d := r.Detach()
	d.Complete(0)
	defer func() {
		if recover() == nil {
			t.Error("a second Complete went unnoticed")
		}
	}()
	d.Complete(0)
}

// TestNewRequest drives a handler without a ring.
func TestNewRequest(t *testing.T) {
	var n int
	out := [][]byte{make([]byte, 2), make([]byte, 3)}
	r := vhostuser.NewRequest(1, [][]byte{[]byte("he"), []byte("llo")}, out, "state", func(k int) { n = k })
	if k, done := (echo{}).Serve(r); k != 5 || !done || string(out[0])+string(out[1]) != "hello" {
		t.Errorf("Serve = %d, %v, %q", k, done, out)
	}
	r.Detach().Complete(7)
	if n != 7 || r.State != "state" || r.OutLen() != 5 {
		t.Errorf("completed with %d, state %v", n, r.State)
	}
}

// stateful counts requests per queue in its state.
type stateful struct{}

func (stateful) NewState(queue int) any { return &queue }

func (s stateful) Serve(r *vhostuser.Request) (int, bool) {
	return r.CopyOut([]byte{byte(*r.State.(*int)), byte(r.Queue)}), true
}

func TestNewState(t *testing.T) {
	s := serve(t, stateful{}, vhostuser.Options{Queues: 3}, frontend.Options{Queues: 3})
	for i := range 3 {
		got, err := s.Do(i, [][]byte{{1}}, []int{2})
		if want := []byte{byte(i), byte(i)}; err != nil || !bytes.Equal(got, want) {
			t.Errorf("queue %d: state and number %v, %v", i, got, err)
		}
	}
}

// TestListener serves a connection accepted from a socket in the file system.
func TestListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fs.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	result := make(chan error, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err == nil {
			err = vhostuser.Serve(context.Background(), conn, echo{}, vhostuser.Options{})
		}
		result <- err
	}()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	c, err := frontend.Connect(conn, frontend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Do(1, [][]byte{[]byte("hi")}, []int{2})
	if err != nil || string(got) != "hi" {
		t.Errorf("echo = %q, %v", got, err)
	}
	if err := errors.Join(c.Close(), <-result); err != nil {
		t.Error(err)
	}
}

// TestContext ends a device from its own side.
func TestContext(t *testing.T) {
	s := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	s.mustEcho(t, 1)
	s.cancel()
	if err := s.wait(t); !errors.Is(err, context.Canceled) {
		t.Errorf("Serve = %v", err)
	}
	select {
	case <-s.Done():
	case <-time.After(patience):
		t.Error("the connection is still open")
	}
}

// TestDisconnected: who waits for a reply learns that the device has gone.
func TestDisconnected(t *testing.T) {
	g := newGate()
	s := serve(t, blocking{g}, vhostuser.Options{}, frontend.Options{})
	defer g.release()
	result := make(chan error, 2)
	for i := range 2 {
		go func() {
			_, err := s.do(i, "!never")
			result <- err
		}()
		<-g.entered
	}
	s.cancel()
	for range 2 {
		if err := <-result; !errors.Is(err, frontend.ErrDisconnected) {
			t.Errorf("Do = %v", err)
		}
	}
}

func TestOptions(t *testing.T) {
	tests := map[string]vhostuser.Options{
		"too many queues":    {Queues: 65},
		"negative queues":    {Queues: -1},
		"odd ring size":      {QueueSize: 100},
		"ring too large":     {QueueSize: 2048},
		"configuration size": {Config: make([]byte, 257)},
	}
	for name, o := range tests {
		t.Run(name, func(t *testing.T) {
			a, b := socketPair(t)
			defer a.Close()
			if err := vhostuser.Serve(context.Background(), b, echo{}, o); err == nil {
				t.Error("accepted")
			}
		})
	}
}
