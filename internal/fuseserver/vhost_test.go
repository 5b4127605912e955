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
		guest, ended := throughVirtqueues(t, s.srv)
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
		ended()
	})
}

// throughVirtqueues serves a guest with two request queues through shared
// memory. ended takes it away again.
func throughVirtqueues(t *testing.T, srv *Server) (guest *frontend.Client, ended func()) {
	t.Helper()
	device, vmm := socketPair(t)
	var served sync.WaitGroup
	served.Go(func() {
		if err := vhostuser.Serve(context.Background(), device, srv, vhostuser.Options{Queues: 3}); err != nil {
			t.Errorf("device: %v", err)
		}
	})
	guest, err := frontend.Connect(vmm, frontend.Options{Queues: 3})
	if err != nil {
		t.Fatal(err)
	}
	return guest, func() {
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
		served.Wait()
	}
}

// TestForgetWithoutRoomForReply: guests put FORGET and BATCH_FORGET into
// chains without any writable descriptor. They are served like that: no length
// is used, and the nodes and their descriptors are gone.
func TestForgetWithoutRoomForReply(t *testing.T) {
	const names = 64
	s := newShare(t, nil)
	fill(t, s.dir, names)
	guest, ended := throughVirtqueues(t, s.srv)
	defer ended()
	for _, queue := range []int{0, 1} { // Linux uses queue 0 for them
		m := &queueClient{t, guest, 1, uint64(queue) << 32}
		var nodes []uint64
		for i := range names {
			var e w.EntryOut
			w.Decode(m.call(w.OpLookup, rootID, w.EntryOutSize, z(entryName(i))), &e)
			nodes = append(nodes, e.NodeID)
		}
		if n := s.srv.session.Load().nodes.size(); n != 1+names {
			t.Fatalf("%d nodes after %d lookups", n, names)
		}
		m.queue = queue
		for _, node := range nodes[:names/2] {
			m.silent(w.OpForget, node, pack(w.ForgetIn{Nlookup: 1}, w.Append))
		}
		if n := s.srv.session.Load().nodes.size(); n != 1+names/2 {
			t.Errorf("queue %d: %d nodes after FORGET, want %d", queue, n, 1+names/2)
		}
		batch := pack(w.BatchForgetIn{Count: names / 2}, w.Append)
		for _, node := range nodes[names/2:] {
			batch = w.Append(batch, &w.ForgetOne{NodeID: node, Nlookup: 1})
		}
		m.silent(w.OpBatchForget, 0, batch)
		if n := s.srv.session.Load().nodes.size(); n != 1 {
			t.Errorf("queue %d: %d nodes after BATCH_FORGET, want the root", queue, n)
		}
		if n := s.srv.fds.Load(); n != 1 {
			t.Errorf("queue %d: %d descriptors held, want the root's", queue, n)
		}
	}
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

// silent sends a request that gets no reply, in a chain without room for one.
func (m *queueClient) silent(op w.Opcode, node uint64, args []byte) {
	m.unique++
	h := w.InHeader{Opcode: op, Unique: m.unique, NodeID: node, Len: uint32(headerSize + len(args))}
	reply, err := m.guest.Do(m.queue, [][]byte{w.Append(nil, &h), args}, nil)
	if err != nil || len(reply) != 0 {
		m.t.Errorf("queue %d, opcode %d: reply of %d bytes, %v", m.queue, op, len(reply), err)
	}
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
