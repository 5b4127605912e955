package image

import (
	"net/url"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Defaults of a reference, as docker has them. Docker Hub's registry answers at
// another name than docker.io, by which references are kept.
const (
	defaultRegistry  = "index.docker.io"
	registryAlias    = "docker.io"
	defaultNamespace = "library/"
	defaultTag       = "latest"
)

// Characters and lengths (specification of OCI distribution, "Pulling manifests",
// as lenient as other tools are).
const (
	repositoryChars = "abcdefghijklmnopqrstuvwxyz0123456789_-./"
	tagChars        = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
	maxReference    = 1024
	maxRepository   = 255
	maxTag          = 128
)

// reference is a parsed image reference.
type reference struct {
	registry   string // host[:port]
	repository string
	id         string // tag or digest
	tagged     bool
}

// name is the canonical form: with registry, and tag or digest.
func (r reference) name() string {
	if r.tagged {
		return r.registry + "/" + r.repository + ":" + r.id
	}
	return r.registry + "/" + r.repository + "@" + r.id
}

// parseReference reads a reference as people write it:
// [REGISTRY/]REPOSITORY[:TAG][@DIGEST]. With a digest the tag is dropped.
func parseReference(s string) (reference, error) {
	if len(s) > maxReference {
		return reference{}, errdefs.New(errdefs.InvalidArgument, "image reference has %d bytes, more than %d", len(s), maxReference)
	}
	r, ok := splitReference(s)
	if !ok {
		return reference{}, errdefs.New(errdefs.InvalidArgument, "image reference %q is not valid", s).
			WithHint("write it as [REGISTRY/]REPOSITORY[:TAG|@sha256:DIGEST], in lower case")
	}
	return r, nil
}

func splitReference(s string) (r reference, ok bool) {
	rest, sum, digested := strings.Cut(s, "@")
	r.tagged = !digested
	if digested {
		d, err := parseDigest(sum)
		if err != nil {
			return r, false
		}
		r.id = string(d)
	}
	// A colon before the last slash is that of the registry's port.
	if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexByte(rest, '/') {
		tag := rest[i+1:]
		if !consistsOf(tag, tagChars, maxTag) {
			return r, false
		}
		rest = rest[:i]
		if r.tagged {
			r.id = tag
		}
	}
	if r.id == "" {
		r.id = defaultTag
	}
	r.registry, r.repository = defaultRegistry, rest
	if host, path, ok := strings.Cut(rest, "/"); ok && (host == "localhost" || strings.ContainsAny(host, ".:")) {
		r.registry, r.repository = host, path
	}
	if r.registry == registryAlias {
		r.registry = defaultRegistry
	}
	if r.registry == defaultRegistry && !strings.Contains(r.repository, "/") {
		r.repository = defaultNamespace + r.repository
	}
	u, err := url.Parse("//" + r.registry)
	whole := !strings.Contains("/"+r.repository+"/", "//") // no element is empty
	return r, err == nil && u.Host == r.registry && whole && consistsOf(r.repository, repositoryChars, maxRepository)
}

func consistsOf(s, chars string, most int) bool {
	return s != "" && len(s) <= most && strings.Trim(s, chars) == ""
}

// shortName is a canonical reference without what is the default, as far as it
// then still means the same.
func shortName(canonical string) string {
	path := strings.TrimPrefix(canonical, defaultRegistry+"/")
	for _, short := range []string{strings.TrimPrefix(path, defaultNamespace), path} {
		if r, ok := splitReference(short); ok && r.name() == canonical {
			return short
		}
	}
	return canonical
}
