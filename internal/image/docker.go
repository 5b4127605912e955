package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// dockerImage is an entry of a docker archive's manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerCandidates reads a docker archive (docker save). It has no manifest;
// one is made of its configuration and its layers as they are.
func (s *Store) dockerCandidates(ctx context.Context, src source) ([]*candidate, error) {
	raw, err := readSource(src, "manifest.json", s.limits.manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.New(errdefs.InvalidArgument, "neither an OCI layout (index.json) nor a docker archive (manifest.json)")
	}
	if err != nil {
		return nil, err
	}
	var images []dockerImage
	if err := decodeJSON(raw, s.limits.manifest, &images); err != nil {
		return nil, badImage("manifest.json: %v", err)
	}
	if len(images) == 0 {
		return nil, badImage("manifest.json names no image")
	}
	var out []*candidate
	for _, im := range images {
		c, err := s.dockerCandidate(ctx, src, im)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func (s *Store) dockerCandidate(ctx context.Context, src source, im dockerImage) (*candidate, error) {
	if len(im.Layers) > s.limits.layers {
		return nil, tooLarge("image has %d layers, more than %d", len(im.Layers), s.limits.layers)
	}
	where := map[digest]string{}
	doc := &document{SchemaVersion: 2, MediaType: typeOCIManifest}
	cfg, err := describe(ctx, src, im.Config, typeOCIConfig, s.limits.manifest, where)
	if err != nil {
		return nil, err
	}
	doc.Config = &cfg
	for _, name := range im.Layers {
		y, err := describe(ctx, src, name, typeOCILayer, s.limits.unpacked, where)
		if err != nil {
			return nil, err
		}
		doc.Layers = append(doc.Layers, y)
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	c := &candidate{raw: raw, doc: doc, fetch: func(d digest) fetchFunc { return sourceFetch(src, where[d]) }}
	for _, tag := range im.RepoTags {
		if tag, ok := trimRepoTag(tag); ok {
			names, err := canonicalNames([]string{tag})
			if err != nil {
				return nil, err
			}
			c.names = append(c.names, names...)
		}
	}
	return c, nil
}

// describe hashes a file of the archive and notes where its digest is found.
func describe(ctx context.Context, src source, name, mediaType string, maxSize int64, where map[digest]string) (descriptor, error) {
	if !localName(name) {
		return descriptor{}, badImage("name %.80q leads out of the archive", name)
	}
	r, size, err := src.open(name)
	if err != nil {
		return descriptor{}, badImage("%v", err)
	}
	defer r.Close()
	if size > maxSize {
		return descriptor{}, tooLarge("%.80q has %d bytes, more than %d", name, size, maxSize)
	}
	h := sha256.New()
	if _, err := io.Copy(h, ctxReader{ctx, r}); err != nil {
		return descriptor{}, err
	}
	d := digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
	where[d] = name
	return descriptor{MediaType: mediaType, Digest: string(d), Size: size}, nil
}

// ctxReader ends a long copy with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, errdefs.Wrap(errdefs.Cancelled, err, "read archive")
	}
	return c.r.Read(p)
}
