package image

import (
	"bytes"
	"context"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// imageWriter writes an empty file from front to back. It leaves zeros as
// holes, looks at the free space while it writes, and ends with its context.
type imageWriter struct {
	ctx   context.Context
	f     *os.File
	store *Store
	pos   int64
	fresh int64 // bytes written since the free space was looked at
}

// freeEvery is how many bytes may be written between two looks at the free space.
const freeEvery = 16 << 20

var zeros [512 << 10]byte

func (w *imageWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, errdefs.Wrap(errdefs.Cancelled, err, "write root image")
	}
	if !isZero(p) {
		if err := w.room(int64(len(p))); err != nil {
			return 0, err
		}
		if n, err := w.f.WriteAt(p, w.pos); err != nil {
			return n, errdefs.Wrap(errdefs.IO, err, "write root image")
		}
	}
	w.pos += int64(len(p))
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

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
