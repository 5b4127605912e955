package vhostuser_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// sometimes echoes, one request in four from another goroutine.
type sometimes struct{}

func (sometimes) Serve(r *vhostuser.Request) (int, bool) {
	buf := make([]byte, r.InLen())
	r.CopyIn(buf)
	if len(buf) == 0 || buf[0]&3 != 0 {
		return r.CopyOut(buf), true
	}
	d := r.Detach()
	go func() { d.Complete(d.CopyOut(buf)) }()
	return 0, false
}

// TestChangesUnderLoad pauses rings, takes memory away and gives it back, and
// disables rings while requests are in flight. No request may be lost or
// answered twice.
func TestChangesUnderLoad(t *testing.T) {
	for _, o := range []frontend.Options{{}, {NoEventIdx: true}, {QueueSize: 32, Regions: 3, MemMiB: 16}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			s := serve(t, sometimes{}, vhostuser.Options{}, o)
			stop := make(chan struct{})
			var load, control sync.WaitGroup
			control.Go(func() { disturb(t, s, stop) })
			for g := range 8 {
				load.Go(func() { echoMany(t, s, 1, g, 400) })
			}
			load.Wait()
			close(stop)
			control.Wait()
			s.mustEcho(t, 0)
			s.mustEcho(t, 1)
		})
	}
}

func echoMany(t *testing.T, s *served, queue, g, n int) {
	for i := range n {
		want := fmt.Sprintf("%c%d/%d", rune('a'+rand.IntN(26)), g, i)
		if got, err := s.Do(queue, [][]byte{[]byte(want)}, []int{64}); err != nil || string(got) != want {
			t.Errorf("echo of %q = %q, %v", want, got, err)
			return
		}
	}
}

// disturb changes the device in random ways that a VMM has.
func disturb(t *testing.T, s *served, stop chan struct{}) {
	q := s.Queue(1)
	for {
		select {
		case <-stop:
			return
		default:
		}
		var err error
		switch rand.IntN(4) {
		case 0:
			err = errors.Join(q.Enable(false), q.Enable(true))
		case 1:
			r := s.Memory().Regions
			err = errors.Join(s.RemoveRegion(r[len(r)-1]), s.AddRegion(r[len(r)-1]))
		case 2:
			err = s.SetMemTable(s.Memory().Regions...)
		case 3:
			var base uint16
			if base, err = q.Stop(); err == nil {
				err = q.Start(base)
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// TestConfigSpace: offered only by option, padded with zeros.
func TestConfigSpace(t *testing.T) {
	config := append([]byte("data"), make([]byte, 36)...)
	config[36] = 1
	s := serve(t, echo{}, vhostuser.Options{Config: config}, frontend.Options{})
	if s.Protocol&frontend.ProtocolConfig == 0 {
		t.Error("CONFIG is not offered")
	}
	for _, r := range [][2]uint32{{0, 40}, {36, 4}, {0, 60}, {100, 4}} {
		got, err := s.Config(r[0], r[1])
		want := append(config[:len(config):len(config)], make([]byte, 256)...)[r[0] : r[0]+r[1]]
		if err != nil || string(got) != string(want) {
			t.Errorf("config %v = %q, %v", r, got, err)
		}
	}
	var refused *frontend.Refused
	if err := s.Send(25, make([]byte, 12)); !errors.As(err, &refused) {
		t.Errorf("SET_CONFIG = %v", err)
	}
	without := serve(t, echo{}, vhostuser.Options{}, frontend.Options{})
	if without.Protocol&frontend.ProtocolConfig != 0 {
		t.Error("CONFIG is offered without being asked for")
	}
}

// FuzzGuest: the guest owns its rings and everything in memory. Whatever it
// writes there, the process lives, the other queue serves, and a reset brings
// the queue back.
func FuzzGuest(f *testing.F) {
	f.Add([]byte{0}, []byte{}, uint16(1))
	loop := make([]byte, 16)
	binary.LittleEndian.PutUint64(loop, frontend.GuestBase)
	loop[8], loop[12] = 1, frontend.FlagNext
	f.Add(loop, []byte{0, 0, 0, 0}, uint16(1))
	loop[12] = frontend.FlagIndirect
	f.Add(loop, []byte{0, 0, 0, 0, 1, 0}, uint16(2))
	f.Add(loop, []byte{0, 0, 0, 0, 1, 0}, uint16(5000))
	s := serve(f, sometimes{}, vhostuser.Options{Logf: func(string, ...any) {}}, frontend.Options{QueueSize: 8, MemMiB: 1})
	f.Fuzz(func(t *testing.T, desc, avail []byte, idx uint16) {
		q := s.Queue(1)
		copy(q.Desc, desc)
		if len(avail) > 4 {
			copy(q.Avail[4:], avail[4:])
		}
		q.SetAvailable(idx)
		q.Kick()
		s.mustEcho(t, 0)
		if _, err := q.Stop(); err != nil {
			t.Fatal(err)
		}
		q.Reset()
		if err := q.Start(0); err != nil {
			t.Fatal(err)
		}
		s.mustEcho(t, 1)
	})
}
