package diskimg

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// FormatOf guesses the format of an image from its extension, as written:
// ".qcow2" and ".vmdk", anything else is "raw". The content is never looked at.
func FormatOf(path string) string {
	switch {
	case strings.HasSuffix(path, ".qcow2"):
		return "qcow2"
	case strings.HasSuffix(path, ".vmdk"):
		return "vmdk"
	}
	return "raw"
}

// Identity is device, inode and birth time (Unix nanoseconds, 0 unknown) of a file.
type Identity struct {
	Dev, Ino uint64
	BirthNS  int64
}

// IdentityOf returns the identity of an open file, which may be O_PATH.
func IdentityOf(f *os.File) (Identity, error) {
	var st unix.Statx_t
	err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return Identity{}, fmt.Errorf("statx %s: %w", f.Name(), err)
	}
	id := Identity{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.BirthNS = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return id, nil
}

// OpenRaw opens a raw image and takes QEMU's image locks on it, shared between
// readers, exclusive for a writer. The last component of path must be a regular
// file, not a symlink; nothing else is ever opened, so a device or a FIFO put
// there has no effect. The locks live as long as the open file: they go over to
// a process that inherits or receives it.
//
// Errors: InvalidConfig, with ErrVolumeInUse as the cause when it is locked;
// PathNotFound; IO.
func OpenRaw(path string, readonly bool) (*os.File, Identity, error) {
	f, err := openRegular(path, readonly)
	if err != nil {
		return nil, Identity{}, err
	}
	id, err := IdentityOf(f)
	if err == nil {
		err = lockImage(f, path, readonly)
	}
	if err != nil {
		_ = f.Close()
		return nil, Identity{}, err
	}
	return f, id, nil
}

func openRegular(path string, readonly bool) (*os.File, error) {
	at, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, errdefs.Wrap(errdefs.PathNotFound, err, "disk image %s", path)
	}
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "disk image %s", path)
	}
	defer unix.Close(at)
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "disk image %s", path)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errdefs.New(errdefs.InvalidConfig, "disk image %s is not a regular file", path)
	}
	flags := unix.O_RDWR
	if readonly {
		flags = unix.O_RDONLY
	}
	// Through the descriptor: the name may mean another file by now.
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", at), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "disk image %s", path)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// QEMU's image locks (block/file-posix.c): a user of the image holds a shared
// lock on byte 100+p for each permission p it uses, and on byte 200+p for each
// permission that it does not allow others.
const (
	lockUses   = 100
	lockDenies = 200

	permRead   = 0 // BLK_PERM_CONSISTENT_READ
	permWrite  = 1 // BLK_PERM_WRITE
	permResize = 3 // BLK_PERM_RESIZE
)

// lockImage takes the locks first and looks for conflicts then, as QEMU does:
// of two that start together at least one sees the other.
func lockImage(f *os.File, path string, readonly bool) error {
	uses, denies := []int64{permRead}, []int64{permWrite, permResize}
	if !readonly {
		uses = append(uses, permWrite, permResize)
	}
	for _, p := range uses {
		if err := lockByte(f, lockUses+p); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "lock disk image %s", path)
		}
	}
	for _, p := range denies {
		if err := lockByte(f, lockDenies+p); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "lock disk image %s", path)
		}
	}
	for _, p := range uses {
		if byteHeld(f, lockDenies+p) {
			return inUse(path)
		}
	}
	for _, p := range denies {
		if byteHeld(f, lockUses+p) {
			return inUse(path)
		}
	}
	return nil
}

func lockByte(f *os.File, off int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Start: off, Len: 1}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
}

func byteHeld(f *os.File, off int64) bool {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk)
	return err == nil && lk.Type != unix.F_UNLCK
}

func inUse(path string) error {
	return errdefs.Wrap(errdefs.InvalidConfig, errdefs.ErrVolumeInUse, "disk image %s is open in another program (one writer or several readers)", path)
}
