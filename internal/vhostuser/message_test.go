package vhostuser

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var c [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conn, err := FileConn(f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		c[i] = conn
	}
	return c[0], c[1]
}

// TestReadMessageInPieces: a stream may deliver one byte at a time, and the
// descriptors with any of them.
func TestReadMessageInPieces(t *testing.T) {
	a, b := testPair(t)
	defer a.Close()
	defer b.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	raw := binary.LittleEndian.AppendUint32(nil, msgSetVringKick)
	raw = binary.LittleEndian.AppendUint32(raw, version)
	raw = binary.LittleEndian.AppendUint32(raw, 8)
	raw = binary.LittleEndian.AppendUint64(raw, 1)
	go func() {
		for i := range raw {
			var oob []byte
			if i == 14 {
				oob = unix.UnixRights(int(null.Fd()))
			}
			if _, _, err := a.WriteMsgUnix(raw[i:i+1], oob, nil); err != nil {
				t.Error(err)
			}
		}
	}()
	l := link{conn: b}
	m, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if m.request != msgSetVringKick || len(m.fds) != 1 || len(m.payload) != 8 {
		t.Errorf("message %+v", m)
	}
	if fl, err := unix.FcntlInt(uintptr(m.fds[0]), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
		t.Errorf("received descriptor is not close-on-exec: %#x, %v", fl, err)
	}
	_ = a.Close()
	if _, err := l.read(); err != io.EOF {
		t.Errorf("after the end: %v", err)
	}
}

// FuzzMessages: the front end owns these bytes. The device may end the
// connection; it may not panic, hang or leak descriptors.
func FuzzMessages(f *testing.F) {
	for _, request := range []uint32{1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 25, 34, 36, 37, 38, 99} {
		for _, n := range []uint32{0, 8, 40} {
			b := binary.LittleEndian.AppendUint32(nil, request)
			b = binary.LittleEndian.AppendUint32(b, version)
			b = binary.LittleEndian.AppendUint32(b, n)
			b = append(b, make([]byte, n)...)
			f.Add(b, uint8(n%3))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, fds uint8) {
		a, c := testPair(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = Serve(context.Background(), c, nothing{}, Options{Queues: 1, Config: make([]byte, 44)})
		}()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		feed(t, a, b, int(fds%4))
		_ = a.CloseWrite()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("the device did not end")
		}
		_ = a.Close()
	})
}

// feed sends b with n descriptors of a small memfd.
func feed(t *testing.T, a *net.UnixConn, b []byte, n int) {
	fd, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_ = unix.Ftruncate(fd, 1<<16)
	var oob []byte
	for range n {
		oob = append(oob, unix.UnixRights(fd)...)
	}
	if n > 0 && len(b) > 0 {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = fd
		}
		oob = unix.UnixRights(fds...)
	}
	_ = a.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_, _, _ = a.WriteMsgUnix(b, oob, nil)
}

type nothing struct{}

func (nothing) Serve(*Request) (int, bool) { return 0, true }

func TestLimiter(t *testing.T) {
	var got []string
	l := limiter{to: func(format string, _ ...any) { got = append(got, format) }}
	for range 1000 {
		l.printf("note")
	}
	if len(got) != 1 {
		t.Errorf("%d notes passed", len(got))
	}
	l.last = l.last.Add(-time.Hour)
	l.printf("note")
	if len(got) != 3 || got[1] != "%d notes dropped" {
		t.Errorf("notes %q", got)
	}
}
