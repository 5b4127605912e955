package fileserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
)

// Descriptors of a file server process. The connections follow fdRequest, then
// the inherited locks, the ledgers, and /proc/self/fd.
const (
	fdStatus  = 3
	fdRequest = 4
)

// Main is the entry of the hidden command msb fileserver. It is started by
// Start only, already confined. It returns 0 when every front end has closed
// its connection properly.
func Main(args []string) int {
	signal.Ignore(unix.SIGPIPE) // a reader of the log that is gone must not end the guest's files
	log.SetFlags(0)
	log.SetPrefix("msb fileserver: ")
	if len(args) != 1 {
		log.Print("this command is for msb itself")
		return 2
	}
	s, err := setUp()
	if reportErr := report(os.NewFile(fdStatus, "status"), err); reportErr != nil {
		log.Print(reportErr) // the starter is gone, or is none
		return 1
	}
	if err != nil {
		return 1 // the starter knows
	}
	if err := s.serve(); err != nil {
		return 1
	}
	return 0
}

// server is all shares of one process.
type server struct {
	request
	fs     []*fuseserver.Server // one per share
	budget int                  // descriptors that the guest may make us hold
	fds    atomic.Int64         // held, by all shares
}

// setUp opens and probes the shares, and gives up what only that needed.
func setUp() (*server, error) {
	b, err := readFd(fdRequest)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.InvalidArgument, err, "no request")
	}
	s := new(server)
	if err := json.Unmarshal(b, &s.request); err != nil {
		return nil, errdefs.Wrap(errdefs.Internal, err, "file server request")
	}
	if os.Geteuid() == 0 && !s.PrivateRoot {
		return nil, errdefs.New(errdefs.UnsupportedOperation, "a file server of uid 0 needs a private root")
	}
	unix.Umask(0) // the guest's modes are meant as they are
	if s.budget, err = shareBudget(len(s.Shares)); err != nil {
		return nil, err
	}
	for i := range s.Shares {
		if err := s.open(i); err != nil {
			return nil, err
		}
	}
	if err := confine.SealExec(); err != nil {
		return nil, errdefs.Wrap(errdefs.Internal, err, "file server")
	}
	return s, nil
}

// readFd reads all of a file of memory and closes it.
func readFd(fd int) ([]byte, error) {
	f := os.NewFile(uintptr(fd), "request")
	if f == nil {
		return nil, unix.EBADF
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, st.Size())
	_, err = f.ReadAt(b, 0)
	return b, err
}

// Descriptors that a process and each share need besides those of guest
// files: sockets, eventfds, guest memory regions.
const (
	ownFiles   = 256
	shareFiles = 128
	// maxGuestFiles bounds the memory for nodes: about 430 bytes each.
	maxGuestFiles = 1 << 18
)

// shareBudget is how many descriptors the guest may make the process hold, over
// all of its n shares: they are one guest's, and which of them it fills is its
// own affair.
func shareBudget(n int) (int, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, errdefs.Wrap(errdefs.IO, err, "descriptor limit")
	}
	budget := int64(min(r.Cur, 1<<24)) - ownFiles - int64(n)*shareFiles
	budget = min(budget*15/16, maxGuestFiles)
	if budget < 64 {
		return 0, errdefs.New(errdefs.InvalidConfig, "%d open files are too few for %d shares", r.Cur, n).
			WithHint("raise the hard limit of open files (ulimit -Hn) to 4096 or more")
	}
	return int(budget), nil
}

// open opens share i, makes sure that it is the directory that was meant, and
// that it can be served as asked.
func (s *server) open(i int) error {
	share := s.Shares[i]
	path := share.Path
	if s.PrivateRoot {
		path = shareRoot(i)
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "share %s", share.Path)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "share %s", share.Path)
	}
	if (share.Dev != 0 || share.Ino != 0) && (uint64(st.Dev) != share.Dev || st.Ino != share.Ino) {
		return errdefs.New(errdefs.IO, "share %s is not the directory it was", share.Path)
	}
	if err := fuseserver.Probe(fd, share.StatVirt, share.Readonly); err != nil {
		return named(err, share.Path)
	}
	cfg := share.config()
	cfg.Root, cfg.ProcSelfFd = fd, s.ProcSelfFd
	cfg.FDBudget, cfg.FDs = s.budget, &s.fds
	cfg.AsRoot = s.Privileged && share.StatVirt == "off"
	cfg.Logf = log.Printf
	if fd := s.Ledgers[i]; fd != 0 {
		cfg.Ledger = os.NewFile(uintptr(fd), "ledger of "+share.Tag)
	}
	fs, err := fuseserver.New(cfg)
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "share %s", share.Path)
	}
	s.fs = append(s.fs, fs)
	return nil
}

// named puts the share's path in front of an error, whose kind and hint stay.
func named(err error, path string) error {
	var e *errdefs.Error
	if !errors.As(err, &e) {
		return errdefs.Wrap(errdefs.IO, err, "share %s", path)
	}
	return &errdefs.Error{Kind: e.Kind, Msg: "share " + path, Hint: e.Hint, Cause: err}
}

// serve runs all shares until their front ends are gone. One that breaks the
// protocol ends its own device only.
func (s *server) serve() error {
	errs := make([]error, len(s.Shares))
	var wg sync.WaitGroup
	for i := range s.Shares {
		wg.Go(func() {
			if err := s.serveShare(i); err != nil {
				log.Printf("share %s: %v", s.Shares[i].Tag, err)
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *server) serveShare(i int) error {
	f := os.NewFile(uintptr(fdRequest+1+i), "front end")
	conn, err := connection(f)
	if err != nil {
		return err
	}
	defer s.fs[i].Close()
	o := vhostuser.Options{Queues: 1 + max(1, s.Shares[i].Queues), Logf: log.Printf}
	if s.Config {
		o.Config = configSpace(s.Shares[i])
	}
	return vhostuser.Serve(context.Background(), conn, s.fs[i], o)
}

// connection returns the connection that f is or, if f listens, the first one
// that comes. f is closed.
func connection(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	listens, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return nil, fmt.Errorf("front end: %w", err)
	}
	if listens == 0 {
		return vhostuser.FileConn(f)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("front end: %w", err)
	}
	defer l.Close()
	c, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("front end: %w", err)
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("front end: not a unix socket"), c.Close())
	}
	return conn, nil
}

// configSpace is struct virtio_fs_config: the tag in 36 bytes, then the number
// of request queues.
func configSpace(share Share) []byte {
	b := make([]byte, 40)
	copy(b[:36], share.Tag)
	b[36] = byte(max(1, share.Queues))
	return b
}
