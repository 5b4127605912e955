package volstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// Files of a state directory (and of a staging directory, which becomes one).
const (
	dataName   = "data"        // staging and trash only: the data directory
	noteName   = "volume.json" // copy of the record
	attachName = "attach"      // flocked by holders; made when somebody attaches the volume
	aliveName  = "alive"       // unlinked when the volume is removed; another name of a note, if it can be
	cleanName  = "clean"       // disk volumes: the image needs no check
)

// note is the content of volume.json.
type note struct {
	Version       int               `json:"version"` // 1
	ID            string            `json:"id"`
	Name          string            `json:"name"`
	Kind          string            `json:"kind"`
	QuotaMiB      uint32            `json:"quota_mib,omitempty"`
	CapacityBytes int64             `json:"capacity_bytes,omitempty"`
	DiskFormat    string            `json:"disk_format,omitempty"`
	DiskFstype    string            `json:"disk_fstype,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	CreatedAt     time.Time         `json:"created_at"`
	Dev           uint64            `json:"dev"`
	Ino           uint64            `json:"ino"`
	BirthNS       int64             `json:"birth_ns"`
}

const noteVersion = 1

// encodeNote writes a note as json.Marshal does, which would cost a new process
// more than all the rest of a removal.
func encodeNote(v *records.Volume) []byte {
	b := append(make([]byte, 0, 512), `{"version":1,"id":`...)
	b = appendText(b, v.ID)
	b = appendText(append(b, `,"name":`...), v.Name)
	b = appendText(append(b, `,"kind":`...), v.Kind)
	if v.QuotaMiB != 0 {
		b = strconv.AppendUint(append(b, `,"quota_mib":`...), uint64(v.QuotaMiB), 10)
	}
	if v.CapacityBytes != 0 {
		b = strconv.AppendInt(append(b, `,"capacity_bytes":`...), v.CapacityBytes, 10)
	}
	if v.DiskFormat != "" {
		b = appendText(append(b, `,"disk_format":`...), v.DiskFormat)
	}
	if v.DiskFstype != "" {
		b = appendText(append(b, `,"disk_fstype":`...), v.DiskFstype)
	}
	for i, k := range slices.Sorted(maps.Keys(v.Labels)) {
		b = append(b, [2]string{`,"labels":{`, `,`}[min(i, 1)]...)
		b = appendText(append(appendText(b, k), ':'), v.Labels[k])
	}
	if len(v.Labels) > 0 {
		b = append(b, '}')
	}
	b = v.CreatedAt.AppendFormat(append(b, `,"created_at":"`...), time.RFC3339Nano)
	b = strconv.AppendUint(append(b, `","dev":`...), v.Identity.Dev, 10)
	b = strconv.AppendUint(append(b, `,"ino":`...), v.Identity.Ino, 10)
	b = strconv.AppendInt(append(b, `,"birth_ns":`...), v.Identity.BirthNS, 10)
	return append(b, "}\n"...)
}

// appendText appends a JSON string.
func appendText(b []byte, text string) []byte {
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || strings.IndexByte(`"\<>&`, c) >= 0 {
			quoted, err := json.Marshal(text)
			if err != nil {
				panic("volstore: a text cannot be encoded: " + err.Error())
			}
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), text...), '"')
}

// readFile is os.ReadFile of a small file of the home.
func readFile(path string) ([]byte, error) {
	f, err := openFile(path, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

func readNote(path string) (*records.Volume, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	var n note
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if n.Version != noteVersion || ValidateName(n.Name) != nil {
		return nil, fmt.Errorf("%s: version %d, name %q", path, n.Version, n.Name)
	}
	return &records.Volume{
		ID: n.ID, Name: n.Name, Kind: n.Kind, QuotaMiB: n.QuotaMiB, CapacityBytes: n.CapacityBytes,
		DiskFormat: n.DiskFormat, DiskFstype: n.DiskFstype, Labels: n.Labels, CreatedAt: n.CreatedAt,
		Identity: records.Identity{Dev: n.Dev, Ino: n.Ino, BirthNS: n.BirthNS},
	}, nil
}

// createFile makes a file that must not exist yet, with content.
func createFile(path string, data []byte) (*os.File, error) {
	f, err := openFile(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(data); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// touch makes an empty file unless there is one.
func touch(path string) error {
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT)
	if err != nil {
		return err
	}
	return f.Close()
}

// makeAlive makes the file alive in a state directory unless there is one. A link
// costs no inode.
func makeAlive(dir string) error {
	alive := filepath.Join(dir, aliveName)
	err := os.Link(filepath.Join(dir, noteName), alive)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	return touch(alive)
}

func syncDir(path string) error {
	f, err := openFile(path, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// openFile is home.OpenFile for files and directories.
func openFile(path string, flags int) (*os.File, error) {
	if flags&(unix.O_DIRECTORY|unix.O_PATH) == 0 {
		return home.OpenFile(path, flags)
	}
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
}

// syncsParents reports whether a new file that is synced has its new directories with
// it: fsync of ext4 commits the transaction with the file's creation and all before,
// that of XFS its log up to there; ext4 without a journal syncs new parents
// (ext4_sync_parent in fs/ext4/fsync.c). ext2's own driver, whose file systems have
// the same number, does not; it knows no times of birth.
func syncsParents(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && (st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC)
}

// begin starts syncs that need not come in an order, to be waited for, as often as
// one likes; nil is none. Syncs at the same time cost hardly more than one: a file
// system with a journal writes it once for all of them, and the disk flushes its
// cache once.
func begin(syncs ...func() error) (wait func() error) {
	errs := make([]error, len(syncs))
	var wg sync.WaitGroup
	for i, f := range syncs {
		if f != nil {
			wg.Go(func() { errs[i] = f() })
		}
	}
	return func() error {
		wg.Wait()
		return errors.Join(errs...)
	}
}

// renameNew renames and fails with fs.ErrExist if there is something at to.
// Where the file system knows no RENAME_NOREPLACE, the caller's lock and a look
// must do.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if _, err := os.Lstat(to); err == nil {
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: unix.EEXIST}
		}
		return os.Rename(from, to)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// moveOwn renames the directory at from to the free name to if it is the one
// with this identity; any other stays. Somebody may put another directory there
// between the look and the rename: then that one is put back.
func moveOwn(from, to string, own records.Identity) (moved bool, err error) {
	id, ok, err := identityAt(from)
	if err != nil || !ok || !id.Same(own) {
		return false, err
	}
	if err := renameNew(from, to); err != nil {
		return false, err
	}
	if id, ok, err = identityAt(to); err == nil && !(ok && id.Same(own)) {
		return false, renameNew(to, from)
	}
	return true, err
}

// openDir opens a directory without following a symlink.
func openDir(path string, flags int) (*os.File, error) {
	return openFile(path, unix.O_DIRECTORY|unix.O_NOFOLLOW|flags)
}

func identityOf(f *os.File) (records.Identity, error) {
	id, err := diskimg.IdentityOf(f)
	return records.Identity(id), err
}

// identityAt returns the identity of the directory at path; ok is false when
// there is nothing or something else.
func identityAt(path string) (id records.Identity, ok bool, err error) {
	f, err := openDir(path, unix.O_PATH)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return id, false, nil
	}
	if err != nil {
		return id, false, err
	}
	defer f.Close()
	id, err = identityOf(f)
	return id, err == nil, err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// tryFlock takes an exclusive lock on an open file; ok is false when somebody
// else has it. It never waits.
func tryFlock(f *os.File, how int) (ok bool, err error) {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
	}
}

// unlock releases the locks of f, nil for none, and closes it.
func unlock(f *os.File) {
	if f == nil {
		return
	}
	release(f)
	_ = f.Close()
}

// release gives up every lock of an open file. Closing alone would leave them
// with a child that another goroutine is starting just now, until its exec.
func release(f *os.File) {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
	_ = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
}

// lockDir opens and locks a staging or trash directory that must still be at
// its path afterwards; nil means that it is busy or gone.
func lockDir(path string) (*os.File, error) {
	f, err := openDir(path, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil, nil
		}
		return nil, err
	}
	ok, err := tryFlock(f, unix.LOCK_EX)
	if err != nil || !ok || !sameFile(f, path) {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func sameFile(f *os.File, path string) bool {
	var a, b unix.Stat_t
	return unix.Fstat(int(f.Fd()), &a) == nil && unix.Lstat(path, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}
