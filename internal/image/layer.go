package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// maxWindow bounds the memory of a zstd frame; the format's own tools refuse
// more without a flag.
const maxWindow = 128 << 20

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

func isCompressed(head []byte) bool {
	return bytes.HasPrefix(head, gzipMagic) || bytes.HasPrefix(head, zstdMagic)
}

// decompress tells gzip, zstd and plain data apart by their first bytes.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, gzipMagic):
		return gzip.NewReader(br)
	case bytes.HasPrefix(magic, zstdMagic):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// layerReader reads the entries of one layer, within the image's budget.
type layerReader struct {
	*tar.Reader
	ctx    context.Context
	file   *os.File
	data   io.ReadCloser // uncompressed
	budget *budget       // nil: this layer was counted before
	sum    hash.Hash     // of the uncompressed bytes; nil without budget
	read   int64         // compressed bytes read from file
	failed error         // the first error of Read, which tar wraps
}

// openLayer opens a layer blob. With a budget its bytes are counted and hashed.
func (s *Store) openLayer(ctx context.Context, y Layer, b *budget) (*layerReader, error) {
	f, err := os.Open(s.blobPath(digest(y.BlobDigest)))
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "layer %s", y.BlobDigest)
	}
	l := &layerReader{ctx: ctx, file: f, budget: b}
	if b != nil {
		l.sum = sha256.New()
	}
	l.data, err = decompress(countReader{f, &l.read})
	if err != nil {
		f.Close()
		return nil, badImage("layer %s: %v", y.BlobDigest, err)
	}
	l.Reader = tar.NewReader(bufio.NewReaderSize(uncompressed{l}, 64<<10))
	return l, nil
}

func (l *layerReader) Close() {
	l.data.Close()
	l.file.Close()
}

// uncompressed is the byte stream of a layer as its budget and hash see it.
type uncompressed struct{ l *layerReader }

func (u uncompressed) Read(p []byte) (int, error) {
	l := u.l
	if err := l.ctx.Err(); err != nil {
		l.failed = errdefs.Wrap(errdefs.Cancelled, err, "read layer")
		return 0, l.failed
	}
	n, err := l.data.Read(p)
	if l.budget != nil && n > 0 {
		l.sum.Write(p[:n])
		if berr := l.budget.addBytes(int64(n)); berr != nil {
			l.failed = berr
			return 0, berr
		}
	}
	return n, err
}

// each calls fn for every entry in order, then checks the digest of the layer.
func (l *layerReader) each(y Layer, fn func(h *tar.Header, seq int32) error) error {
	for seq := int32(0); ; seq++ {
		h, err := l.Next()
		if errors.Is(err, io.EOF) {
			return l.finish(y)
		}
		if err != nil {
			return l.broken(y, err)
		}
		if l.budget != nil {
			if err := l.count(h); err != nil {
				return err
			}
		}
		if err := fn(h, seq); err != nil {
			return err
		}
	}
}

func (l *layerReader) count(h *tar.Header) error {
	if err := l.budget.addEntry(); err != nil {
		return err
	}
	if isSparse(h) {
		return l.budget.addBytes(h.Size) // its holes are in no byte stream
	}
	return nil
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// finish reads what follows the last entry, which the digest covers too.
func (l *layerReader) finish(y Layer) error {
	if l.sum == nil {
		return nil
	}
	if _, err := io.Copy(io.Discard, uncompressed{l}); err != nil {
		return l.broken(y, err)
	}
	if got := "sha256:" + hex.EncodeToString(l.sum.Sum(nil)); got != y.DiffID {
		return badImage("layer %s: uncompressed content has digest %s, the configuration says %s", y.BlobDigest, got, y.DiffID)
	}
	return nil
}

func (l *layerReader) broken(y Layer, err error) error {
	if l.failed != nil {
		return l.failed
	}
	return badImage("layer %s: %v", y.BlobDigest, err)
}

type countReader struct {
	r io.Reader
	n *int64
}

func (c countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += int64(n)
	return n, err
}
