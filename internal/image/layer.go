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

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

var magics = map[fetch.Codec][]byte{
	fetch.Gzip: {0x1f, 0x8b},
	fetch.Zstd: {0x28, 0xb5, 0x2f, 0xfd},
}

// codecOf tells the compression of a file by its first bytes; "" is none.
func codecOf(f *os.File) (fetch.Codec, error) {
	var head [4]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	for c, magic := range magics {
		if bytes.HasPrefix(head[:n], magic) {
			return c, nil
		}
	}
	return "", nil
}

// decompress returns the uncompressed bytes of f, which stays open.
func (s *Store) decompress(ctx context.Context, f *os.File) (io.ReadCloser, error) {
	c, err := codecOf(f)
	if err != nil {
		return nil, err
	}
	if c == "" {
		return io.NopCloser(f), nil
	}
	return s.tools.Decompress(ctx, c, f)
}

// layerReader reads the entries of one layer, within the image's budget.
type layerReader struct {
	*tar.Reader
	ctx    context.Context
	file   *os.File
	data   io.ReadCloser // uncompressed
	budget *budget       // nil: this layer was counted before
	sum    hash.Hash     // of the uncompressed bytes; nil without budget
	failed error         // the first error of Read, which tar wraps
}

// openLayer opens a layer blob. With a budget its bytes are counted and hashed.
func (s *Store) openLayer(ctx context.Context, y Layer, b *budget) (*layerReader, error) {
	f, err := home.OpenFile(s.blobPath(digest(y.BlobDigest)), unix.O_RDONLY)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "layer %s", y.BlobDigest)
	}
	l := &layerReader{ctx: ctx, file: f, budget: b}
	if b != nil {
		l.sum = sha256.New()
	}
	l.data, err = s.decompress(ctx, f)
	if err != nil {
		f.Close()
		return nil, notUnpacked(err, "layer "+y.BlobDigest)
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
	if cerr := l.ctx.Err(); cerr != nil && err != nil {
		l.failed = errdefs.Wrap(errdefs.Cancelled, cerr, "read layer")
		return n, l.failed
	}
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

// read is how many compressed bytes were read.
func (l *layerReader) read() int64 {
	off, _ := l.file.Seek(0, io.SeekCurrent)
	return off
}

// notUnpacked blames the image, unless the error has a kind of its own.
func notUnpacked(err error, what string) error {
	var own *errdefs.Error
	if errors.As(err, &own) {
		return err
	}
	return badImage("%s: %v", what, err)
}
