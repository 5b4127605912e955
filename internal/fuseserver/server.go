package fuseserver

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
)

const rootID = fusewire.RootID

// Server serves one share to one guest. It implements [vhostuser.Handler] and
// [vhostuser.StateMaker].
type Server struct {
	cfg      Config
	virt     statVirt
	mirror   bool
	cache    cacheMode
	readonly bool
	valid    validity

	root      int // O_PATH descriptor of the share
	proc      int // descriptor of /proc/self/fd
	rootDev   uint64
	quick     bool   // the share's file system is local: its inodes never sleep
	uid       uint32 // the server's user: its files belong to the guest's user
	xattrat   bool   // the kernel has the *xattrat calls
	stripes   [64]sync.Mutex
	work      *workers
	quota     *quota // nil: nothing is counted
	closeOnce sync.Once

	nodeBudget, budget int64         // descriptors for nodes; for nodes and handles
	fds                *atomic.Int64 // held now; shared by the servers of one budget
	lastID             atomic.Uint64 // of nodes and handles; never reused
	session            atomic.Pointer[session]
	sessionMu          sync.Mutex // serialises INIT, DESTROY and Close
}

// session is what exists between INIT and DESTROY.
type session struct {
	nodes   *nodeTable
	handles *handleTable
	locks   *lockTable
	mnt     uint64 // identity of the root's
}

var (
	_ vhostuser.Handler    = (*Server)(nil)
	_ vhostuser.StateMaker = (*Server)(nil)
)

// New makes a server of a share. It starts nothing; the first blocking
// request starts a worker. The descriptors of cfg stay the caller's.
//
// Errors: kind InvalidConfig for a bad value, system call errors otherwise.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	budget, err := cfg.budget()
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg:      cfg,
		virt:     statVirts[cfg.StatVirt],
		mirror:   hostPerms[cfg.HostPerms],
		cache:    cacheModes[cfg.Cache],
		readonly: cfg.Readonly,
		uid:      uint32(os.Geteuid()),
		budget:   int64(budget),
		// An eighth is left for handles, so that a guest that keeps many
		// nodes can still open files.
		nodeBudget: int64(budget - budget/8),
		fds:        cfg.FDs,
		root:       -1,
		proc:       -1,
	}
	if s.fds == nil {
		s.fds = new(atomic.Int64)
	}
	s.valid = validities[s.cache]
	s.lastID.Store(rootID)
	s.work = newWorkers(s)
	err = s.open()
	if err == nil && cfg.Ledger != nil && !s.readonly {
		s.quota, err = newQuota(s, cfg.Ledger)
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// open duplicates the descriptors and looks at what they stand for.
func (s *Server) open() error {
	var err error
	if s.root, err = unix.FcntlInt(uintptr(s.cfg.Root), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		return os.NewSyscallError("dup share", err)
	}
	if s.proc, err = unix.FcntlInt(uintptr(s.cfg.ProcSelfFd), unix.F_DUPFD_CLOEXEC, 3); err != nil {
		return os.NewSyscallError("dup /proc/self/fd", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(s.root, &st); err != nil {
		return os.NewSyscallError("fstat share", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return os.NewSyscallError("open share", unix.ENOTDIR)
	}
	s.rootDev = st.Dev
	var fs unix.Statfs_t
	if err := unix.Fstatfs(s.root, &fs); err != nil {
		return os.NewSyscallError("fstatfs share", err)
	}
	s.quick = localFS(int64(fs.Type))
	s.xattrat = haveXattrat(s.proc, s.root)
	return nil
}

// localFS reports whether inodes of a file system with this magic number are
// attributes in memory once they are open. Unknown ones are not trusted.
func localFS(magic int64) bool {
	switch magic {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC,
		unix.F2FS_SUPER_MAGIC, unix.RAMFS_MAGIC:
		return true
	}
	return false
}

// NewState implements vhostuser.StateMaker: the scratch memory of one queue.
func (s *Server) NewState(queue int) any { return newCall(s) }

// Serve implements vhostuser.Handler.
func (s *Server) Serve(r *vhostuser.Request) (n int, done bool) {
	c, ok := r.State.(*call)
	if !ok || c.s != s {
		c = newCall(s)
	}
	n, done = c.serve(r.In, r.Out, queued{r})
	if done {
		r.Flush = c.slow()
	}
	return n, done
}

// Close ends the session and closes every descriptor. No request may be in
// flight or come later. It is idempotent.
func (s *Server) Close() error {
	s.closeOnce.Do(func() {
		s.endSession()
		s.work.close()
		if s.quota != nil {
			s.quota.close()
		}
		for _, fd := range []int{s.root, s.proc} {
			if fd >= 0 {
				closeFd(fd)
			}
		}
	})
	return nil
}

// beginSession drops what an earlier session left and starts a new one.
func (s *Server) beginSession(c *call) errno {
	s.sessionMu.Lock()
	defer s.sessionMu.Unlock()
	if old := s.session.Swap(nil); old != nil {
		old.end()
	}
	se := &session{nodes: newNodeTable(), handles: newHandleTable(), locks: newLockTable(s)}
	fd, err := unix.FcntlInt(uintptr(s.root), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return unix.ENFILE
	}
	if err := statxFd(fd, statxMask, &c.stx); err != 0 {
		closeFd(fd)
		return err
	}
	s.fds.Add(1)
	root := new(inode)
	s.setInode(root, rootID, fd, &c.stx)
	se.mnt = root.key.mnt
	se.nodes.add(root).drop()
	s.session.Store(se)
	return 0
}

func (s *Server) endSession() {
	s.sessionMu.Lock()
	defer s.sessionMu.Unlock()
	if old := s.session.Swap(nil); old != nil {
		old.end()
	}
}

func (se *session) end() {
	se.locks.close()
	se.handles.close()
	se.nodes.close()
}

// setInode makes n, which nobody else has seen yet, the inode of a descriptor
// that has been charged to the budget.
func (s *Server) setInode(n *inode, id uint64, fd int, stx *unix.Statx_t) {
	n.srv, n.id, n.key, n.fd = s, id, identityOf(stx), fd
	n.format = uint32(stx.Mode) & unix.S_IFMT
	n.quick = s.quick && n.key.dev == s.rootDev
}

// reserve charges one descriptor to the budget, for a handle or for a node.
func (s *Server) reserve(limit int64) bool {
	if s.fds.Add(1) > limit {
		s.fds.Add(-1)
		return false
	}
	return true
}

func (s *Server) release() { s.fds.Add(-1) }

// closeNode is called by the last user of an inode.
func (s *Server) closeNode(n *inode) {
	if s.quota != nil {
		s.quota.closed(n)
		return
	}
	s.closeLater(n.fd, n)
}

// closeHandle is called by the last user of a handle.
func (s *Server) closeHandle(h *handle) {
	if h.dir != nil {
		h.dir.discard()
		h.dirs.Add(-1)
	}
	if h.lease != nil {
		s.quota.dropLease(h.lease)
	}
	s.closeLater(h.fd, h.node)
	h.node.drop()
}

// slowClose is the size from which freeing the blocks of a deleted file is
// left to a worker, so that neither a queue nor FORGET waits for it.
const slowClose = 64 << 20

// closeLater closes a descriptor of n, on a worker if that may free a huge
// deleted file.
func (s *Server) closeLater(fd int, n *inode) {
	defer s.release()
	if n.large.Load() {
		st := new(unix.Stat_t)
		if fstat(n.quick, fd, st) == 0 && st.Nlink == 0 && s.work.try(job{closeFd: fd}) {
			return
		}
	}
	closeFd(fd)
}

// noteSize remembers that a file reaches to end.
func (n *inode) noteSize(end uint64) {
	if end >= slowClose && n.format == unix.S_IFREG && !n.large.Load() {
		n.large.Store(true)
	}
}

func (s *Server) logf(format string, args ...any) {
	if s.cfg.Logf != nil {
		s.cfg.Logf(format, args...)
	}
}
