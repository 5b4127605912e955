package image

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// registryClient reads one repository. Authentication, its challenges and the
// choice between https and http are go-containerregistry's; requests are made
// here, because every body must be bounded and blobs must be resumable.
type registryClient struct {
	repo   name.Repository
	http   *http.Client
	limits limits
}

func dial(ctx context.Context, ref name.Reference, o PullOptions, l limits) (*registryClient, error) {
	repo := ref.Context()
	auth := o.Auth
	if auth == nil {
		a, err := authn.DefaultKeychain.Resolve(repo)
		if err != nil {
			return nil, pullFailed(err, ref, "credentials")
		}
		auth = a
	}
	rt := o.Transport
	if rt == nil {
		t, err := baseTransport(o)
		if err != nil {
			return nil, err
		}
		rt = t
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, rt, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, pullFailed(err, ref, "registry "+repo.RegistryStr())
	}
	return &registryClient{repo: repo, http: &http.Client{Transport: rt}, limits: l}, nil
}

func baseTransport(o PullOptions) (http.RoundTripper, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	if len(o.CACerts) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(o.CACerts) {
			return nil, errdefs.New(errdefs.InvalidArgument, "no PEM certificate among the given certificate authorities")
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	if o.Insecure {
		t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // asked for by the user, for this registry
	}
	return t, nil
}

func (c *registryClient) get(ctx context.Context, kind, id string, header http.Header) (*http.Response, error) {
	u := url.URL{
		Scheme: c.repo.Scheme(), Host: c.repo.RegistryStr(),
		Path: fmt.Sprintf("/v2/%s/%s/%s", c.repo.RepositoryStr(), kind, id),
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header = header
	return c.http.Do(req)
}

// manifest fetches a manifest or index by tag or digest. The digest of what
// came is checked where one was asked for.
func (c *registryClient) manifest(ctx context.Context, id string) ([]byte, error) {
	accept := strings.Join([]string{typeOCIManifest, typeOCIIndex, typeDockerManifest, typeDockerList}, ",")
	resp, err := c.get(ctx, "manifests", id, http.Header{"Accept": {accept}})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := transport.CheckError(resp, http.StatusOK); err != nil {
		return nil, err
	}
	raw, err := readBounded(resp.Body, c.limits.manifest)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", id, err)
	}
	if d, err := parseDigest(id); err == nil && d != digestOf(raw) {
		return nil, badImage("manifest %s: content has digest %s", d, digestOf(raw))
	}
	return raw, nil
}

// blob returns a fetchFunc for a blob, continued with Range requests.
func (c *registryClient) blob(d digest) fetchFunc {
	return func(ctx context.Context, off int64) (io.ReadCloser, int64, error) {
		h := http.Header{}
		if off > 0 {
			h.Set("Range", "bytes="+strconv.FormatInt(off, 10)+"-")
		}
		resp, err := c.get(ctx, "blobs", string(d), h)
		if err != nil {
			return nil, 0, err
		}
		switch resp.StatusCode {
		case http.StatusOK:
			return resp.Body, 0, nil
		case http.StatusPartialContent:
			return resp.Body, rangeStart(resp.Header.Get("Content-Range")), nil
		case http.StatusRequestedRangeNotSatisfiable:
			resp.Body.Close()
			if off > 0 {
				return c.blob(d)(ctx, 0)
			}
			return nil, 0, fmt.Errorf("status %s", resp.Status)
		}
		defer resp.Body.Close()
		return nil, 0, finalIfRefused(resp, transport.CheckError(resp, http.StatusOK))
	}
}

// rangeStart reads "bytes 10-99/100"; -1 if it is nothing like that.
func rangeStart(contentRange string) int64 {
	s, ok := strings.CutPrefix(contentRange, "bytes ")
	first, _, ok2 := strings.Cut(s, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	if !ok || !ok2 || err != nil {
		return -1
	}
	return n
}

// finalIfRefused marks answers that will not get better by asking again.
func finalIfRefused(resp *http.Response, err error) error {
	if resp.StatusCode >= 400 && resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode != http.StatusRequestTimeout {
		return errdefs.Wrap(errdefs.ImagePullFailed, err, "registry refused")
	}
	return err
}

// pullFailed sorts an error of a registry into a kind with a way out.
func pullFailed(err error, ref name.Reference, what string) error {
	var own *errdefs.Error
	if errors.As(err, &own) && own.Kind != errdefs.IO {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return errdefs.Wrap(errdefs.Cancelled, err, "pull %s", shortName(ref.Name()))
	}
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusNotFound:
			return errdefs.Wrap(errdefs.ImageNotFound, err, "image %q not found in its registry", shortName(ref.Name())).
				WithHint("check the name and the tag")
		case http.StatusUnauthorized, http.StatusForbidden:
			return errdefs.Wrap(errdefs.ImagePullFailed, err, "pull %s: registry refused access", shortName(ref.Name())).
				WithHint("check the name; a private image needs credentials in ~/.docker/config.json (docker login %s)", ref.Context().RegistryStr())
		}
	}
	return errdefs.Wrap(errdefs.ImagePullFailed, err, "pull %s: %s", shortName(ref.Name()), what).
		WithHint("check that %s can be reached from here; `msb image load` takes an archive instead", ref.Context().RegistryStr())
}

func digestOf(raw []byte) digest {
	sum := sha256.Sum256(raw)
	return digest("sha256:" + hex.EncodeToString(sum[:]))
}
