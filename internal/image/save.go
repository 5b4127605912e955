package image

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Save writes images into a tar archive with an OCI layout. A regular file is
// complete or as it was; a pipe or a device is written to.
//
// Errors: ImageNotFound, InvalidArgument, IO, Cancelled.
func (s *Store) Save(ctx context.Context, references []string, out string) error {
	if len(references) == 0 {
		return errdefs.New(errdefs.InvalidArgument, "save: no image named")
	}
	var imgs []*Image
	for _, ref := range references {
		img, err := s.Get(ctx, ref)
		if err != nil {
			return err
		}
		imgs = append(imgs, img)
	}
	release, err := s.Hold(ctx) // keeps the collector away
	if err != nil {
		return err
	}
	defer release()
	err = saveTo(out, func(w io.Writer) error { return s.writeLayout(ctx, w, imgs) })
	if err != nil {
		return failedAs("save", errdefs.IO, err, out)
	}
	return nil
}

// saveTo writes a regular file at once or not at all, the one that a symbolic
// link leads to included. Into a pipe or a device it just writes.
func saveTo(out string, write func(io.Writer) error) error {
	fi, err := os.Stat(out)
	switch {
	case err == nil && fi.IsDir():
		return errdefs.New(errdefs.InvalidArgument, "save: %s is a directory", out).WithHint("name a file in it")
	case err == nil && !fi.Mode().IsRegular():
		f, err := os.OpenFile(out, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(write(f), f.Close())
	case err == nil:
		if out, err = filepath.EvalSymlinks(out); err != nil {
			return err
		}
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(out); err == nil {
			return errdefs.New(errdefs.InvalidArgument, "save: %s is a symbolic link to nothing", out)
		}
	default:
		return err
	}
	return replaceFile(out, write)
}

// replaceFile writes a file without a name where the file system can, so that a
// kill leaves nothing, and names it when it is complete.
func replaceFile(out string, write func(io.Writer) error) error {
	dir := filepath.Dir(out)
	named, err := os.CreateTemp(dir, ".msb-save-*")
	if err != nil {
		return err
	}
	name := named.Name()
	defer os.Remove(name)
	f := named
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err == nil {
		named.Close()
		os.Remove(name)
		f = os.NewFile(uintptr(fd), name)
	}
	defer f.Close()
	if err := write(f); err != nil {
		return err
	}
	if f != named {
		if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW); err != nil {
			return err
		}
	}
	return finish(f, name, out)
}

func (s *Store) writeLayout(ctx context.Context, w io.Writer, imgs []*Image) error {
	bw := bufio.NewWriterSize(w, 256<<10)
	tw := tar.NewWriter(bw)
	index := document{SchemaVersion: 2, MediaType: typeOCIIndex}
	written := map[digest]bool{}
	for _, img := range imgs {
		m, err := s.writeImage(ctx, tw, img, written)
		if err != nil {
			return err
		}
		index.Manifests = append(index.Manifests, m)
	}
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	err = errors.Join(writeSmall(tw, "oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)), writeSmall(tw, "index.json", raw))
	return errors.Join(err, tw.Close(), bw.Flush())
}

func writeSmall(tw *tar.Writer, name string, body []byte) error {
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(body)), Mode: 0o644}); err != nil {
		return err
	}
	_, err := tw.Write(body)
	return err
}

// writeImage writes the blobs of an image that are not in the archive yet, and
// returns the entry of the index.
func (s *Store) writeImage(ctx context.Context, tw *tar.Writer, img *Image, written map[digest]bool) (descriptor, error) {
	raw, err := s.readBlob(digest(img.ManifestDigest))
	if err != nil {
		return descriptor{}, err
	}
	var head document
	if err := decodeJSON(raw, s.limits.manifest, &head); err != nil {
		return descriptor{}, err
	}
	m := descriptor{
		MediaType: head.MediaType, Digest: img.ManifestDigest, Size: int64(len(raw)),
		Annotations: map[string]string{annotationContainerd: img.Reference, annotationRefName: img.Reference},
	}
	if m.MediaType == "" {
		m.MediaType = typeOCIManifest
	}
	all := []digest{digest(img.ManifestDigest), digest(img.ConfigDigest)}
	for _, y := range img.Layers {
		all = append(all, digest(y.BlobDigest))
	}
	for _, d := range all {
		if written[d] {
			continue
		}
		written[d] = true
		if err := s.writeBlob(ctx, tw, d); err != nil {
			return descriptor{}, err
		}
	}
	return m, nil
}

func (s *Store) writeBlob(ctx context.Context, tw *tar.Writer, d digest) error {
	f, err := home.OpenFile(s.blobPath(d), unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "blobs/sha256/" + d.hex(), Size: fi.Size(), Mode: 0o644}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(tw, ctxReader{ctx, f})
	return err
}
