package fuseserver

import (
	"bytes"
	"context"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/fuseclient"
)

func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := [2]*net.UnixConn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// TestThroughVirtqueues drives the server as QEMU does: shared memory, rings,
// two request queues, requests that end in workers, and a second mount.
func TestThroughVirtqueues(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		device, vmm := socketPair(t)
		var served sync.WaitGroup
		served.Go(func() {
			if err := vhostuser.Serve(context.Background(), device, s.srv, vhostuser.Options{Queues: 3}); err != nil {
				t.Errorf("device: %v", err)
			}
		})
		guest, err := frontend.Connect(vmm, frontend.Options{Queues: 3})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			m, err := fuseclient.Mount(guest)
			if err != nil {
				t.Fatal(err)
			}
			var queues sync.WaitGroup
			for q := 1; q <= 2; q++ {
				queues.Go(func() { useMount(t, guest, q, m.Init.MaxWrite) })
			}
			queues.Wait()
			if _, err := m.Call(w.OpDestroy, 0, 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
		served.Wait()
	})
}

// useMount writes, syncs, reads back cold, lists and removes a file through
// one request queue.
func useMount(t *testing.T, guest *frontend.Client, queue int, size uint32) {
	m := &queueClient{t, guest, queue, uint64(queue) << 32}
	name := z([]string{"", "one", "two"}[queue])
	data := []byte(pattern(int(size)))
	b := m.call(w.OpCreate, rootID, w.EntryOutSize+w.OpenOutSize, pack(w.CreateIn{Flags: unix.O_RDWR, Mode: unix.S_IFREG | 0o600}, w.Append), name)
	var e w.EntryOut
	var o w.OpenOut
	rest, _ := w.Decode(b, &e)
	w.Decode(rest, &o)
	m.call(w.OpWrite, e.NodeID, 8, pack(w.WriteIn{Fh: o.Fh, Size: size}, w.Append), data)
	m.call(w.OpFsync, e.NodeID, 0, pack(w.FsyncIn{Fh: o.Fh}, w.Append))
	m.call(w.OpSetxattr, e.NodeID, 0, pack(w.SetxattrIn{Size: 1}, w.Append), z("user.x"), []byte("v"))
	if got := m.call(w.OpRead, e.NodeID, int(size), pack(w.ReadIn{Fh: o.Fh, Size: size}, w.Append)); !bytes.Equal(got, data) {
		t.Errorf("queue %d: %d other bytes came back", queue, len(got))
	}
	m.call(w.OpRelease, e.NodeID, 0, pack(w.ReleaseIn{Fh: o.Fh}, w.Append))
	m.call(w.OpUnlink, rootID, 0, name)
	fh := m.call(w.OpOpendir, rootID, w.OpenOutSize, pack(w.OpenIn{}, w.Append))
	w.Decode(fh, &o)
	m.call(w.OpReaddirplus, rootID, 8192, pack(w.ReadIn{Fh: o.Fh, Size: 8192}, w.Append))
	m.call(w.OpReleasedir, rootID, 0, pack(w.ReleaseIn{Fh: o.Fh}, w.Append))
}

// queueClient sends requests through one queue.
type queueClient struct {
	t      *testing.T
	guest  *frontend.Client
	queue  int
	unique uint64
}

func (m *queueClient) call(op w.Opcode, node uint64, room int, parts ...[]byte) []byte {
	m.unique++
	h := w.InHeader{Opcode: op, Unique: m.unique, NodeID: node, Len: uint32(headerSize + length(parts))}
	out := []int{replySize}
	if room > 0 {
		out = append(out, room)
	}
	reply, err := m.guest.Do(m.queue, append([][]byte{w.Append(nil, &h)}, parts...), out)
	if err != nil {
		m.t.Errorf("queue %d, opcode %d: %v", m.queue, op, err)
		return nil
	}
	var oh w.OutHeader
	body, ok := w.Decode(reply, &oh)
	if !ok || int(oh.Len) != len(reply) || oh.Unique != m.unique || oh.Error != 0 {
		m.t.Errorf("queue %d, opcode %d: %d bytes, header %+v", m.queue, op, len(reply), oh)
		return nil
	}
	return body
}
