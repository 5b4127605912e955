package volstore

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

const (
	blockSize = 4096
	// inlineLink is the longest symlink target, in bytes, that costs nothing.
	inlineLink = 59
	// overrideAttr marks files that stand in for symlinks and special files;
	// bytes 12..15 of its value are the mode that guests see.
	overrideAttr = "user.msb.override_stat"
)

// UsedBytes returns what a volume holds. For a directory volume it is the sum of
// charges: files by size rounded up to 4 KiB, each inode once, holes included;
// directories by their own size, without the root's first block; symlinks and
// their stand-ins nothing up to 59 bytes and 4 KiB beyond. An empty volume uses
// 0. For a disk volume it is the space that the image takes on the host.
//
// It walks the tree; ctx is looked at in between. Errors: VolumeNotFound,
// Filesystem, Cancelled.
func (s *Store) UsedBytes(ctx context.Context, v *Volume) (uint64, error) {
	dir, err := s.openOwn(v)
	if err != nil {
		return 0, s.wrap("measure", v.Name, err)
	}
	defer dir.Close()
	if v.Kind == KindDisk {
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), "disk.raw", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return 0, s.wrap("measure", v.Name, err)
		}
		return uint64(st.Blocks) * 512, nil
	}
	w := &walk{ctx: ctx, seen: map[uint64]bool{}}
	if err := w.root(dir); err != nil {
		if ctx.Err() == nil {
			err = errdefs.Wrap(errdefs.Filesystem, err, "measure volume %q", v.Name)
		}
		return 0, s.wrap("measure", v.Name, err)
	}
	return w.used, nil
}

// walk sums charges. Directories are kept as descriptors one level at a time:
// the queue holds names, opened relative to their parent while it is open.
type walk struct {
	ctx  context.Context
	seen map[uint64]bool // inodes with several names that were counted
	used uint64
}

func (w *walk) root(at *os.File) error {
	dir, err := reopen(at)
	if err != nil {
		return err
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	w.used += roundUp(st.Size) - min(roundUp(st.Size), blockSize)
	return w.dir(dir)
}

// reopen turns an O_PATH descriptor into one that can be read.
func reopen(at *os.File) (*os.File, error) {
	fd, err := unix.Openat(int(at.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), at.Name()), nil
}

func (w *walk) dir(dir *os.File) error {
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		entries, err := dir.ReadDir(1024)
		for _, e := range entries {
			if err := w.entry(dir, e.Name()); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *walk) entry(dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil // removed while we walk
	}
	if err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		w.used += roundUp(st.Size)
		return w.enter(dir, name)
	case unix.S_IFLNK:
		w.used += linkCharge(st.Size)
		return nil
	case unix.S_IFREG:
	default:
		return nil
	}
	if st.Nlink > 1 {
		if w.seen[st.Ino] {
			return nil
		}
		w.seen[st.Ino] = true
	}
	if st.Size > 0 && st.Size <= blockSize && standsForLink(dir, name) {
		w.used += linkCharge(st.Size)
		return nil
	}
	w.used += roundUp(st.Size)
	return nil
}

func (w *walk) enter(parent *os.File, name string) error {
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	return w.dir(dir)
}

// standsForLink reports whether a file stands in for a symlink. The name is
// reached through the directory's descriptor, which no path inside the volume
// can lead astray.
func standsForLink(dir *os.File, name string) bool {
	var buf [32]byte
	n, err := unix.Lgetxattr(fdPath(dir)+"/"+name, overrideAttr, buf[:])
	return err == nil && n == 20 && binary.LittleEndian.Uint32(buf[12:])&unix.S_IFMT == unix.S_IFLNK
}

func linkCharge(size int64) uint64 {
	if size <= inlineLink {
		return 0
	}
	return blockSize
}

func roundUp(size int64) uint64 {
	return (uint64(size) + blockSize - 1) &^ (blockSize - 1)
}
