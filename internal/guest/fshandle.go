package guest

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// maxHandles bounds open handles of all clients together.
const maxHandles = 4096

// handle is an open file or directory of a client.
type handle struct {
	owner uint32 // id of the request that opened it: tells whose client it is
	path  string
	f     *os.File
	dir   bool

	mu sync.Mutex // serializes ReadDir
}

// addHandle registers a handle and returns its number.
func (s *sessions) addHandle(h *handle) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.handles) >= maxHandles {
		return 0, unix.EMFILE
	}
	s.next++
	s.handles[s.next] = h
	return s.next, nil
}

func (s *sessions) handle(n uint64) (*handle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.handles[n]; h != nil {
		return h, nil
	}
	return nil, unix.EBADF
}

// closeHandle closes one handle. Operations under way on it fail or finish.
func (s *sessions) closeHandle(n uint64) error {
	s.mu.Lock()
	h := s.handles[n]
	delete(s.handles, n)
	s.mu.Unlock()
	if h == nil {
		return unix.EBADF
	}
	return h.f.Close()
}

// closeHandles closes all handles that match.
func (s *sessions) closeHandles(match func(*handle) bool) {
	s.mu.Lock()
	var gone []*handle
	for n, h := range s.handles {
		if match(h) {
			gone = append(gone, h)
			delete(s.handles, n)
		}
	}
	s.mu.Unlock()
	for _, h := range gone {
		h.f.Close()
	}
}

// openFile opens a regular file for a client. It neither blocks on nor opens
// devices, FIFOs and sockets.
func openFile(path string, o agentproto.FSOpenOptions) (*os.File, error) {
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	switch {
	case o.Read && (o.Write || o.Append):
		flags |= unix.O_RDWR
	case o.Write || o.Append:
		flags |= unix.O_WRONLY
	case o.Read:
	default:
		return nil, unix.EINVAL
	}
	for _, f := range []struct {
		on   bool
		flag int
	}{{o.Append, unix.O_APPEND}, {o.Create, unix.O_CREAT}, {o.CreateNew, unix.O_CREAT | unix.O_EXCL}} {
		if f.on {
			flags |= f.flag
		}
	}
	mode := uint32(0o644)
	if o.Mode != nil {
		mode = *o.Mode & 0o7777
	}
	if fi, err := os.Stat(path); err == nil {
		if fi.IsDir() {
			return nil, unix.EISDIR
		}
		if !fi.Mode().IsRegular() {
			return nil, errNotRegular
		}
	}
	fd, err := unix.Open(path, flags, mode)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errNotRegular // replaced since the check above
	}
	if err == nil && o.Truncate {
		err = unix.Ftruncate(fd, 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}
