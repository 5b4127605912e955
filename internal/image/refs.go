package image

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

var indexWritten = failpoint.New("image.index-written")

// refsVersion is the version of index.json. Newer ones are refused.
const refsVersion = 1

// maxRefs bounds index.json, maxIndex its bytes.
const (
	maxRefs  = 100_000
	maxIndex = 64 << 20
)

// refs is index.json: which references there are. All else is derived from
// the blobs, so that nothing can disagree with them.
type refs struct {
	Version int      `json:"version"`
	Images  []refRow `json:"images"`
}

type refRow struct {
	Reference string    `json:"reference"` // canonical: registry, repository, tag or digest
	Manifest  digest    `json:"manifest"`
	CreatedAt time.Time `json:"created_at"`
}

func (r *refs) find(canonical string) *refRow {
	for i := range r.Images {
		if r.Images[i].Reference == canonical {
			return &r.Images[i]
		}
	}
	return nil
}

// readRefs reads the index without a lock: it is replaced as a whole.
func (s *Store) readRefs() (*refs, error) {
	f, err := home.OpenFile(s.indexPath(), unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return &refs{Version: refsVersion}, nil
	}
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image index")
	}
	defer f.Close()
	raw, err := readBounded(f, maxIndex)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image index")
	}
	var r refs
	if err := decodeJSON(raw, maxIndex, &r); err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image index %s is damaged", s.indexPath()).
			WithHint("move it away, then pull or load the images again")
	}
	if r.Version > refsVersion {
		return nil, errdefs.New(errdefs.UnsupportedOperation, "image index %s has version %d, newer than %d", s.indexPath(), r.Version, refsVersion).
			WithHint("use the msb that wrote it")
	}
	for _, row := range r.Images {
		if _, err := parseDigest(string(row.Manifest)); err != nil {
			return nil, errdefs.Wrap(errdefs.IO, err, "image index %s", s.indexPath())
		}
	}
	return &r, nil
}

// updateRefs changes the index under its lock. change may refuse.
func (s *Store) updateRefs(ctx context.Context, change func(*refs) error) error {
	lock, err := lockPath(ctx, s.indexLock(), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer lock.Close()
	r, err := s.readRefs()
	if err != nil {
		return err
	}
	if err := change(r); err != nil {
		return err
	}
	if len(r.Images) > maxRefs {
		return tooLarge("more than %d image references", maxRefs)
	}
	r.Version = refsVersion
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := writeFile(s.indexPath(), raw); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "image index")
	}
	return indexWritten.Hit()
}

// setRef points references at a manifest whose blobs are all present.
func (s *Store) setRefs(ctx context.Context, canonical []string, manifest digest) error {
	now := time.Now().UTC()
	return s.updateRefs(ctx, func(r *refs) error {
		for _, c := range canonical {
			row := refRow{Reference: c, Manifest: manifest, CreatedAt: now}
			if have := r.find(c); have == nil {
				r.Images = append(r.Images, row)
			} else if have.Manifest != manifest {
				*have = row
			}
		}
		return nil
	})
}

// Get returns the image of a reference, or of a manifest digest. It reads only.
//
// Errors: ImageNotFound, InvalidArgument.
func (s *Store) Get(_ context.Context, ref string) (*Image, error) {
	r, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	row, err := r.match(ref)
	if err != nil {
		return nil, err
	}
	return s.open(*row)
}

func (r *refs) match(ref string) (*refRow, error) {
	if d, err := parseDigest(ref); err == nil {
		for i := range r.Images {
			if r.Images[i].Manifest == d {
				return &r.Images[i], nil
			}
		}
		return nil, notFound(ref)
	}
	parsed, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	if row := r.find(parsed.name()); row != nil {
		return row, nil
	}
	return nil, notFound(ref)
}

func notFound(ref string) error {
	return errdefs.New(errdefs.ImageNotFound, "image %q not found", ref).
		WithHint("see `msb image ls`; `msb image pull %s` fetches it", ref)
}

// List returns all images, newest first, ties by reference. One whose blobs
// were damaged is listed with its reference and digest only.
func (s *Store) List(_ context.Context) ([]*Image, error) {
	r, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	out := make([]*Image, 0, len(r.Images))
	for _, row := range r.Images {
		img, err := s.open(row)
		if err != nil {
			img = &Image{Reference: shortName(row.Reference), ManifestDigest: string(row.Manifest), CreatedAt: row.CreatedAt, LastUsedAt: row.CreatedAt}
		}
		out = append(out, img)
	}
	slices.SortFunc(out, func(a, b *Image) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Reference, b.Reference)
	})
	return out, nil
}

// open derives an image from the blobs of its manifest.
func (s *Store) open(row refRow) (*Image, error) {
	img, err := s.openManifest(row.Manifest)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "image %s is damaged", shortName(row.Reference)).
			WithHint("remove it with `msb image rm %s` and pull or load it again", shortName(row.Reference))
	}
	img.Reference = shortName(row.Reference)
	img.CreatedAt, img.LastUsedAt = row.CreatedAt, row.CreatedAt
	s.attachRoot(img)
	return img, nil
}

func (s *Store) openManifest(d digest) (*Image, error) {
	raw, err := s.readBlob(d)
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(raw, s.limits)
	if err != nil {
		return nil, err
	}
	if doc.isIndex() {
		return nil, badImage("%s is an index, not a manifest", d)
	}
	raw, err = s.readBlob(doc.Config.digest())
	if err != nil {
		return nil, err
	}
	cfg, err := parseConfig(raw, len(doc.Layers), s.limits)
	if err != nil {
		return nil, err
	}
	img := &Image{
		ManifestDigest: string(d), ConfigDigest: doc.Config.Digest,
		Architecture: cfg.Architecture, OS: cfg.OS, Config: cfg.public(), SizeBytes: doc.Config.Size,
	}
	for i, y := range doc.Layers {
		img.SizeBytes += y.Size
		img.Layers = append(img.Layers, Layer{
			DiffID: cfg.RootFS.DiffIDs[i], BlobDigest: y.Digest, MediaType: y.MediaType,
			CompressedSize: y.Size, Position: i,
		})
	}
	return img, nil
}
