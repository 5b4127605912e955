package vhostuser_test

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// patience is how long a test waits for something that happens at once unless
// it never happens.
const patience = 20 * time.Second

// echo answers every request with its own bytes, as many as fit.
type echo struct{}

func (echo) Serve(r *vhostuser.Request) (int, bool) {
	buf := make([]byte, r.InLen())
	n := r.CopyIn(buf)
	return r.CopyOut(buf[:n]), true
}

// handlerFunc is a handler made of one function.
type handlerFunc func(r *vhostuser.Request) (int, bool)

func (f handlerFunc) Serve(r *vhostuser.Request) (int, bool) { return f(r) }

// served is a device that runs in this process and its front end.
type served struct {
	*frontend.Client
	cancel context.CancelFunc
	result chan error
}

// serve starts a device on a socket pair and connects a front end to it. Both
// are gone when the test ends, with every descriptor they had.
func serve(t testing.TB, h vhostuser.Handler, do vhostuser.Options, fo frontend.Options) *served {
	t.Helper()
	before := openFDs(t)
	ours, theirs := socketPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	s := &served{cancel: cancel, result: make(chan error, 1)}
	if do.Logf == nil {
		do.Logf = t.Logf
	}
	go func() { s.result <- vhostuser.Serve(ctx, theirs, h, do) }()
	c, err := frontend.Connect(ours, fo)
	if err != nil {
		cancel()
		t.Fatalf("connect: %v", err)
	}
	s.Client = c
	t.Cleanup(func() {
		_ = c.Close()
		s.wait(t)
		cancel()
		if after := openFDs(t); after > before {
			t.Errorf("%d descriptors open before, %d after", before, after)
		}
	})
	return s
}

// wait returns what Serve returned.
func (s *served) wait(t testing.TB) error {
	t.Helper()
	select {
	case err := <-s.result:
		s.result <- err
		return err
	case <-time.After(patience):
		t.Fatal("the device did not end")
		return nil
	}
}

func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "vhost-user socket")
		c, err := vhostuser.FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		conns[i] = c
	}
	return conns[0], conns[1]
}

// openFDs counts the open descriptors, those of the runtime's poller included:
// it is started here if nothing else has.
func openFDs(t testing.TB) int {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = r.Close(), w.Close()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// mustEcho sends one request through queue i and checks the answer.
func (s *served) mustEcho(t testing.TB, i int) {
	t.Helper()
	want := "still alive"
	got, err := s.do(i, want)
	if err != nil || got != want {
		t.Fatalf("queue %d: echo = %q, %v", i, got, err)
	}
}

// do is Client.Do for strings, with a bound on how long it waits.
func (s *served) do(i int, in string) (string, error) {
	type result struct {
		b   []byte
		err error
	}
	ch := make(chan result, 1)
	go func() {
		b, err := s.Do(i, [][]byte{[]byte(in)}, []int{len(in)})
		ch <- result{b, err}
	}()
	select {
	case r := <-ch:
		return string(r.b), r.err
	case <-time.After(patience):
		return "", errors.New("no answer")
	}
}

// gate blocks requests until it is opened, and says when one has come.
type gate struct {
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 64), open: make(chan struct{})}
}

func (g *gate) pass() {
	g.entered <- struct{}{}
	<-g.open
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func itoa(n int) string { return strconv.Itoa(n) }

func atoi(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
