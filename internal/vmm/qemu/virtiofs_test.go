package qemu_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// serveDir serves a directory over virtiofs in this process and returns QEMU's
// end of the connection.
func serveDir(t *testing.T, dir string, readonly bool) *os.File {
	t.Helper()
	open := func(path string) int {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	root, procFD := open(dir), open("/proc/self/fd")
	srv, err := fuseserver.New(fuseserver.Config{Root: root, ProcSelfFd: procFD, Readonly: readonly, StatVirt: "off", HostPerms: "private", Cache: "auto"})
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(root)
	unix.Close(procFD)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "backend")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := vhostuser.Serve(ctx, conn.(*net.UnixConn), srv, vhostuser.Options{Logf: t.Logf}); err != nil && ctx.Err() == nil {
			t.Errorf("vhost-user: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); done.Wait(); srv.Close() })
	return os.NewFile(uintptr(fds[1]), "vhost-user of QEMU")
}

// TestVirtiofsMounts: a directory of the host, read-write and read-only, in one
// guest; a stop with both mounted is clean.
func TestVirtiofsMounts(t *testing.T) {
	rw, ro := t.TempDir(), t.TempDir()
	for _, d := range []string{rw, ro} {
		if err := os.WriteFile(filepath.Join(d, "seed"), []byte("from the host"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	shares := []vmm.Share{{Tag: "rw", Conn: serveDir(t, rw, false)}, {Tag: "ro", Conn: serveDir(t, ro, true)}}
	g := boot(t, func(c *vmm.Config) { c.Shares = shares })
	for _, s := range shares {
		s.Conn.Close()
	}
	g.ready(agentproto.Boot{Mounts: []agentproto.Mount{
		{Kind: "virtiofs", Guest: "/rw", Source: "rw", Nosuid: true, Nodev: true},
		{Kind: "virtiofs", Guest: "/ro", Source: "ro", Readonly: true},
	}})
	for _, p := range []string{"/rw/seed", "/ro/seed"} {
		if got := g.readFile(p); got != "from the host" {
			t.Errorf("%s: %q", p, got)
		}
	}
	if r := g.write("/rw/result", "from the guest"); !r.OK {
		t.Errorf("write: %s", *r.Error)
	}
	if r := g.write("/ro/result", "x"); r.OK || *r.Errno != int32(unix.EROFS) {
		t.Errorf("write to the read-only share: %+v", r)
	}
	mounts := g.readFile("/proc/mounts")
	for _, want := range []string{"rw /rw virtiofs rw,nosuid,nodev,relatime", "ro /ro virtiofs ro,relatime"} {
		if !strings.Contains(mounts, want) {
			t.Errorf("no %q in\n%s", want, mounts)
		}
	}
	if e := g.stop(); e.Reason != "guest-shutdown" {
		t.Errorf("exit %+v", e)
	}
	if b, err := os.ReadFile(filepath.Join(rw, "result")); err != nil || string(b) != "from the guest" {
		t.Errorf("result on the host: %q, %v", b, err)
	}
}

// TestBootFailsOnAMissingShare: the tag is named.
func TestBootFailsOnAMissingShare(t *testing.T) {
	g := boot(t, nil)
	g.send(0, 0, agentproto.MsgBoot, agentproto.Boot{Mounts: []agentproto.Mount{{Kind: "virtiofs", Guest: "/data", Source: "nosuch"}}})
	var f agentproto.BootFailed
	g.expect(0, agentproto.MsgBootFailed, &f)
	if f.Step != "mount /data" || !strings.Contains(f.Message, "nosuch") {
		t.Errorf("%+v", f)
	}
	<-g.m.Done()
}
