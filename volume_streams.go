package microsandbox

import (
	"context"
	"io"
	"runtime"

	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// VolumeFsReadStream reads a file in pieces, holding at most one in memory. It
// goes on reading the file it opened, whatever takes that file's name; once the
// volume is removed it fails. It must be closed, and is not safe for concurrent
// use.
type VolumeFsReadStream struct {
	stream *volumefs.ReadStream
	volume *openVolume
	leaked runtime.Cleanup
}

// ReadStream opens a file for reading in chunks of 64 KiB.
func (f *VolumeFs) ReadStream(ctx context.Context, relPath string) (*VolumeFsReadStream, error) {
	v, err := f.open(ctx, "read", relPath)
	if err != nil {
		return nil, err
	}
	s, err := v.fs.OpenRead(ctx, relPath)
	if err != nil {
		v.release(err)
		return nil, toPublic(err)
	}
	r := &VolumeFsReadStream{stream: s, volume: v}
	r.leaked = runtime.AddCleanup(r, func(v *openVolume) { v.release(nil) }, v)
	return r, nil
}

// Recv returns the next 64 KiB, less only at the end of the file, and nil, nil
// after it. The slice is the caller's.
func (r *VolumeFsReadStream) Recv(ctx context.Context) ([]byte, error) {
	b, err := r.stream.Recv(ctx)
	return b, toPublic(err)
}

// Collect returns the rest of the file in one piece.
func (r *VolumeFsReadStream) Collect(ctx context.Context) ([]byte, error) {
	b, err := r.stream.Collect(ctx)
	return b, toPublic(err)
}

// Read is io.Reader.
func (r *VolumeFsReadStream) Read(p []byte) (int, error) {
	n, err := r.stream.Read(p)
	if err == io.EOF {
		return n, err
	}
	return n, toPublic(err)
}

// WriteTo is io.WriterTo.
func (r *VolumeFsReadStream) WriteTo(w io.Writer) (int64, error) {
	n, err := r.stream.WriteTo(w)
	return n, toPublic(err)
}

// Close releases the file. Further calls do nothing.
func (r *VolumeFsReadStream) Close() error {
	if r.volume == nil {
		return nil
	}
	err := r.stream.Close()
	r.leaked.Stop()
	r.volume.release(err)
	r.volume = nil
	return toPublic(err)
}

// VolumeFsWriteSink writes a file in pieces. Nothing of it is seen, and nothing
// stays of it, before Close has returned nil: then it replaces the old file in
// one step, as [VolumeFs.Write] does. It is not safe for concurrent use.
type VolumeFsWriteSink struct {
	stream *volumefs.WriteStream
	volume *openVolume
	leaked runtime.Cleanup
}

// WriteStream opens a file for writing in pieces, making missing parents when
// it is closed. ctx bounds the whole stream: when it ends before Close, Close
// fails and the old file stays.
func (f *VolumeFs) WriteStream(ctx context.Context, relPath string) (*VolumeFsWriteSink, error) {
	v, err := f.open(ctx, "write", relPath)
	if err != nil {
		return nil, err
	}
	s, err := v.fs.OpenWrite(ctx, relPath, f.writeOptions())
	if err != nil {
		v.release(err)
		return nil, toPublic(err)
	}
	w := &VolumeFsWriteSink{stream: s, volume: v}
	w.leaked = runtime.AddCleanup(w, func(v *openVolume) { v.release(nil) }, v)
	return w, nil
}

// Write appends p.
func (w *VolumeFsWriteSink) Write(p []byte) (int, error) {
	n, err := w.stream.Write(p)
	return n, toPublic(err)
}

// WriteCtx appends data unless ctx has ended.
func (w *VolumeFsWriteSink) WriteCtx(ctx context.Context, data []byte) error {
	if err := ctx.Err(); err != nil {
		return toPublic(err)
	}
	_, err := w.Write(data)
	return err
}

// ReadFrom is io.ReaderFrom.
func (w *VolumeFsWriteSink) ReadFrom(r io.Reader) (int64, error) {
	n, err := w.stream.ReadFrom(r)
	return n, toPublic(err)
}

// Close makes the file durable and gives it its name. It returns the first
// error of the stream, in which case the old file stays. Further calls do
// nothing.
func (w *VolumeFsWriteSink) Close() error {
	if w.volume == nil {
		return nil
	}
	err := w.stream.Close()
	w.end(err)
	return toPublic(err)
}

// Abort gives the stream up: the old file stays. After Close it does nothing.
func (w *VolumeFsWriteSink) Abort() {
	if w.volume != nil {
		w.stream.Abort()
		w.end(nil)
	}
}

func (w *VolumeFsWriteSink) end(err error) {
	w.leaked.Stop()
	w.volume.release(err)
	w.volume = nil
}
