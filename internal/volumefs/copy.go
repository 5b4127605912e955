package volumefs

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// Copy copies a file over another or to a new name, whose missing parents are
// made, to the rules of Write; the new file takes mode, owner and user
// attributes of the source. Blocks are shared where the file system can, holes
// stay holes. Copying a file to itself, by whatever names, is an error that
// changes nothing; so is copying a directory.
func (f *FS) Copy(ctx context.Context, from, to string, o WriteOptions) error {
	relFrom, err := f.begin(ctx, "copy", from)
	if err != nil {
		return err
	}
	relTo, err := f.beginFile(ctx, "copy", to)
	if err != nil {
		return err
	}
	f.replaced.closeAll()
	err = f.copyFile(ctx, relFrom, relTo, o)
	if err != nil {
		err = &pairError{to: to, err: err}
	}
	return f.end("copy", from, err)
}

// pairError names the second path of an operation on two.
type pairError struct {
	to  string
	err error
}

func (e *pairError) Error() string { return fmt.Sprintf("to %q: %v", e.to, e.err) }
func (e *pairError) Unwrap() error { return e.err }

func (f *FS) copyFile(ctx context.Context, from, to string, o WriteOptions) error {
	src, err := f.target(from)
	if err != nil {
		return err
	}
	defer src.close()
	if err := regular(&src.st, src.ov); err != nil {
		return err
	}
	r, err := f.newReplacement(to)
	if err != nil {
		return err
	}
	defer r.close()
	if r.to.exists() && sameFile(&src.st, &r.to.st) {
		return errSame
	}
	fd, err := f.reopen(src.fd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := r.room(src.st.Size); err != nil {
		return err
	}
	if err := copyData(ctx, r.tmp.fd(), fd); err != nil {
		return err
	}
	return r.commit(&metadata{fd: src.fd}, o)
}

func sameFile(a, b *unix.Stat_t) bool { return a.Dev == b.Dev && a.Ino == b.Ino }

// copyStep is how much is copied between two looks at the context.
const copyStep = 16 << 20

// copyData fills an empty file with the content of another.
func copyData(ctx context.Context, dst, src int) error {
	if unix.IoctlFileClone(dst, src) == nil {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	for off := int64(0); off < st.Size; {
		data, hole, err := nextData(src, off, st.Size)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, dst, src, data, hole); err != nil {
			return err
		}
		off = hole
	}
	return unix.Ftruncate(dst, st.Size) // a hole at the end
}

// nextData returns the next stretch of data at or after off; an empty one at
// the end when there is none.
func nextData(fd int, off, size int64) (from, to int64, err error) {
	from, err = unix.Seek(fd, off, unix.SEEK_DATA)
	switch err {
	case nil:
	case unix.ENXIO:
		return size, size, nil
	case unix.EINVAL: // the file system does not know
		return off, size, nil
	default:
		return 0, 0, err
	}
	to, err = unix.Seek(fd, from, unix.SEEK_HOLE)
	if err == unix.ENXIO { // cut short meanwhile
		return size, size, nil
	}
	return from, to, err
}

// copyRange copies the bytes from off to end, in the kernel where it can.
func copyRange(ctx context.Context, dst, src int, off, end int64) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		in, out := off, off
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(min(end-off, copyStep)), 0)
		switch err {
		case nil:
		case unix.EINTR:
			continue
		case unix.EXDEV, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
			n, err = copyByHand(dst, src, off, end)
		}
		if err != nil {
			return err
		}
		if n == 0 { // cut short meanwhile
			return nil
		}
		// The disk starts now: the sync at the end then has little left to wait for.
		_ = unix.SyncFileRange(dst, off, int64(n), unix.SYNC_FILE_RANGE_WRITE)
		off += int64(n)
	}
	return nil
}

func copyByHand(dst, src int, off, end int64) (int, error) {
	b := make([]byte, min(end-off, 1<<20))
	n, err := pread(src, b, off)
	if err != nil {
		return 0, err
	}
	for done := 0; done < n; {
		m, err := unix.Pwrite(dst, b[done:n], off+int64(done))
		if err != nil && err != unix.EINTR {
			return 0, err
		}
		done += max(m, 0)
	}
	return n, nil
}
