package image

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Annotations that carry a reference in an OCI layout.
const (
	annotationRefName    = "org.opencontainers.image.ref.name"
	annotationContainerd = "io.containerd.image.name"
)

// candidate is an image of an archive: its manifest, where its blobs come
// from, and the references the archive gives it.
type candidate struct {
	raw   []byte
	doc   *document
	fetch func(digest) fetchFunc
	names []string
}

// Load reads images from an OCI layout (a directory or a tar archive) or from
// a docker archive; archives may be compressed with gzip or zstd. tags, if
// given, replace the names in the archive, which must then hold one image.
//
// After a crash, or when it fails, every reference is as it was before or as
// the archive says; the images of one archive are named one after the other.
//
// Errors: PathNotFound, InvalidArgument (not an image, no name, a limit), IO,
// Cancelled.
func (s *Store) Load(ctx context.Context, path string, tags []string, progress func(Progress)) ([]*Image, error) {
	wanted, err := canonicalNames(tags)
	if err != nil {
		return nil, err
	}
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	src, err := s.openSource(ctx, path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	found, err := s.candidates(ctx, src)
	if err != nil {
		return nil, loadFailed(err, path)
	}
	if err := nameCandidates(found, wanted, path); err != nil {
		return nil, err
	}
	var out []*Image
	rep := newReporter(progress)
	for _, c := range found {
		imgs, err := s.loadOne(ctx, c, rep, progress)
		if err != nil {
			return out, loadFailed(err, path)
		}
		out = append(out, imgs...)
	}
	return out, nil
}

// loadFailed adds the archive's path to an error that lacks it.
func loadFailed(err error, path string) error {
	return failedAs("load", errdefs.InvalidArgument, err, path)
}

// failedAs keeps the kind and the hint of err; one without a kind gets kind.
func failedAs(op string, kind errdefs.Kind, err error, path string) error {
	var own *errdefs.Error
	if errors.As(err, &own) {
		return errdefs.Wrap(own.Kind, err, "%s %s", op, path).WithHint("%s", own.Hint)
	}
	return errdefs.Wrap(kind, err, "%s %s", op, path)
}

func canonicalNames(tags []string) ([]string, error) {
	var out []string
	for _, t := range tags {
		r, err := parseReference(t)
		if err != nil {
			return nil, err
		}
		out = append(out, r.name())
	}
	return out, nil
}

// nameCandidates gives the wanted names to the one image of the archive, or
// checks that every image has one of its own.
func nameCandidates(found []*candidate, wanted []string, path string) error {
	if len(wanted) > 0 {
		if len(found) != 1 {
			return errdefs.New(errdefs.InvalidArgument, "load %s: %d images in it, tags name one", path, len(found)).
				WithHint("load it without tags")
		}
		found[0].names = wanted
		return nil
	}
	for _, c := range found {
		if len(c.names) == 0 {
			return errdefs.New(errdefs.InvalidArgument, "load %s: image %s has no name", path, digestOf(c.raw)).
				WithHint("give it one with --tag NAME")
		}
	}
	return nil
}

func (s *Store) loadOne(ctx context.Context, c *candidate, rep *reporter, progress func(Progress)) ([]*Image, error) {
	if err := s.fetchImage(ctx, c.doc, c.fetch, PhaseLoad, rep); err != nil {
		return nil, err
	}
	manifest, err := s.putBytes(ctx, c.raw)
	if err != nil {
		return nil, err
	}
	if _, err := s.commit(ctx, manifest, c.names, progress); err != nil {
		return nil, err
	}
	var out []*Image
	for _, n := range c.names {
		img, err := s.Get(ctx, n)
		if err != nil {
			return nil, err
		}
		out = append(out, img)
	}
	return out, nil
}

// candidates finds the images that this host can run.
func (s *Store) candidates(ctx context.Context, src source) ([]*candidate, error) {
	raw, err := readSource(src, "index.json", s.limits.manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return s.dockerCandidates(ctx, src)
	}
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(raw, s.limits)
	if err != nil {
		return nil, err
	}
	if !doc.isIndex() {
		return nil, badImage("index.json names no manifest")
	}
	return s.layoutCandidates(src, doc)
}

// layoutCandidates reads an OCI layout. Entries that share a manifest are one
// image with several names.
func (s *Store) layoutCandidates(src source, index *document) ([]*candidate, error) {
	const maxImages = 1000
	if len(index.Manifests) > maxImages {
		return nil, tooLarge("index.json names more than %d manifests", maxImages)
	}
	var out []*candidate
	byDigest := map[digest]*candidate{}
	entries := index.Manifests
	if one, err := index.choose(); err == nil && onlyVariants(index.Manifests) {
		entries = []descriptor{one} // the layout of one image for several platforms
	}
	for _, m := range entries {
		names, err := annotatedNames(m.Annotations)
		if err != nil {
			return nil, err
		}
		raw, doc, err := s.layoutManifest(src, m)
		if err != nil {
			return nil, err
		}
		c := byDigest[digestOf(raw)]
		if c == nil {
			c = &candidate{raw: raw, doc: doc, fetch: func(d digest) fetchFunc { return sourceFetch(src, "blobs/sha256/"+d.hex()) }}
			byDigest[digestOf(raw)] = c
			out = append(out, c)
		}
		c.names = append(c.names, names...)
	}
	return out, nil
}

// onlyVariants says whether all entries are one unnamed image for several platforms.
func onlyVariants(ms []descriptor) bool {
	for _, m := range ms {
		if m.Platform == nil || len(m.Annotations[annotationRefName])+len(m.Annotations[annotationContainerd]) > 0 {
			return false
		}
	}
	return len(ms) > 1
}

// annotatedNames returns the canonical references that annotations carry.
func annotatedNames(a map[string]string) ([]string, error) {
	for _, key := range []string{annotationContainerd, annotationRefName} {
		if a[key] != "" {
			return canonicalNames([]string{a[key]})
		}
	}
	return nil, nil
}

// layoutManifest follows an index of a layout to the manifest for this host.
func (s *Store) layoutManifest(src source, m descriptor) ([]byte, *document, error) {
	for range 3 {
		raw, err := readSource(src, "blobs/sha256/"+m.digest().hex(), s.limits.manifest)
		if err != nil {
			return nil, nil, err
		}
		if digestOf(raw) != m.digest() {
			return nil, nil, badImage("manifest %s: content has digest %s", m.Digest, digestOf(raw))
		}
		doc, err := parseDocument(raw, s.limits)
		if err != nil || !doc.isIndex() {
			return raw, doc, err
		}
		if m, err = doc.choose(); err != nil {
			return nil, nil, err
		}
	}
	return nil, nil, badImage("indexes nested too deep")
}

func sourceFetch(src source, name string) fetchFunc {
	return func(_ context.Context, off int64) (io.ReadCloser, int64, error) {
		if !localName(name) {
			return nil, 0, badImage("name %.80q leads out of the archive", name)
		}
		r, size, err := src.open(name)
		if err != nil {
			return nil, 0, badImage("%v", err)
		}
		if off > size {
			off = 0
		}
		if _, err := r.Seek(off, io.SeekStart); err != nil {
			r.Close()
			return nil, 0, err
		}
		return &onceReader{ReadCloser: r}, off, nil
	}
}

// onceReader makes a short file a final error: asking again would not help.
type onceReader struct{ io.ReadCloser }

func (o *onceReader) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		err = badImage("blob is shorter than its descriptor says")
	}
	return n, err
}

// trimRepoTag drops what docker writes for images without a name.
func trimRepoTag(tag string) (string, bool) {
	return tag, tag != "" && !strings.Contains(tag, "<none>")
}
