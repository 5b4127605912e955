package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var (
	blobWritten  = failpoint.New("image.blob-written")
	blobFinished = failpoint.New("image.blob-finished")
)

// fetchFunc opens a blob at an offset. A source that cannot seek answers from
// 0: at says where the reader really begins.
type fetchFunc func(ctx context.Context, off int64) (r io.ReadCloser, at int64, err error)

// fetchAttempts is how often a blob is continued after its source broke off.
const fetchAttempts = 5

// putBlob makes the blob with this digest and size present. Whoever comes while
// it is being fetched waits and then finds it; what a killed process fetched is
// checked and continued. report, if not nil, gets the bytes present so far.
//
// After a crash the blob is absent or complete.
func (s *Store) putBlob(ctx context.Context, d digest, size int64, fetch fetchFunc, report func(int64)) error {
	making := s.blobPath(d) + partialSuffix
	f, err := takeMaking(ctx, making, func() bool { return s.hasBlob(d) })
	if err != nil || f == nil {
		if err == nil && report != nil {
			report(size)
		}
		return err
	}
	defer f.Close()
	w := &blobWriter{f: f, want: d, size: size, report: report}
	if err := w.resume(); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "blob %s", d)
	}
	if err := w.fetchAll(ctx, fetch); err != nil {
		if w.off == 0 || errdefs.Is(err, errdefs.InvalidArgument) {
			// Nothing to continue. It is still locked: whoever waits notices.
			_ = os.Remove(making)
		}
		return err
	}
	if err := blobWritten.Hit(); err != nil {
		return err
	}
	if err := finish(f, making, s.blobPath(d)); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "blob %s", d)
	}
	return blobFinished.Hit()
}

func (s *Store) hasBlob(d digest) bool {
	_, err := os.Stat(s.blobPath(d))
	return err == nil
}

// putBytes stores a small blob that is in memory.
func (s *Store) putBytes(ctx context.Context, raw []byte) (digest, error) {
	sum := sha256.Sum256(raw)
	d := digest("sha256:" + hex.EncodeToString(sum[:]))
	return d, s.putBlob(ctx, d, int64(len(raw)), bytesFetch(raw), nil)
}

type blobWriter struct {
	f      *os.File
	want   digest
	size   int64
	off    int64     // bytes in f
	sum    hash.Hash // over those bytes
	report func(int64)
}

// resume hashes what the file already holds.
func (w *blobWriter) resume() error {
	w.off, w.sum = 0, sha256.New()
	fi, err := w.f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() > w.size {
		return w.restart()
	}
	w.off, err = io.Copy(w.sum, w.f)
	return err
}

func (w *blobWriter) restart() error {
	w.off, w.sum = 0, sha256.New()
	if err := w.f.Truncate(0); err != nil {
		return err
	}
	_, err := w.f.Seek(0, io.SeekStart)
	return err
}

// fetchAll fills the file and checks its digest. A mismatch after a resume is
// tried once more from the beginning: the kept part may be of a power cut.
func (w *blobWriter) fetchAll(ctx context.Context, fetch fetchFunc) error {
	resumed := w.off > 0
	for {
		if err := w.fill(ctx, fetch); err != nil {
			return err
		}
		got := "sha256:" + hex.EncodeToString(w.sum.Sum(nil))
		if got == string(w.want) {
			return nil
		}
		if err := w.restart(); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "blob %s", w.want)
		}
		if !resumed {
			return badImage("blob %s: content has digest %s", w.want, got)
		}
		resumed = false
	}
}

func (w *blobWriter) fill(ctx context.Context, fetch fetchFunc) error {
	for attempt := 1; w.off < w.size; attempt++ {
		before := w.off
		err := w.fillOnce(ctx, fetch)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "blob %s", w.want)
		}
		var final *errdefs.Error
		if errors.As(err, &final) {
			return err
		}
		if w.off > before {
			attempt = 1 // it moves
		}
		if attempt >= fetchAttempts {
			return errdefs.Wrap(errdefs.ImagePullFailed, err, "blob %s broke off at byte %d of %d", w.want, w.off, w.size)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(attempt*attempt) * 100 * time.Millisecond):
		}
	}
	return nil
}

// fillOnce copies from one opened source. Errors of the source are plain and
// may be tried again; errors of the store are final.
func (w *blobWriter) fillOnce(ctx context.Context, fetch fetchFunc) error {
	r, at, err := fetch(ctx, w.off)
	if err != nil {
		return err
	}
	defer r.Close()
	if at != w.off {
		if at != 0 {
			return fmt.Errorf("source answers from byte %d instead of %d", at, w.off)
		}
		if err := w.restart(); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "blob %s", w.want)
		}
	}
	buf := make([]byte, 256<<10)
	for w.off < w.size {
		n, err := r.Read(buf[:min(int64(len(buf)), w.size-w.off)])
		if werr := w.add(buf[:n]); werr != nil {
			return errdefs.Wrap(errdefs.IO, werr, "blob %s", w.want)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && w.off < w.size {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

func (w *blobWriter) add(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if _, err := w.f.Write(b); err != nil {
		return err
	}
	w.sum.Write(b)
	w.off += int64(len(b))
	if w.report != nil {
		w.report(w.off)
	}
	return nil
}

func bytesFetch(raw []byte) fetchFunc {
	return func(_ context.Context, off int64) (io.ReadCloser, int64, error) {
		return io.NopCloser(bytes.NewReader(raw[off:])), off, nil
	}
}
