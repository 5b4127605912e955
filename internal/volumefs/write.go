package volumefs

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Instants of a whole-file write, for the crash tests.
var (
	filledPoint  = failpoint.New("volumefs.filled")  // the data is synced, nothing has a name in the volume
	replacePoint = failpoint.New("volumefs.replace") // the temporary has a name of its own
	placedPoint  = failpoint.New("volumefs.placed")  // the file has its name
)

// WriteOptions of Write and OpenWrite.
type WriteOptions struct {
	// Durable also syncs the directory: when the call returns, the file is
	// there after a power cut. Without it there is the old file or the new one.
	Durable bool
}

// Write replaces the content of a file, or makes the file and its missing
// parents.
//
// Readers, and a crash at any time, find the old content or the new one. Mode,
// owner and user attributes of the old file are kept, setuid, setgid and
// security.capability are dropped; other names of the old file, and who has it
// open, keep the old content. Last links are followed inside the volume; one
// that leads to nothing gets a file made there. A path that ends with a slash is
// refused. The space of a small file that was replaced may be given back while
// the caller goes on; what the caller does next with f has it.
func (f *FS) Write(ctx context.Context, path string, data []byte, o WriteOptions) error {
	rel, err := f.beginFile(ctx, "write", path)
	if err != nil {
		return err
	}
	return f.end("write", path, f.write(rel, data, o))
}

func (f *FS) write(rel string, data []byte, o WriteOptions) error {
	for {
		before := f.replaced.closed.Load()
		err := f.tryWrite(rel, data, o)
		if !noRoom(err) || !f.replaced.freed(before) {
			return err
		}
	}
}

func (f *FS) tryWrite(rel string, data []byte, o WriteOptions) error {
	r, err := f.newReplacement(rel)
	if err != nil {
		return err
	}
	defer r.close()
	if err := r.room(int64(len(data))); err != nil {
		return err
	}
	if _, err := r.tmp.file.Write(data); err != nil {
		return bare(err)
	}
	return r.commit(r.old(), o)
}

// replacement is a file on its way to its name.
type replacement struct {
	fs    *FS
	to    *spot
	tmp   *temp
	entry *change // the new file's charge, from before it has any content
	size  int64   // that is charged
	done  bool    // the file has its name
}

// newReplacement resolves a clean path and opens a temporary for it. Nothing in
// the volume changes before commit: parents are made there.
func (f *FS) newReplacement(rel string) (*replacement, error) {
	if rel == "" {
		return nil, errIsDir
	}
	s, err := f.find(rel, create)
	if err != nil {
		return nil, err
	}
	if s.exists() {
		err = regular(&s.st, s.ov)
	}
	if err == nil {
		r := &replacement{fs: f, to: s, size: -1}
		if r.entry, err = f.account(); err == nil {
			if r.tmp, err = f.newTemp(s.dir); err == nil {
				return r, nil
			}
			r.entry.close()
		}
	}
	s.close()
	return nil, err
}

// room charges for a content of so many bytes, before it is written.
func (r *replacement) room(size int64) error {
	if r.entry.w == nil || size <= r.size {
		return nil
	}
	var d ledger.Delta
	if r.size < 0 {
		d.Inodes, r.size = 1, 0
	}
	d.Bytes = r.entry.rules.File(size) - r.entry.rules.File(r.size)
	if err := r.entry.grow(d); err != nil {
		if d.Inodes != 0 {
			r.size = -1
		}
		return err
	}
	r.size = size
	return chargedPoint.Hit()
}

// metadata takes over what like has, and charges its attributes.
func (r *replacement) metadata(like *metadata) error {
	if err := r.fs.copyMetadata(like, r.tmp.fd()); err != nil || r.entry.w == nil {
		return err
	}
	return r.entry.grow(ledger.Delta{Bytes: r.entry.rules.Xattrs(ledger.OpenXattrBytes(r.tmp.fd()))})
}

// place gives the file its name in dir and settles what it is charged.
func (r *replacement) place(dir int) error {
	n, err := r.fs.accountName(dir, r.to.name)
	if err != nil {
		return err
	}
	defer n.close()
	if n.fd < 0 {
		if err := n.growName(ledger.Delta{}, dir, r.to.name); err != nil {
			return err
		}
	}
	charge, err := r.entry.content(r.tmp.fd())
	if err == nil {
		err = r.tmp.place(dir, r.to.name, r.to.exists())
	}
	if err != nil {
		return err
	}
	r.done = true
	n.gone()
	r.entry.add(charge)
	if err := n.settle(); err != nil {
		return err
	}
	return r.entry.done()
}

// close releases everything; what was not committed is gone.
func (r *replacement) close() {
	r.tmp.discard()
	r.entry.close()
	if r.done && r.to.exists() && r.to.st.Size <= smallFile {
		r.fs.closeReplaced(r.to.fd, r.to.st.Size)
		r.to.fd = -1
	}
	r.to.close()
}

// old is the file whose metadata the new one takes over, nil if there is none.
func (r *replacement) old() *metadata {
	if !r.to.exists() {
		return nil
	}
	return &metadata{fd: r.to.fd}
}

// commit gives the file the metadata of like (nil: that of a new file), sees to it
// that its data is durable before its name is, and gives it that, and, if that was
// asked for, makes its name and its parents durable.
func (r *replacement) commit(like *metadata, o WriteOptions) error {
	if err := r.room(0); err != nil { // an empty file is one, too
		return err
	}
	if like != nil {
		// The disk can begin meanwhile.
		_ = unix.SyncFileRange(r.tmp.fd(), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
		if err := r.metadata(like); err != nil {
			return err
		}
	}
	if err := r.tmp.sync(); err != nil {
		return err
	}
	if err := filledPoint.Hit(); err != nil {
		return err
	}
	made, err := r.fs.makeDirs(r.to.dir, r.to.missing)
	if err != nil {
		return err
	}
	if err := r.place(made.end()); err != nil {
		made.undo()
		return err
	}
	defer made.close()
	if err := placedPoint.Hit(); err != nil {
		return err
	}
	if o.Durable {
		return made.sync()
	}
	return nil
}

// WriteStream is a file being written. Nothing of it is seen before Close. It
// is not safe for concurrent use.
type WriteStream struct {
	fs     *FS
	ctx    context.Context
	path   string
	opts   WriteOptions
	r      *replacement // nil once closed
	err    error        // the first failure; Close reports it again
	behind int64        // bytes written since writeback was last started
	off    int64
	leaked runtime.Cleanup // takes care of a stream that nobody closed
}

// OpenWrite opens a file for writing in pieces, to the rules of Write. ctx
// bounds the whole stream: when it ends before Close, Close fails and the old
// file stays.
func (f *FS) OpenWrite(ctx context.Context, path string, o WriteOptions) (*WriteStream, error) {
	rel, err := f.beginFile(ctx, "write", path)
	if err != nil {
		return nil, err
	}
	f.replaced.closeAll()
	r, err := f.newReplacement(rel)
	if err := f.end("write", path, err); err != nil {
		if r != nil {
			r.close()
		}
		return nil, err
	}
	w := &WriteStream{fs: f, ctx: ctx, path: path, opts: o, r: r}
	w.leaked = runtime.AddCleanup(w, (*replacement).close, r)
	return w, nil
}

// Write appends p.
func (w *WriteStream) Write(p []byte) (int, error) {
	if err := w.ready(); err != nil {
		return 0, err
	}
	if err := w.r.room(w.off + int64(len(p))); err != nil {
		return 0, w.failed(err)
	}
	n, err := w.r.write(p)
	w.wrote(int64(n))
	return n, w.failed(bare(err))
}

// write writes all of p, where there is room once replaced files are closed.
func (r *replacement) write(p []byte) (n int, err error) {
	for {
		before := r.fs.replaced.closed.Load()
		m, err := r.tmp.file.Write(p[n:])
		n += m
		if !noRoom(err) || !r.fs.replaced.freed(before) {
			return n, err
		}
	}
}

// ReadFrom is io.ReaderFrom: the kernel moves the bytes where src is a file or
// a pipe.
func (w *WriteStream) ReadFrom(src io.Reader) (int64, error) {
	if err := w.ready(); err != nil {
		return 0, err
	}
	var total int64
	for {
		if err := w.r.room(w.off + writeback); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				return total, w.failed(err)
			}
			n, err := io.CopyBuffer(plainWriter{w}, src, make([]byte, 64<<10)) // exactly as much as comes
			return total + n, err
		}
		w.fs.replaced.closeAll() // what comes next cannot be written a second time
		n, err := w.r.tmp.file.ReadFrom(&io.LimitedReader{R: src, N: writeback})
		total += n
		w.wrote(n)
		if err != nil || n < writeback {
			return total, w.failed(bare(err))
		}
		if err := w.ready(); err != nil {
			return total, err
		}
	}
}

// writeback is how much is written before the disk is told to start: the sync
// in Close then has little left to wait for.
const writeback = 8 << 20

func (w *WriteStream) wrote(n int64) {
	w.off += n
	if w.behind += n; w.behind >= writeback {
		_ = unix.SyncFileRange(w.r.tmp.fd(), w.off-w.behind, w.behind, unix.SYNC_FILE_RANGE_WRITE)
		w.behind = 0
	}
}

// Close commits the file and returns the first error of the stream, in which
// case the old file stays. A second Close does nothing.
func (w *WriteStream) Close() error {
	if w.r == nil {
		return nil
	}
	defer w.Abort()
	if err := w.ready(); err != nil {
		return err
	}
	err := w.r.commit(w.r.old(), w.opts)
	return w.failed(w.fs.end("write", w.path, err))
}

// Abort gives the stream up: the old file stays. After Close it does nothing.
func (w *WriteStream) Abort() {
	if w.r != nil {
		w.leaked.Stop()
		w.r.close()
		w.r = nil
	}
}

func (w *WriteStream) ready() error {
	switch {
	case w.err != nil:
		return w.err
	case w.r == nil:
		return w.fs.fault("write", w.path, os.ErrClosed)
	}
	return w.failed(w.ctx.Err())
}

// plainWriter hides every other method of a writer.
type plainWriter struct{ io.Writer }

// failed remembers the first error.
func (w *WriteStream) failed(err error) error {
	if err != nil && w.err == nil {
		w.err = w.fs.fault("write", w.path, err)
		return w.err
	}
	return err
}

// bare takes the file name of a temporary, which means nothing to anybody, out
// of an error.
func bare(err error) error {
	if p, ok := err.(*os.PathError); ok {
		return p.Err
	}
	return err
}
