package volumefs

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ChunkSize is the length of every chunk that ReadStream.Recv returns but the
// last one.
const ChunkSize = 64 << 10

// smallRead is what Read allocates without asking how much memory there is.
const smallRead = 64 << 20

// Read returns the content of a file. A file that does not fit into half of
// the machine's memory is refused: a sparse one can be of any size.
func (f *FS) Read(ctx context.Context, path string) ([]byte, error) {
	rel, err := f.begin(ctx, "read", path)
	if err != nil {
		return nil, err
	}
	b, err := f.read(ctx, rel)
	if err := f.end("read", path, err); err != nil {
		return nil, err
	}
	return b, nil
}

func (f *FS) read(ctx context.Context, rel string) ([]byte, error) {
	fd, st, err := f.openFile(rel)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readAll(ctx, st.Size, func(p []byte) (int, error) { return unix.Read(fd, p) })
}

// readAll reads to the end what is expected to be size bytes; read returns 0
// there.
func readAll(ctx context.Context, size int64, read func([]byte) (int, error)) ([]byte, error) {
	if err := checkMemory(size); err != nil {
		return nil, err
	}
	b := make([]byte, 0, size+1) // one more, so that the end is seen without growing
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		free := b[len(b):cap(b)]
		n, err := read(free[:min(len(free), smallRead)])
		switch {
		case err == unix.EINTR:
			continue
		case err == io.EOF, err == nil && n == 0:
			return b, nil
		case err != nil:
			return nil, err
		}
		b = b[:len(b)+n]
		if len(b) == cap(b) { // the file has grown meanwhile
			if err := checkMemory(2 * int64(cap(b))); err != nil {
				return nil, err
			}
			b = append(b, 0)[:len(b)]
		}
	}
}

func checkMemory(size int64) error {
	if size <= smallRead {
		return nil
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	if total := uint64(info.Totalram) * uint64(info.Unit); uint64(size) > total/2 {
		return &refusal{text: fmt.Sprintf("file of %d bytes is too large to be read into memory", size),
			errno: unix.EFBIG, hint: "read it as a stream"}
	}
	return nil
}

// openFile opens the regular file that a clean path leads to, for reading.
func (f *FS) openFile(rel string) (int, unix.Stat_t, error) {
	n, err := f.target(rel)
	if err != nil {
		return -1, unix.Stat_t{}, err
	}
	defer n.close()
	if err := regular(&n.st, n.ov); err != nil {
		return -1, unix.Stat_t{}, err
	}
	fd, err := f.reopen(n.fd, unix.O_RDONLY)
	return fd, n.st, err
}

// regular refuses what is not a file with content, to the guest or to the host.
func regular(st *unix.Stat_t, ov overlay) error {
	for _, mode := range []uint32{st.Mode, ov.mode} {
		what := ""
		switch mode & unix.S_IFMT {
		case unix.S_IFDIR:
			return errIsDir
		case unix.S_IFIFO:
			what = "FIFO"
		case unix.S_IFSOCK:
			what = "socket"
		case unix.S_IFCHR, unix.S_IFBLK:
			what = "device"
		case unix.S_IFLNK:
			what = "link"
		}
		if what != "" {
			return &refusal{text: "is a " + what + ", not a file", errno: unix.EOPNOTSUPP}
		}
		if !ov.set {
			break
		}
	}
	return nil
}

// ReadStream is an open file being read. It is not safe for concurrent use.
type ReadStream struct {
	fs   *FS
	path string
	file *os.File // nil once closed
	eof  bool
}

// OpenRead opens a file for reading in pieces. The stream goes on reading the
// file it opened, whatever takes its name, until the volume is removed.
func (f *FS) OpenRead(ctx context.Context, path string) (*ReadStream, error) {
	rel, err := f.begin(ctx, "read", path)
	if err != nil {
		return nil, err
	}
	fd, _, err := f.openFile(rel)
	if err := f.end("read", path, err); err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	return &ReadStream{fs: f, path: path, file: os.NewFile(uintptr(fd), path)}, nil
}

// Recv returns the next ChunkSize bytes, fewer only at the end, and nil, nil
// after it. The slice is the caller's.
func (r *ReadStream) Recv(ctx context.Context) ([]byte, error) {
	if err := r.ready(ctx); err != nil || r.eof {
		return nil, err
	}
	b := make([]byte, ChunkSize)
	n, err := io.ReadFull(r.file, b)
	switch err {
	case io.EOF, io.ErrUnexpectedEOF:
		r.eof, err = true, nil
	}
	if err := r.fs.end("read", r.path, err); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, nil
	}
	return b[:n:n], nil
}

// Collect returns the rest of the file.
func (r *ReadStream) Collect(ctx context.Context) ([]byte, error) {
	if err := r.ready(ctx); err != nil {
		return nil, err
	}
	b, err := r.rest(ctx)
	r.eof = err == nil
	if err := r.fs.end("read", r.path, err); err != nil {
		return nil, err
	}
	return b, nil
}

func (r *ReadStream) rest(ctx context.Context) ([]byte, error) {
	st, err := r.file.Stat()
	if err != nil {
		return nil, err
	}
	pos, err := r.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	return readAll(ctx, max(0, st.Size()-pos), r.file.Read)
}

// Read is io.Reader.
func (r *ReadStream) Read(p []byte) (int, error) {
	if err := r.ready(context.Background()); err != nil {
		return 0, err
	}
	n, err := r.file.Read(p)
	if err == io.EOF {
		if err := r.fs.end("read", r.path, nil); err != nil {
			return 0, err
		}
		return n, io.EOF
	}
	return n, r.fs.end("read", r.path, err)
}

// WriteTo is io.WriterTo: the kernel moves the bytes where w is a file, a pipe
// or a socket.
func (r *ReadStream) WriteTo(w io.Writer) (int64, error) {
	if err := r.ready(context.Background()); err != nil {
		return 0, err
	}
	var n int64
	var err error
	if _, ok := w.(io.ReaderFrom); ok {
		n, err = io.Copy(w, r.file)
	} else {
		n, err = io.CopyBuffer(w, onlyReader{r.file}, make([]byte, 1<<20))
	}
	return n, r.fs.end("read", r.path, err)
}

// Close releases the file. It may be called again.
func (r *ReadStream) Close() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	return err
}

func (r *ReadStream) ready(ctx context.Context) error {
	if r.file == nil {
		return r.fs.fault("read", r.path, os.ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return r.fs.fault("read", r.path, err)
	}
	return nil
}

// onlyReader hides every other method of a reader.
type onlyReader struct{ io.Reader }
