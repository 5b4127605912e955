package volumefs

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Mkdir makes a directory and its missing parents. One that is there is no
// error.
func (f *FS) Mkdir(ctx context.Context, path string) error {
	rel, err := f.begin(ctx, "mkdir", path)
	if err != nil {
		return err
	}
	return f.end("mkdir", path, f.mkdir(rel))
}

func (f *FS) mkdir(rel string) error {
	s, err := f.find(rel, create)
	if err != nil {
		return err
	}
	defer s.close()
	if s.exists() {
		if !s.isDir() {
			return unix.EEXIST
		}
		return nil
	}
	made, err := f.makeDirs(s.dir, append(s.missing, s.name))
	if err != nil {
		return err
	}
	made.close()
	return nil
}

// madeDirs is a chain of directories, each in the one before it.
type madeDirs struct {
	fs    *FS
	fds   []int // fds[i] holds names[i]; the last one is where the chain ends
	names []string
	fresh []bool // made by us
}

// makeDirs makes names below dir, or opens those that somebody else made
// meanwhile, and returns the chain. On failure it takes back what it made.
func (f *FS) makeDirs(dir int, names []string) (*madeDirs, error) {
	m := &madeDirs{fs: f, names: names}
	if len(names) > 0 {
		f.replaced.closeAll()
	}
	start, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	m.fds = append(m.fds, start)
	for _, name := range names {
		if err := m.descend(name); err != nil {
			m.undo()
			return nil, err
		}
	}
	return m, nil
}

func (m *madeDirs) descend(name string) error {
	fresh, err := m.mkdir(name)
	if err != nil {
		return err
	}
	m.fresh = append(m.fresh, fresh)
	fd, err := m.fs.openIn(m.end(), name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	m.fds = append(m.fds, fd)
	return nil
}

// mkdir makes a directory at the end of the chain; fresh is false for one that is
// there.
func (m *madeDirs) mkdir(name string) (fresh bool, err error) {
	n, err := m.fs.accountName(m.end(), name)
	if err != nil {
		return false, err
	}
	defer n.close()
	first, acl := ledger.Delta{Bytes: ledger.Block, Inodes: 1}, int64(0)
	if n.fd < 0 {
		if n.w != nil {
			acl = n.rules.InheritedOf(m.end(), true)
		}
		if err := n.growName(first.Plus(ledger.Delta{Bytes: acl}), m.end(), name); err != nil {
			return false, err
		}
	}
	err = unix.Mkdirat(m.end(), name, newDirMode)
	if err == unix.EEXIST {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	n.add(first)
	if acl > 0 {
		if fd, err := m.fs.openIn(m.end(), name, unix.O_PATH|unix.O_DIRECTORY); err == nil {
			n.add(ledger.Delta{Bytes: n.rules.Xattrs(ledger.XattrBytes(fd))})
			_ = unix.Close(fd)
		}
	}
	return true, n.settle()
}

// end is the last directory of the chain.
func (m *madeDirs) end() int { return m.fds[len(m.fds)-1] }

// undo removes what was made, as far as it is still empty, and closes the chain.
func (m *madeDirs) undo() {
	for i := len(m.fresh) - 1; i >= 0; i-- {
		if !m.fresh[i] || m.fs.rmdir(m.fds[i], m.names[i]) != nil {
			break
		}
	}
	m.close()
}

// sync makes the directories and the name in the last one durable.
func (m *madeDirs) sync() error {
	for _, fd := range m.fds {
		if err := syncDir(fd); err != nil {
			return err
		}
	}
	return nil
}

func (m *madeDirs) close() {
	for _, fd := range m.fds {
		_ = unix.Close(fd)
	}
	m.fds = nil
}

// syncDir makes the names in an O_PATH directory durable.
func syncDir(dir int) error {
	fd, err := openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fsync(fd)
}
