package volstore

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// errBudget says that a tree was too large to be removed at once.
var errBudget = errors.New("more entries than the budget allows")

// unlimited is the budget of removals that run to the end.
const unlimited = int(^uint(0) >> 1)

// maxDepth is how deep removal recurses, with one descriptor a level. What lies
// deeper is moved to the top of the tree first: a guest may nest directories
// without end.
const maxDepth = 64

// removeTree deletes the directory at path and all below it. Symlinks are
// removed, never followed; directories without permissions are made accessible.
func removeTree(path string) error { return removeSome(path, unlimited) }

// removeSome is removeTree for at most budget entries; then it stops with
// errBudget, and another call goes on.
func removeSome(path string, budget int) error {
	parent, err := openDir(filepath.Dir(path), 0)
	if err != nil {
		return err
	}
	defer parent.Close()
	r := &remover{budget: budget}
	return r.remove(parent, filepath.Base(path), 0)
}

type remover struct {
	budget int
	top    *os.File // the tree's root: where deep directories are moved
	moved  int      // number of deep directories moved so far
}

// remove deletes the directory name in parent.
func (r *remover) remove(parent *os.File, name string, depth int) error {
	dir, err := r.open(parent, name)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return r.unlink(parent, name, 0)
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if depth == 0 {
		r.top = dir
	}
	if err := r.empty(dir, depth); err != nil {
		return err
	}
	return r.unlink(parent, name, unix.AT_REMOVEDIR)
}

// empty deletes what is in dir, pass after pass: deep directories that were
// moved to the top come up in a later one.
func (r *remover) empty(dir *os.File, depth int) error {
	for {
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
		n, err := r.pass(dir, depth)
		if err != nil || n == 0 {
			return err
		}
	}
}

func (r *remover) pass(dir *os.File, depth int) (n int, err error) {
	for {
		entries, err := dir.ReadDir(1024)
		for _, e := range entries {
			n++
			if err := r.entry(dir, e, depth); err != nil {
				return n, err
			}
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func (r *remover) entry(dir *os.File, e os.DirEntry, depth int) error {
	if r.budget--; r.budget < 0 {
		return errBudget
	}
	switch {
	case !e.IsDir():
		return r.unlink(dir, e.Name(), 0)
	case depth < maxDepth:
		return r.remove(dir, e.Name(), depth+1)
	}
	r.moved++
	to := fmt.Sprintf(".deep-%d-%d", os.Getpid(), r.moved)
	return unix.Renameat(int(dir.Fd()), e.Name(), int(r.top.Fd()), to)
}

// unlink deletes one name; a directory that may not be written is made writable.
func (r *remover) unlink(dir *os.File, name string, flags int) error {
	err := unix.Unlinkat(int(dir.Fd()), name, flags)
	if errors.Is(err, unix.EACCES) && unix.Fchmod(int(dir.Fd()), 0o700) == nil {
		err = unix.Unlinkat(int(dir.Fd()), name, flags)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "remove", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return nil
}

func (r *remover) open(parent *os.File, name string) (*os.File, error) {
	fd, err := openSub(parent, name, 0)
	if errors.Is(err, unix.EACCES) {
		if err := chmodDir(parent, name); err != nil {
			return nil, err
		}
		fd, err = openSub(parent, name, 0)
	}
	if errors.Is(err, unix.EXDEV) {
		return nil, &os.PathError{Op: "remove", Path: filepath.Join(parent.Name(), name), Err: errMounted}
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// errMounted keeps a removal from what is not the tree's.
var errMounted = fmt.Errorf("a file system is mounted on it (%w)", unix.EBUSY)

// openSub opens a directory in another one, EXDEV if something is mounted on it.
// Without openat2 (Linux 5.6), other file systems are told apart only.
func openSub(parent *os.File, name string, flags int) (int, error) {
	flags |= unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	how := unix.OpenHow{Flags: uint64(flags), Resolve: unix.RESOLVE_NO_XDEV}
	fd, err := unix.Openat2(int(parent.Fd()), name, &how)
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fd, err
	}
	if fd, err = unix.Openat(int(parent.Fd()), name, flags, 0); err != nil {
		return -1, err
	}
	var above, st unix.Stat_t
	err = errors.Join(unix.Fstat(int(parent.Fd()), &above), unix.Fstat(fd, &st))
	if err == nil && st.Dev != above.Dev {
		err = unix.EXDEV
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// chmodDir makes a directory of ours accessible without following a symlink
// that may have been put there: through a descriptor of the directory itself.
func chmodDir(parent *os.File, name string) error {
	_ = unix.Fchmod(int(parent.Fd()), 0o700)
	fd, err := openSub(parent, name, unix.O_PATH)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o700)
}
