package frontend

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Descriptor flags.
const (
	FlagNext     = 1
	FlagWrite    = 2
	FlagIndirect = 4
)

// Queue is one split virtqueue in guest memory. Its methods are for one
// goroutine at a time.
type Queue struct {
	Index int
	Size  uint16

	// The three tables in guest memory, for whoever wants to spoil them.
	Desc, Avail, Used          []byte
	DescGPA, AvailGPA, UsedGPA uint64

	Kicks int64 // kicks sent
	Calls int64 // times that Wait was woken

	c        *Client
	kick     int
	call     int
	err      int
	ep       int
	next     uint16 // index of the next available entry
	last     uint16 // used entries seen
	chains   []*Chain
	free     []uint16 // free descriptors
	fence    atomic.Uint32
	events   [2]unix.EpollEvent
	stopping int           // eventfd: the device is gone
	mu       sync.Mutex    // for Do
	reaper   chan struct{} // capacity 1: held by the one who reaps for all
	users    sync.WaitGroup
}

func newQueue(c *Client, index int) (*Queue, error) {
	q := &Queue{Index: index, Size: uint16(c.opts.QueueSize), c: c, kick: -1, call: -1, err: -1, ep: -1, stopping: -1, reaper: make(chan struct{}, 1)}
	if err := q.layOut(); err != nil {
		return nil, err
	}
	for _, fd := range []*int{&q.kick, &q.call, &q.err, &q.stopping} {
		var err error
		if *fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			q.close()
			return nil, os.NewSyscallError("eventfd", err)
		}
	}
	var err error
	if q.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		err = errors.Join(q.watch(q.call), q.watch(q.stopping))
	}
	if err != nil {
		q.close()
		return nil, os.NewSyscallError("epoll", err)
	}
	return q, nil
}

func (q *Queue) watch(fd int) error {
	return unix.EpollCtl(q.ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)})
}

// layOut places the three tables in one piece of guest memory.
func (q *Queue) layOut() error {
	n := int(q.Size)
	descLen, availLen, usedLen := 16*n, 6+2*n, 6+8*n
	usedOff := (descLen + availLen + 63) &^ 63
	gpa, b, err := q.c.mem.contiguous(usedOff + usedLen)
	if err != nil {
		return err
	}
	q.DescGPA, q.AvailGPA, q.UsedGPA = gpa, gpa+uint64(descLen), gpa+uint64(usedOff)
	q.Desc = b[:descLen]
	q.Avail = b[descLen : descLen+availLen]
	q.Used = b[usedOff : usedOff+usedLen]
	q.chains = make([]*Chain, n)
	q.Reset()
	return nil
}

// Reset forgets every request and clears the tables, as a driver does when it
// resets the device.
func (q *Queue) Reset() {
	clear(q.Desc)
	clear(q.Avail)
	clear(q.Used)
	clear(q.chains)
	q.next, q.last = 0, 0
	q.free = q.free[:0]
	for i := int(q.Size) - 1; i >= 0; i-- {
		q.free = append(q.free, uint16(i))
	}
}

// Start tells the device about the ring and starts it at this base.
func (q *Queue) Start(base uint16) error {
	i := uint32(q.Index)
	w := q.c.wire
	return errors.Join(
		w.send(msgSetVringNum, u32(i, uint32(q.Size))),
		w.send(msgSetVringBase, u32(i, uint32(base))),
		q.SetAddr(q.DescGPA, q.AvailGPA, q.UsedGPA),
		w.send(msgSetVringErr, u64(uint64(i)), q.err),
		w.send(msgSetVringKick, u64(uint64(i)), q.kick),
		w.send(msgSetVringCall, u64(uint64(i)), q.call),
		q.Enable(true))
}

// SetAddr sends SET_VRING_ADDR for tables at these guest physical addresses.
func (q *Queue) SetAddr(desc, avail, used uint64) error {
	const toUser = userBase - GuestBase
	return q.c.wire.send(msgSetVringAddr,
		append(u32(uint32(q.Index), 0), u64(desc+toUser, used+toUser, avail+toUser, 0)...))
}

// Enable sends SET_VRING_ENABLE.
func (q *Queue) Enable(on bool) error {
	if q.c.Features&FeatureProtocol == 0 {
		return nil
	}
	v := uint32(0)
	if on {
		v = 1
	}
	return q.c.wire.send(msgSetVringEnable, u32(uint32(q.Index), v))
}

// Stop sends GET_VRING_BASE and returns the device's next available index.
func (q *Queue) Stop() (base uint16, err error) {
	p, err := q.c.wire.call(msgGetVringBase, u32(uint32(q.Index), 0))
	if err != nil {
		return 0, err
	}
	if len(p) != 8 || binary.LittleEndian.Uint32(p) != uint32(q.Index) {
		return 0, errors.New("bad reply to GET_VRING_BASE")
	}
	return uint16(binary.LittleEndian.Uint32(p[4:])), nil
}

func (q *Queue) close() {
	q.users.Wait()
	for _, fd := range []*int{&q.kick, &q.call, &q.err, &q.stopping, &q.ep} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
		}
		*fd = -1
	}
}

// Submit makes c available and kicks the device if it asked for that.
func (q *Queue) Submit(c *Chain) { q.PushHead(c.head) }

// PushHead makes any head available and kicks the device if it asked for that.
func (q *Queue) PushHead(head uint16) {
	binary.LittleEndian.PutUint16(q.Avail[4+2*(q.next&(q.Size-1)):], head)
	old := q.next
	q.next++
	q.SetAvailable(q.next)
	if q.wantsKick(old) {
		q.Kick()
	}
}

// SetAvailable publishes an available index, whatever it is.
func (q *Queue) SetAvailable(idx uint16) {
	flags := binary.LittleEndian.Uint16(q.Avail)
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&q.Avail[0])), uint32(idx)<<16|uint32(flags))
	q.fence.Add(1)
}

func (q *Queue) wantsKick(old uint16) bool {
	if q.c.Features&FeatureEventIdx == 0 {
		return binary.LittleEndian.Uint16(q.Used)&1 == 0
	}
	event := binary.LittleEndian.Uint16(q.Used[4+8*int(q.Size):])
	return q.next-event-1 < q.next-old
}

// Kick signals the device whether it asked for it or not.
func (q *Queue) Kick() {
	q.Kicks++
	writeEvent(q.kick)
}

// UsedIndex returns the device's used index.
func (q *Queue) UsedIndex() uint16 {
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Pointer(&q.Used[0]))) >> 16)
}

// Next returns the next completion: the head the device returned and the
// length it wrote.
func (q *Queue) Next() (head uint32, n uint32, ok bool) {
	if q.last == q.UsedIndex() {
		return 0, 0, false
	}
	e := q.Used[4+8*int(q.last&(q.Size-1)):]
	q.last++
	return binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:]), true
}

// Poll returns the next completed chain, or nil.
func (q *Queue) Poll() *Chain {
	head, n, ok := q.Next()
	if !ok || head >= uint32(q.Size) || q.chains[head] == nil {
		return nil
	}
	c := q.chains[head]
	c.Written = n
	return c
}

// Wait asks to be called and sleeps until there is a completion. It returns
// false when the device is gone.
func (q *Queue) Wait() bool {
	for !q.arm() {
		if !q.sleep() {
			return false
		}
	}
	return true
}

// sleep waits for a call; false means that the device is gone.
func (q *Queue) sleep() bool {
	n, err := unix.EpollWait(q.ep, q.events[:], -1)
	if err != nil {
		return true // EINTR: a spurious wake-up
	}
	q.Calls++
	for _, e := range q.events[:n] {
		if int(e.Fd) == q.stopping {
			return false
		}
	}
	return true
}

// arm asks for a call at the next completion and reports whether there is one
// already.
func (q *Queue) arm() bool {
	binary.LittleEndian.PutUint16(q.Avail[4+2*int(q.Size):], q.last)
	q.fence.Add(1)
	return q.UsedIndex() != q.last
}

// Broken reports whether the device has signalled the err descriptor, waiting
// for that up to ms milliseconds (-1: without bound).
func (q *Queue) Broken(ms int) bool { return readable(q.err, ms) }

// Called reports whether the device has signalled the call descriptor.
func (q *Queue) Called(ms int) bool { return readable(q.call, ms) }

func readable(fd, ms int) bool {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, ms)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return false
		}
		var b [8]byte
		_, err = unix.Read(fd, b[:])
		return err == nil
	}
}

func writeEvent(fd int) {
	one := [8]byte{1}
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), 8)
}

// EventFlags returns the file status flags of the kick, call and err
// descriptors, which the device shares.
func (q *Queue) EventFlags() []int {
	var flags []int
	for _, fd := range []int{q.kick, q.call, q.err} {
		fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil {
			fl = -1
		}
		flags = append(flags, fl)
	}
	return flags
}

// PendingKicks reads the kick descriptor as QEMU does when it stops a device:
// the kicks since the last time.
func (q *Queue) PendingKicks() uint64 { return readEvent(q.kick) }

// PendingCalls reads the call descriptor.
func (q *Queue) PendingCalls() uint64 { return readEvent(q.call) }

func readEvent(fd int) uint64 {
	var b [8]byte
	if n, err := unix.Read(fd, b[:]); err != nil || n != len(b) {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}
