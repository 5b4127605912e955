package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// PullOptions say how to reach a registry. The zero value is useful: the
// credentials of the user's docker configuration, TLS unless on loopback.
type PullOptions struct {
	// Progress, if not nil, is called often and must return quickly.
	Progress func(Progress)
	// Insecure allows plain http and unverified certificates for this registry.
	Insecure bool
	// Auth replaces the lookup in the user's docker configuration.
	Auth *fetch.Auth
	// CACerts are PEM certificates trusted besides the system's.
	CACerts []byte
	// Force checks every blob that is present and builds the root image again.
	Force bool
}

// Policies of Resolve.
const (
	PullIfMissing = "if-missing"
	PullAlways    = "always"
	PullNever     = "never"
)

// Resolve returns an image that is ready to be a root file system, pulling it
// as policy says ("" is "if-missing"), and notes that it is used.
//
// Errors: ImageNotFound (never, or the registry has none), ImagePullFailed,
// InvalidArgument.
func (s *Store) Resolve(ctx context.Context, ref, policy string, o PullOptions) (*Image, error) {
	switch policy {
	case "", PullIfMissing, PullNever:
		img, err := s.Get(ctx, ref)
		if err == nil {
			return s.prepare(ctx, img, o.Progress)
		}
		if policy == PullNever || !errdefs.Is(err, errdefs.ImageNotFound) {
			return nil, err
		}
		if _, derr := parseDigest(ref); derr == nil {
			return nil, err // a bare digest names no registry
		}
	case PullAlways:
	default:
		return nil, errdefs.New(errdefs.InvalidConfig, "pull policy %q is not always, if-missing or never", policy)
	}
	img, err := s.Pull(ctx, ref, o)
	if err == nil {
		s.touch(img)
	}
	return img, err
}

func (s *Store) prepare(ctx context.Context, img *Image, progress func(Progress)) (*Image, error) {
	if err := s.buildRoot(ctx, img, progress); err != nil {
		return nil, err
	}
	s.touch(img)
	return img, nil
}

// Pull fetches an image for this host's architecture, checks every digest,
// builds its root file system and then names it. Blobs that are there are not
// fetched again, and one that broke off is continued.
//
// After a crash, or when it fails, the reference is as it was before.
//
// Errors: InvalidArgument (reference, or an image that breaks a limit),
// ImageNotFound, ImagePullFailed, IO, Cancelled.
func (s *Store) Pull(ctx context.Context, ref string, o PullOptions) (*Image, error) {
	parsed, err := parseReference(ref)
	if err != nil {
		return nil, err
	}
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	rep := newReporter(o.Progress)
	rep.send(Progress{Phase: PhaseResolve})
	reg, err := s.tools.Dial(ctx, fetch.Access{Reference: parsed.name(), Insecure: o.Insecure, Auth: o.Auth, CACerts: o.CACerts})
	if err != nil {
		return nil, pullFailed(err, parsed, "registry "+parsed.registry)
	}
	defer reg.Close()
	c := &registryClient{reg, s.limits}
	raw, doc, err := c.resolve(ctx, parsed.id)
	if err != nil {
		return nil, pullFailed(err, parsed, "manifest")
	}
	if o.Force {
		if err := s.dropDamaged(ctx, doc, digestOf(raw)); err != nil {
			return nil, err
		}
	}
	if err := s.fetchImage(ctx, doc, c.blob, PhaseDownload, rep); err != nil {
		return nil, pullFailed(err, parsed, "download")
	}
	manifest, err := s.putBytes(ctx, raw)
	if err != nil {
		return nil, err
	}
	return s.commit(ctx, manifest, []string{parsed.name()}, o.Progress)
}

// resolve follows an index to the manifest for this host.
func (c *registryClient) resolve(ctx context.Context, id string) ([]byte, *document, error) {
	for range 3 { // an index of indexes is legal, and no deeper one is in use
		raw, err := c.manifest(ctx, id)
		if err != nil {
			return nil, nil, err
		}
		doc, err := parseDocument(raw, c.limits)
		if err != nil || !doc.isIndex() {
			return raw, doc, err
		}
		m, err := doc.choose()
		if err != nil {
			return nil, nil, err
		}
		id = m.Digest
	}
	return nil, nil, badImage("indexes nested too deep")
}

// fetchImage makes the configuration and all layers of a manifest present, two
// at a time. The configuration comes first: it may refuse the image.
func (s *Store) fetchImage(ctx context.Context, doc *document, fetch func(digest) fetchFunc, phase Phase, rep *reporter) error {
	cfg := doc.Config
	if err := s.putBlob(ctx, cfg.digest(), cfg.Size, fetch(cfg.digest()), nil); err != nil {
		return err
	}
	raw, err := s.readBlob(cfg.digest())
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "configuration")
	}
	if _, err := parseConfig(raw, len(doc.Layers), s.limits); err != nil {
		return err
	}
	if err := s.room(doc); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i, y := range doc.Layers {
		report := rep.layer(phase, y, i+1, len(doc.Layers))
		g.Go(func() error { return s.putBlob(ctx, y.digest(), y.Size, fetch(y.digest()), report) })
	}
	return g.Wait()
}

// dropDamaged removes the blobs of an image whose content is not what their
// names say, and its root image. Open files of running sandboxes stay whole.
func (s *Store) dropDamaged(ctx context.Context, doc *document, manifest digest) error {
	all := append([]descriptor{{Digest: string(manifest)}, *doc.Config}, doc.Layers...)
	for _, d := range all {
		if ok, err := s.checkBlob(ctx, d.digest()); ok || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := os.Remove(s.blobPath(d.digest())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return errdefs.Wrap(errdefs.IO, err, "blob %s", d.Digest)
		}
	}
	if err := os.Remove(s.metaPath(manifest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errdefs.Wrap(errdefs.IO, err, "root image of %s", manifest)
	}
	return nil
}

// checkBlob says whether a blob is present with the right content.
func (s *Store) checkBlob(ctx context.Context, d digest) (bool, error) {
	f, err := home.OpenFile(s.blobPath(d), unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, errdefs.Wrap(errdefs.IO, err, "blob %s", d)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, ctxReader{ctx, f}); err != nil {
		return false, err
	}
	return digest("sha256:"+hex.EncodeToString(h.Sum(nil))) == d, nil
}

// room refuses an image whose missing blobs do not fit, before fetching them.
func (s *Store) room(doc *document) error {
	var need int64
	for _, y := range doc.Layers {
		if !s.hasBlob(y.digest()) {
			need += y.Size
		}
	}
	free, err := s.free(s.dir)
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "free space of %s", s.dir)
	}
	if need > free-s.limits.reserve {
		return noSpace(s.dir, need, free)
	}
	return nil
}

func noSpace(dir string, need, free int64) error {
	return errdefs.Wrap(errdefs.IO, unix.ENOSPC, "image needs %d bytes in %s, %d are free", need, dir, free).
		WithHint("make room, or put the home elsewhere with MSB_HOME; `msb image rm` frees images")
}

// commit builds the root of a manifest whose blobs are present, then names it.
func (s *Store) commit(ctx context.Context, manifest digest, canonical []string, progress func(Progress)) (*Image, error) {
	img, err := s.openManifest(manifest)
	if err != nil {
		return nil, err
	}
	img.Reference = shortName(canonical[0])
	if err := s.buildRoot(ctx, img, progress); err != nil {
		return nil, err
	}
	if err := s.setRefs(ctx, canonical, manifest); err != nil {
		return nil, err
	}
	img, err = s.Get(ctx, canonical[0])
	if err == nil && progress != nil {
		progress(Progress{Phase: PhaseDone, Digest: img.ManifestDigest, Layers: len(img.Layers)})
	}
	return img, err
}
