package image

import (
	"bytes"
	"context"
	"io"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// imageWriter is the file below the ext4 writer. It leaves zeros beyond the
// written part as holes, looks at the free space while it writes, and ends
// with its context.
type imageWriter struct {
	ctx   context.Context
	f     *os.File
	store *Store
	pos   int64
	end   int64 // highest position asked for
	fresh int64 // bytes written since the free space was looked at
}

// freeEvery is how many bytes may be written between two looks at the free space.
const freeEvery = 16 << 20

var zeros [512 << 10]byte

// reset empties the file.
func (w *imageWriter) reset() error {
	if err := w.f.Truncate(0); err != nil {
		return err
	}
	_, err := w.f.Seek(0, io.SeekStart)
	return err
}

func (w *imageWriter) Read(p []byte) (int, error) {
	n, err := w.f.ReadAt(p, w.pos)
	w.pos += int64(n)
	return n, err
}

func (w *imageWriter) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		w.pos = offset
	case io.SeekCurrent:
		w.pos += offset
	default:
		w.pos = w.end + offset
	}
	return w.pos, nil
}

func (w *imageWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, errdefs.Wrap(errdefs.Cancelled, err, "write root image")
	}
	if w.pos < w.end || !isZero(p) {
		if err := w.room(int64(len(p))); err != nil {
			return 0, err
		}
		if _, err := w.f.WriteAt(p, w.pos); err != nil {
			return 0, err
		}
	}
	w.pos += int64(len(p))
	w.end = max(w.end, w.pos)
	return len(p), nil
}

func (w *imageWriter) room(n int64) error {
	if w.fresh += n; w.fresh < freeEvery {
		return nil
	}
	w.fresh = 0
	free, err := w.store.free(w.store.dir)
	if err != nil {
		return err
	}
	if free < w.store.limits.reserve {
		return noSpace(w.store.dir, w.store.limits.reserve, free)
	}
	return nil
}

// flush gives the file its size, holes at the end included.
func (w *imageWriter) flush() error { return w.f.Truncate(w.end) }

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
