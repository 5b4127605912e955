package ledger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrBudget says that a tree has more entries than a walk was to look at.
var ErrBudget = errors.New("the volume has too many files to be counted at once")

// Found is what a walk found.
type Found struct {
	Charges   Delta
	Allocated int64 // bytes that the file system uses for it, as it says
}

// Walk sums the charges of everything below a directory that has a name; dir may
// be open with O_PATH. budget is how many entries it looks at, 0 means all. ctx is
// looked at in between. No link is followed, nothing is opened but directories.
// What lies on another file system, mounted on a directory in it, is not counted,
// as no file server does.
//
// Errors: ErrBudget, and those of the file system.
func Walk(ctx context.Context, dir *os.File, budget int) (Found, error) {
	rules, err := RulesOf(int(dir.Fd()))
	if err != nil {
		return Found{}, err
	}
	root, err := openDir(int(dir.Fd()), ".")
	if err != nil {
		return Found{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return Found{}, errors.Join(err, root.Close())
	}
	w := &walk{ctx: ctx, rules: rules, dev: st.Dev, seen: map[uint64]bool{}, budget: budget}
	defer w.close()
	w.found.Charges.Bytes = rules.Root(st.Size) + rules.Xattrs(xattrBytes(fdPath(int(root.Fd()))))
	w.found.Allocated = st.Blocks * 512
	err = w.tree(root)
	return w.found, err
}

// maxOpenLevels bounds the descriptors of a walk: a guest can nest directories
// deeper than any process may have files open. What is above is reached by "..",
// and must be what it was.
const maxOpenLevels = 64

// level is a directory whose entries are counted, and what is below it is not.
type level struct {
	dir  *os.File // nil: closed for now
	ino  uint64
	subs []string
}

type walk struct {
	ctx    context.Context
	rules  Rules
	dev    uint64          // of the file system that is counted
	seen   map[uint64]bool // inodes with several names that were counted
	budget int
	looked int
	levels []*level
	found  Found
}

func (w *walk) tree(root *os.File) error {
	if err := w.enter(root); err != nil {
		return err
	}
	for len(w.levels) > 0 {
		l := w.levels[len(w.levels)-1]
		if len(l.subs) == 0 {
			if err := w.leave(); err != nil {
				return err
			}
			continue
		}
		name := l.subs[len(l.subs)-1]
		l.subs = l.subs[:len(l.subs)-1]
		dir, err := openDir(int(l.dir.Fd()), name)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // something else by now
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", l.path(name), err)
		}
		if err := w.enter(dir); err != nil {
			return err
		}
	}
	return nil
}

// path tells people where a name of a level was.
func (l *level) path(name string) string {
	dir, err := os.Readlink(fdPath(int(l.dir.Fd())))
	if err != nil {
		return name
	}
	return filepath.Join(dir, name)
}

// enter counts the entries of a directory and makes it the current level.
func (w *walk) enter(dir *os.File) error {
	l := &level{dir: dir}
	w.levels = append(w.levels, l)
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if st.Dev != w.dev { // mounted since its name was counted
		return nil
	}
	l.ino = st.Ino
	if n := len(w.levels) - maxOpenLevels; n > 0 {
		_ = w.levels[n-1].dir.Close()
		w.levels[n-1].dir = nil
	}
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		entries, err := dir.ReadDir(1024)
		for _, e := range entries {
			if err := w.entry(l, e.Name()); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ENOENT) { // removed while we walk
			return nil
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", l.path(""), err)
		}
	}
}

// leave goes back to the level above.
func (w *walk) leave() error {
	n := len(w.levels) - 1
	l := w.levels[n]
	w.levels = w.levels[:n]
	defer l.dir.Close()
	if n == 0 || w.levels[n-1].dir != nil {
		return nil
	}
	up, err := openDir(int(l.dir.Fd()), "..")
	if err != nil {
		return err
	}
	w.levels[n-1].dir = up
	var st unix.Stat_t
	if err := unix.Fstat(int(up.Fd()), &st); err != nil {
		return err
	}
	if st.Dev != w.dev || st.Ino != w.levels[n-1].ino {
		return errMoved
	}
	return nil
}

var errMoved = errors.New("a directory was moved while the volume was counted")

func (w *walk) close() {
	for _, l := range w.levels {
		if l.dir != nil {
			_ = l.dir.Close()
		}
	}
}

func (w *walk) entry(l *level, name string) error {
	var st unix.Stat_t
	at := int(l.dir.Fd())
	err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil // removed while we walk
	}
	if err != nil {
		return fmt.Errorf("stat %s: %w", l.path(name), err)
	}
	if st.Dev != w.dev {
		return nil
	}
	if w.looked++; w.budget > 0 && w.looked > w.budget {
		return ErrBudget
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if st.Nlink > 1 && !isDir {
		if w.seen[st.Ino] {
			w.found.Charges = w.found.Charges.Plus(Delta{Inodes: 1}) // one more name
			return nil
		}
		w.seen[st.Ino] = true
	}
	path := fdPath(at) + "/" + name
	d := w.rules.Inode(&st, st.Mode&unix.S_IFMT == unix.S_IFREG && standin(path, st.Size), xattrBytes(path))
	d.Inodes = 1 // names are counted as they are found
	w.found.Charges = w.found.Charges.Plus(d)
	w.found.Allocated += st.Blocks * 512
	if isDir {
		l.subs = append(l.subs, name)
	}
	return nil
}

func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// fdPath names an open file without any path lookup but in /proc.
func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// standin reports whether a file stands in for a symlink. The name is reached
// through the directory's descriptor, which no path inside the volume can lead
// astray.
func standin(path string, size int64) bool {
	if size <= 0 || size > Block {
		return false
	}
	var buf [32]byte
	n, err := unix.Lgetxattr(path, overlayXattr, buf[:])
	return err == nil && n == 20 && binary.LittleEndian.Uint32(buf[12:])&unix.S_IFMT == unix.S_IFLNK
}

// XattrBytes is the sum for [Rules.Xattrs] of an open file, which may be open
// with O_PATH: the lengths of names and values of its attributes that count.
func XattrBytes(fd int) int64 {
	path := fdPath(fd)
	return sumXattrs(func(b []byte) (int, error) { return unix.Listxattr(path, b) },
		func(name string) (int, error) { return unix.Getxattr(path, name, nil) })
}

// OpenXattrBytes is XattrBytes of a file that is open for reading or writing, and
// faster.
func OpenXattrBytes(fd int) int64 {
	return sumXattrs(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string) (int, error) { return unix.Fgetxattr(fd, name, nil) })
}

// xattrBytes is XattrBytes of a path whose last component is not followed.
func xattrBytes(path string) int64 {
	return sumXattrs(func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
		func(name string) (int, error) { return unix.Lgetxattr(path, name, nil) })
}

// sumXattrs is 0 where attributes cannot be read, as where there are none.
func sumXattrs(list func([]byte) (int, error), get func(string) (int, error)) (sum int64) {
	buf := make([]byte, 256)
	n, err := list(buf)
	if err == unix.ERANGE {
		buf = make([]byte, 64<<10) // XATTR_LIST_MAX
		n, err = list(buf)
	}
	if err != nil || n <= 0 {
		return 0
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if !CountedXattr(name) {
			continue
		}
		if size, err := get(name); err == nil {
			sum += int64(len(name) + size)
		}
	}
	return sum
}
