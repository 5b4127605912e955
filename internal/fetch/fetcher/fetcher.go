// Package fetcher is [fetch.Tools] within the process: what msb-fetch does.
// Authentication, its challenges and the choice between https and http are
// go-containerregistry's.
package fetcher

import (
	"context"
	"crypto/tls"
	"crypto/x509"
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
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/microsandbox-go/microsandbox/internal/fetch"
)

// InProcess implements [fetch.Tools].
type InProcess struct{}

// Decompress implements [fetch.Tools].
func (InProcess) Decompress(ctx context.Context, c fetch.Codec, r io.Reader) (io.ReadCloser, error) {
	r = ctxReader{ctx, r}
	switch c {
	case fetch.Gzip:
		return gzip.NewReader(r)
	case fetch.Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(fetch.MaxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return nil, fmt.Errorf("unknown compression %q", c)
}

type ctxReader struct {
	ctx context.Context
	io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// Dial implements [fetch.Tools]. It asks the registry how it wants to be asked.
func (InProcess) Dial(ctx context.Context, a fetch.Access) (fetch.Registry, error) {
	var opts []name.Option
	if a.Insecure {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.ParseReference(a.Reference, opts...)
	if err != nil {
		return nil, &fetch.Error{Stage: "reference", Message: err.Error()}
	}
	repo := ref.Context()
	auth, err := authFor(a, repo)
	if err != nil {
		return nil, failed(err, "credentials")
	}
	base, err := baseTransport(a)
	if err != nil {
		return nil, failed(err, "certificates")
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, base, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, failed(err, "registry "+repo.RegistryStr())
	}
	return &registry{repo: repo, http: &http.Client{Transport: rt}}, nil
}

func authFor(a fetch.Access, repo name.Repository) (authn.Authenticator, error) {
	if a.Auth != nil {
		return &authn.Basic{Username: a.Auth.Username, Password: a.Auth.Password}, nil
	}
	return authn.DefaultKeychain.Resolve(repo)
}

func baseTransport(a fetch.Access) (http.RoundTripper, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	if len(a.CACerts) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(a.CACerts) {
			return nil, errors.New("no PEM certificate among the given certificate authorities")
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	if a.Insecure {
		t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // asked for by the user, for this registry
	}
	return t, nil
}

// failed is err as a *fetch.Error, with the status of a registry's answer.
func failed(err error, stage string) error {
	e := &fetch.Error{Stage: stage, Message: err.Error()}
	var te *transport.Error
	if errors.As(err, &te) {
		e.Status = te.StatusCode
	}
	return e
}

// registry makes the requests itself: every body must be bounded by who asks,
// and blobs must be resumable.
type registry struct {
	repo name.Repository
	http *http.Client
}

func (r *registry) Close() error {
	r.http.CloseIdleConnections()
	return nil
}

// Get implements [fetch.Registry].
func (r *registry) Get(ctx context.Context, q fetch.Request) (*fetch.Response, error) {
	u := url.URL{
		Scheme: r.repo.Scheme(), Host: r.repo.RegistryStr(),
		Path: fmt.Sprintf("/v2/%s/%s/%s", r.repo.RepositoryStr(), q.Kind, q.ID),
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if q.Accept != "" {
		req.Header.Set("Accept", q.Accept)
	}
	if q.Offset > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(q.Offset, 10)+"-")
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusOK:
		return &fetch.Response{Body: resp.Body}, nil
	case resp.StatusCode == http.StatusPartialContent && q.Offset > 0:
		return &fetch.Response{Start: rangeStart(resp.Header.Get("Content-Range")), Body: resp.Body}, nil
	}
	defer resp.Body.Close()
	err = transport.CheckError(resp, http.StatusOK)
	return nil, failed(err, "")
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
