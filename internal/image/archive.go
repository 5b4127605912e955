package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// source is an OCI layout or a docker archive as a set of named files.
type source interface {
	// open opens a regular file by its slash-separated name. A missing one
	// is fs.ErrNotExist.
	open(name string) (io.ReadSeekCloser, int64, error)
	Close() error
}

// openSource opens a directory or an archive.
func (s *Store) openSource(ctx context.Context, p string) (source, error) {
	fi, err := os.Stat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.Wrap(errdefs.PathNotFound, err, "load %s", p)
	}
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "load %s", p)
	}
	switch {
	case fi.IsDir():
		r, err := os.OpenRoot(p)
		if err != nil {
			return nil, errdefs.Wrap(errdefs.IO, err, "load %s", p)
		}
		return dirSource{r}, nil
	case fi.Mode().IsRegular():
		return s.openArchive(ctx, p)
	}
	return nil, badImage("load %s: neither a directory nor a regular file", p)
}

// dirSource reads a directory; os.Root keeps symbolic links inside it.
type dirSource struct{ *os.Root }

func (d dirSource) open(name string) (io.ReadSeekCloser, int64, error) {
	f, err := d.Open(name)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = badImage("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// tarSource reads the files of an uncompressed tar archive in place.
type tarSource struct {
	f     *os.File
	files map[string]tarFile
}

// tarFile is a range of the archive, or another name for one.
type tarFile struct {
	off, size int64
	alias     string
}

// maxArchiveFiles bounds the entries of an archive that holds images; layers
// are single entries.
const maxArchiveFiles = 100_000

func (s *Store) openArchive(ctx context.Context, p string) (source, error) {
	f, err := os.Open(p)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "load %s", p)
	}
	plain, err := s.inflate(ctx, f)
	if err != nil {
		f.Close()
		return nil, err
	}
	if plain != f {
		f.Close()
	}
	src, err := scanArchive(plain)
	if err != nil {
		plain.Close()
		return nil, badImage("load %s: %v", p, err)
	}
	return src, nil
}

// inflate returns f itself, or, if it is compressed, an unnamed file with its
// content.
func (s *Store) inflate(ctx context.Context, f *os.File) (*os.File, error) {
	c, err := codecOf(f)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "load %s", f.Name())
	}
	if c == "" {
		return f, nil
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "load %s", f.Name())
	}
	r, err := s.tools.Decompress(ctx, c, f)
	if err != nil {
		return nil, notUnpacked(err, "load "+f.Name())
	}
	defer r.Close()
	tmp, err := os.CreateTemp(s.dir, "load-*")
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image store")
	}
	os.Remove(tmp.Name())
	w := &imageWriter{ctx: ctx, f: tmp, store: s}
	b := &budget{limits: s.limits, compressed: fi.Size()}
	if _, err := io.CopyBuffer(onlyWriter{w}, budgetReader{r, b}, make([]byte, 256<<10)); err != nil {
		tmp.Close()
		if ctx.Err() != nil {
			return nil, errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "load %s", f.Name())
		}
		return nil, notUnpacked(err, "load "+f.Name())
	}
	if err := tmp.Truncate(w.pos); err != nil {
		tmp.Close()
		return nil, errdefs.Wrap(errdefs.IO, err, "image store")
	}
	return tmp, nil
}

// budgetReader counts what is read against a budget.
type budgetReader struct {
	r io.Reader
	b *budget
}

func (r budgetReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if berr := r.b.addBytes(int64(n)); berr != nil {
		return 0, berr
	}
	return n, err
}

// scanArchive notes where the archive's files are.
func scanArchive(f *os.File) (*tarSource, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	t := &tarSource{f: f, files: map[string]tarFile{}}
	r := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		if n >= maxArchiveFiles {
			return nil, tooLarge("archive has more than %d entries", maxArchiveFiles)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch {
		case isSparse(h):
			return nil, badImage("%q is sparse", name)
		case h.Typeflag == tar.TypeReg:
			off, err := f.Seek(0, io.SeekCurrent) // tar reads headers only, without a buffer
			if err != nil {
				return nil, err
			}
			t.files[name] = tarFile{off: off, size: h.Size}
		case h.Typeflag == tar.TypeSymlink: // docker's archives share layers so
			t.files[name] = tarFile{alias: path.Clean("/" + path.Join(path.Dir(name), h.Linkname))[1:]}
		case h.Typeflag == tar.TypeLink:
			t.files[name] = tarFile{alias: path.Clean("/" + h.Linkname)[1:]}
		}
	}
}

func (t *tarSource) open(name string) (io.ReadSeekCloser, int64, error) {
	const maxAliases = 8
	for range maxAliases {
		f, ok := t.files[name]
		if !ok {
			return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		if f.alias == "" {
			return section{io.NewSectionReader(t.f, f.off, f.size)}, f.size, nil
		}
		name = f.alias
	}
	return nil, 0, badImage("%q: too many links in the archive", name)
}

func (t *tarSource) Close() error { return t.f.Close() }

type section struct{ *io.SectionReader }

func (section) Close() error { return nil }

// readSource reads a small file of a source.
func readSource(src source, name string, maxSize int64) ([]byte, error) {
	r, _, err := src.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readBounded(r, maxSize)
}

// localName refuses names that an archive's own documents must not use.
func localName(name string) bool {
	return filepath.IsLocal(name) && !strings.Contains(name, "\\") && len(name) < 4096
}
