package volumefs

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A new file's content is written to a temporary first. On most file systems
// that one has no name at all (O_TMPFILE), so that nothing is left when its
// writer dies; only while an existing file is replaced does it need a name, for
// the instant between linkat and rename, and where data can be synced under a
// name only. That name is in the scratch directory, outside the volume, where
// there is one.

const tempPrefix, tempSuffix = ".msb-", ".tmp"

// newMode is what a new file or directory gets; the umask takes bits away.
const (
	newFileMode = 0o644
	newDirMode  = 0o755
)

// temp is a file being filled. name is "" as long as it has none.
type temp struct {
	fs   *FS
	file *os.File
	dir  int // where it is to be: O_PATH, not owned
	at   int // the directory that name is in; not owned
	name string
}

// newTemp makes a temporary on the file system of dir.
func (f *FS) newTemp(dir int) (*temp, error) {
	t := &temp{fs: f, dir: dir, at: -1}
	fd, err := -1, error(unix.EOPNOTSUPP)
	if !f.noUnnamed.Load() {
		fd, err = openat(dir, ".", unix.O_TMPFILE|unix.O_WRONLY, newFileMode)
	}
	switch err {
	case unix.EOPNOTSUPP, unix.EISDIR: // the file system or the kernel has no O_TMPFILE
		f.noUnnamed.Store(true)
		t.name, t.at = tempName(), dir
		fd, err = openat(dir, t.name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW, newFileMode)
	}
	if err != nil {
		return nil, err
	}
	t.file = os.NewFile(uintptr(fd), "temporary file")
	return t, nil
}

func (t *temp) fd() int { return int(t.file.Fd()) }

// sync makes the data durable, or, where that is enough, durable before any name
// that the file gets. Where the file system takes a file without a name for one that
// nobody will miss, it gets a name before.
func (t *temp) sync() error {
	if t.fs.keepsOrder(t.fd()) {
		return unix.SyncFileRange(t.fd(), 0, 0, writtenBack)
	}
	if t.name == "" && !t.syncsUnnamed() {
		// The long part first: the name is to be there for an instant only.
		if err := unix.Fdatasync(t.fd()); err != nil {
			return err
		}
		if err := t.giveName(t.dir); err != nil {
			return err
		}
	}
	return unix.Fdatasync(t.fd())
}

// syncsUnnamed reports whether fdatasync of a file without a name is known to
// do what it says. On btrfs it does nothing (fs/btrfs/tree-log.c,
// btrfs_log_inode_parent), and once the file has its name, an fsync of the
// directory makes an empty file durable. overlayfs has the ways of whatever is
// below it.
func (t *temp) syncsUnnamed() bool {
	var st unix.Statfs_t
	if t.fs.opts.NoUnnamedSync || unix.Fstatfs(t.fd(), &st) != nil {
		return false
	}
	return st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC || st.Type == unix.TMPFS_MAGIC
}

// place gives the complete, synced file its name in dir, which replaces
// whatever file has that name. When it fails the file has no name left: dir may
// be closed after this. taken says that there was a file of that name: then the
// temporary gets a name to be renamed from at once.
func (t *temp) place(dir int, name string, taken bool) error {
	err := t.tryPlace(dir, name, taken)
	if err != nil {
		t.unname()
	}
	return err
}

func (t *temp) tryPlace(dir int, name string, taken bool) error {
	if t.name == "" {
		if !taken {
			if err := t.link(dir, name); err != unix.EEXIST {
				return err
			}
		}
		if err := t.giveName(dir); err != nil {
			return err
		}
	}
	if err := replacePoint.Hit(); err != nil {
		return err
	}
	if err := renameat(t.at, t.name, dir, name); err != nil {
		return err
	}
	t.name = ""
	return nil
}

// giveName links the file where it can be renamed from: in the scratch
// directory, or in dir when that is on another file system.
func (t *temp) giveName(dir int) error {
	name := tempName()
	if t.fs.scratch >= 0 {
		err := t.link(t.fs.scratch, name)
		if err == nil {
			t.at, t.name = t.fs.scratch, name
			return nil
		}
		if err != unix.EXDEV {
			return err
		}
	}
	if err := t.link(dir, name); err != nil {
		return err
	}
	t.at, t.name = dir, name
	return nil
}

// link names an unnamed file. By descriptor this takes CAP_DAC_READ_SEARCH or
// Linux 6.10; everybody may do it by /proc.
func (t *temp) link(dir int, name string) error {
	return unix.Linkat(t.fs.proc, strconv.Itoa(t.fd()), dir, name, unix.AT_SYMLINK_FOLLOW)
}

// discard closes the file and takes its name away, if it still has one.
func (t *temp) discard() {
	t.unname()
	_ = t.file.Close()
}

func (t *temp) unname() {
	if t.name != "" {
		_ = unix.Unlinkat(t.at, t.name, 0)
		t.name = ""
	}
}

func tempName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return tempPrefix + hex.EncodeToString(b[:]) + tempSuffix
}

func isTempName(s string) bool {
	return len(s) == len(tempPrefix)+16+len(tempSuffix) &&
		strings.HasPrefix(s, tempPrefix) && strings.HasSuffix(s, tempSuffix)
}

// reapScratch removes what writers left that were killed between linkat and
// rename.
func (f *FS) reapScratch() {
	fd, err := openat(f.scratch, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return
	}
	dir := os.NewFile(uintptr(fd), "scratch directory")
	defer dir.Close()
	age := f.opts.ScratchAge
	if age == 0 {
		age = time.Minute
	}
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		var st unix.Stat_t
		if !isTempName(name) || unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue
		}
		if time.Since(time.Unix(st.Ctim.Unix())) >= age {
			_ = unix.Unlinkat(fd, name, 0)
		}
	}
}

// noRoom reports whether a file system was full.
func noRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// renameat is unix.Renameat, repeated after a signal.
func renameat(fromDir int, from string, toDir int, to string) error {
	for {
		if err := unix.Renameat(fromDir, from, toDir, to); err != unix.EINTR {
			return err
		}
	}
}
