package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
)

// Statuses of HTTP (RFC 9110, section 15.5; RFC 6585, section 4). Package
// net/http brings a TLS stack along, which is msb-fetch's.
const (
	statusUnauthorized        = 401
	statusForbidden           = 403
	statusNotFound            = 404
	statusRequestTimeout      = 408
	statusRangeNotSatisfiable = 416
	statusTooManyRequests     = 429
)

// registryClient reads one repository. Every body is bounded here, blobs are
// continued where they broke off.
type registryClient struct {
	fetch.Registry
	limits limits
}

// manifest fetches a manifest or index by tag or digest. The digest of what
// came is checked where one was asked for.
func (c *registryClient) manifest(ctx context.Context, id string) ([]byte, error) {
	accept := strings.Join([]string{typeOCIManifest, typeOCIIndex, typeDockerManifest, typeDockerList}, ",")
	resp, err := c.Get(ctx, fetch.Request{Kind: "manifests", ID: id, Accept: accept})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := readBounded(resp.Body, c.limits.manifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", id, err)
	}
	if d, err := parseDigest(id); err == nil && d != digestOf(raw) {
		return nil, badImage("manifest %s: content has digest %s", d, digestOf(raw))
	}
	return raw, nil
}

// blob returns a fetchFunc for a blob, continued from an offset.
func (c *registryClient) blob(d digest) fetchFunc {
	return func(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
		resp, err := c.Get(ctx, fetch.Request{Kind: "blobs", ID: string(d), Offset: off})
		if err == nil {
			return resp.Body, resp.Start, nil
		}
		if statusOf(err) == statusRangeNotSatisfiable && off > 0 {
			return c.blob(d)(ctx, 0)
		}
		return nil, 0, finalIfRefused(err)
	}
}

// statusOf is the HTTP status of a registry's answer, 0 without one.
func statusOf(err error) int {
	var e *fetch.Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// finalIfRefused marks answers that will not get better by asking again.
func finalIfRefused(err error) error {
	s := statusOf(err)
	if s >= 400 && s < 500 && s != statusTooManyRequests && s != statusRequestTimeout {
		return errdefs.Wrap(errdefs.ImagePullFailed, err, "registry refused")
	}
	return err
}

// pullFailed sorts an error of a registry into a kind with a way out.
func pullFailed(err error, ref reference, what string) error {
	var own *errdefs.Error
	if errors.As(err, &own) && own.Kind != errdefs.IO {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return errdefs.Wrap(errdefs.Cancelled, err, "pull %s", shortName(ref.name()))
	}
	switch statusOf(err) {
	case statusNotFound:
		return errdefs.Wrap(errdefs.ImageNotFound, err, "image %q not found in its registry", shortName(ref.name())).
			WithHint("check the name and the tag")
	case statusUnauthorized, statusForbidden:
		return errdefs.Wrap(errdefs.ImagePullFailed, err, "pull %s: registry refused access", shortName(ref.name())).
			WithHint("check the name; a private image needs credentials in ~/.docker/config.json (docker login %s)", ref.registry)
	}
	var e *fetch.Error
	if errors.As(err, &e) && e.Stage != "" {
		what = e.Stage
	}
	return errdefs.Wrap(errdefs.ImagePullFailed, err, "pull %s: %s", shortName(ref.name()), what).
		WithHint("check that %s can be reached from here; `msb image load` takes an archive instead", ref.registry)
}

func digestOf(raw []byte) digest {
	sum := sha256.Sum256(raw)
	return digest("sha256:" + hex.EncodeToString(sum[:]))
}
