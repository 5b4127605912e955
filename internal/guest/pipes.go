package guest

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// pipeEnds collects the descriptors of a program being started.
type pipeEnds struct {
	child  []int
	parent []*os.File
}

// newPipe returns a pipe whose agent end is non-blocking. Each end has an open
// file description of its own: the program's end stays blocking.
func (p *pipeEnds) newPipe(agentEnd int) (child int, parent *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, nil, err
	}
	child = fds[1-agentEnd]
	p.child = append(p.child, child)
	if err := unix.SetNonblock(fds[agentEnd], true); err != nil {
		unix.Close(fds[agentEnd])
		return -1, nil, err
	}
	parent = os.NewFile(uintptr(fds[agentEnd]), "pipe")
	p.parent = append(p.parent, parent)
	return child, parent, nil
}

func (p *pipeEnds) output() (int, *outPipe, error) {
	child, parent, err := p.newPipe(0)
	if err != nil {
		return -1, nil, err
	}
	return child, &outPipe{f: parent, ended: make(chan struct{})}, nil
}

func (p *pipeEnds) closeChild() {
	for _, fd := range p.child {
		unix.Close(fd)
	}
}

// fail closes the agent's ends and returns err.
func (p *pipeEnds) fail(err error) error {
	for _, f := range p.parent {
		f.Close()
	}
	return err
}

// outPipe is an output of a program.
type outPipe struct {
	f     *os.File
	ended chan struct{} // closed when the program has ended
}

// programEnded wakes a pump that waits for output.
func (o *outPipe) programEnded() {
	close(o.ended)
	_ = o.f.SetReadDeadline(time.Unix(1, 0))
}

// pump passes output on until the end of the pipe, or until the program has
// ended and what it wrote has been read.
func (o *outPipe) pump(send func([]byte) error) {
	buf := make([]byte, 32<<10)
	for {
		n, err := o.f.Read(buf)
		if n > 0 && send(buf[:n]) != nil {
			break
		}
		if err == nil {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf, send)
			break
		}
		o.f.Close() // end of file
		return
	}
	go o.discard(buf)
}

// drain reads what is in the pipe now. The deadline makes os.File refuse to
// read, so the descriptor is read directly; it does not block.
func (o *outPipe) drain(buf []byte, send func([]byte) error) {
	for {
		n, err := unix.Read(int(o.fd()), buf)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || send(buf[:n]) != nil {
			return
		}
	}
}

// fd is the descriptor, without the change to blocking mode that File.Fd makes.
func (o *outPipe) fd() (fd uintptr) {
	if c, err := o.f.SyscallConn(); err == nil {
		_ = c.Control(func(n uintptr) { fd = n })
	}
	return fd
}

// discard reads and drops until the last writer is gone.
func (o *outPipe) discard(buf []byte) {
	_ = o.f.SetReadDeadline(time.Time{})
	for {
		_, err := o.f.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded): // programEnded came later
			_ = o.f.SetReadDeadline(time.Time{})
		case err != nil:
			o.f.Close()
			return
		}
	}
}

// inPipe is the input of a program: frames wait here, at most a window of them,
// until the program reads.
type inPipe struct {
	f *os.File // set before pump runs

	mu     sync.Mutex
	more   sync.Cond
	queue  []inChunk // guarded by mu
	eof    bool      // guarded by mu
	closed bool      // guarded by mu
}

type inChunk struct {
	data []byte
	cost int // bytes of credit to return
}

func newInPipe() *inPipe {
	i := &inPipe{}
	i.more.L = &i.mu
	return i
}

// push queues a frame's data; empty data is the end of input.
func (i *inPipe) push(data []byte, cost int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed || i.eof {
		return
	}
	if len(data) == 0 {
		i.eof = true
	} else {
		i.queue = append(i.queue, inChunk{data, cost})
	}
	i.more.Signal()
}

// next returns the next chunk; false at the end.
func (i *inPipe) next() (inChunk, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(i.queue) == 0 && !i.eof && !i.closed {
		i.more.Wait()
	}
	if i.closed || len(i.queue) == 0 {
		return inChunk{}, false
	}
	c := i.queue[0]
	i.queue = i.queue[1:]
	return c, true
}

// pump writes input to the program and returns credit for what it has taken.
func (i *inPipe) pump(e *execSession) {
	defer i.f.Close()
	var meter agentproto.Meter
	for {
		c, ok := i.next()
		if !ok {
			return
		}
		if _, err := i.f.Write(c.data); err != nil {
			i.close()
			if !errors.Is(err, os.ErrClosed) {
				tell(e.out, agentproto.MsgStdinError, stdinError(err))
			}
			return
		}
		if n := meter.Add(c.cost); n > 0 {
			tell(e.out, agentproto.MsgCredit, agentproto.Credit{N: n})
		}
	}
}

// close ends the pump and closes the pipe.
func (i *inPipe) close() {
	i.mu.Lock()
	i.closed, i.queue = true, nil
	i.more.Broadcast()
	i.mu.Unlock()
	i.f.Close()
}

func stdinError(err error) agentproto.StdinError {
	e := agentproto.StdinError{Message: "program does not read its input: " + errnoText(err).Error()}
	var errno unix.Errno
	if errors.As(err, &errno) {
		n, name := int32(errno), unix.ErrnoName(errno)
		e.Errno, e.ErrnoName = &n, &name
	}
	return e
}
