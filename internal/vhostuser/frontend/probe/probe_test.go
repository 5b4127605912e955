package probe_test

import (
	"context"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/fuseclient"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/probe"
)

// TestProbesOnFileSystem plays every probe against the file system device, one
// server for all of them.
func TestProbesOnFileSystem(t *testing.T) {
	h := newServer(t, t.TempDir())
	target := &probe.Target{
		Dial: func(o frontend.Options) (*frontend.Client, error) { return dial(t, h, o) },
		Alive: func(c *frontend.Client, queue int) error {
			m, err := fuseclient.MountOn(c, queue)
			if err != nil {
				return err
			}
			_, err = m.Getattr(fusewire.RootID)
			return err
		},
		Request:  initRequest(),
		ReplyLen: fusewire.OutHeaderSize + fusewire.InitOutSize,
	}
	for _, p := range probe.All() {
		t.Run(p.Name, func(t *testing.T) {
			if err := p.Run(target); err != nil {
				t.Error(err)
			}
		})
	}
}

// initRequest is INIT, which a server answers at any time.
func initRequest() []byte {
	in := fusewire.InitIn{Major: fusewire.Major, Minor: fusewire.Minor}
	h := fusewire.InHeader{Len: fusewire.InHeaderSize + 64, Opcode: fusewire.OpInit, Unique: 2}
	return fusewire.Append(fusewire.Append(nil, &h), &in)
}

func newServer(t *testing.T, dir string) *fuseserver.Server {
	t.Helper()
	open := func(path string) int {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}
	h, err := fuseserver.New(fuseserver.Config{Root: open(dir), ProcSelfFd: open("/proc/self/fd"), StatVirt: "off", Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func dial(t *testing.T, h vhostuser.Handler, o frontend.Options) (*frontend.Client, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "vhost-user socket")
		if conns[i], err = vhostuser.FileConn(f); err != nil {
			return nil, err
		}
		_ = f.Close()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = vhostuser.Serve(context.Background(), conns[1], h, vhostuser.Options{Logf: func(string, ...any) {}})
	}()
	t.Cleanup(func() { <-done })
	return frontend.Connect(conns[0], o)
}
