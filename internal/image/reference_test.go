package image

import (
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
)

var referenceSeeds = []string{
	"debian", "debian:12", "library/debian", "ann/app", "docker.io/ann/app:v1", "index.docker.io/debian",
	"localhost/app", "localhost:5000/app", "127.0.0.1:5000/a/b:c", "[::1]:5000/app", "ghcr.io/o/p@sha256:" + strings.Repeat("a", 64),
	"o/p:v1@sha256:" + strings.Repeat("0", 64), "a@sha256:short", "a@sha512:" + strings.Repeat("a", 128), "a@b@c",
	"", ":", "@", "/", "a:", ":a", "a/", "/a", "A", "a b", "host.name/", "host.name:x/", "a:b:c", "a:b/c", "x.y:1/z:2", "a//b", "é", "a:é",
	"docker.io/library/", "library/", "library/a/b", "docker.io/a.b/c", "docker.io/", "registry.io:5000", "user@host/app", "%41.b/c", "a.b/c?d", strings.Repeat("a", 256), "a:" + strings.Repeat("t", 129),
}

// TestReferences compares the parser with go-containerregistry's, which asks the
// registry: what both accept has to be the same, and what that refuses is refused.
func TestReferences(t *testing.T) {
	for _, s := range referenceSeeds {
		sameReference(t, s)
	}
}

func FuzzReference(f *testing.F) {
	for _, s := range referenceSeeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) { sameReference(t, s) })
}

func sameReference(t *testing.T, s string) {
	t.Helper()
	ours, err := parseReference(s)
	theirs, theirErr := name.ParseReference(s)
	switch {
	case err == nil && theirErr != nil:
		t.Errorf("%q: accepted as %+v, the other says %v", s, ours, theirErr)
	case err != nil && theirErr == nil:
		// Ours knows no other digest than sha256, no empty elements, and bounds the
		// whole.
		odd := strings.Contains("/"+theirs.Context().RepositoryStr()+"/", "//")
		if !strings.Contains(s, "@") && !odd && len(s) <= maxReference {
			t.Errorf("%q: %v, the other reads %s", s, err, theirs)
		}
	case err == nil:
		if ours.name() != theirs.Name() || ours.id != theirs.Identifier() || ours.registry != theirs.Context().RegistryStr() {
			t.Errorf("%q: %+v is %s; the other has %s", s, ours, ours.name(), theirs.Name())
		}
		if again, err := parseReference(ours.name()); err != nil || again != ours {
			t.Errorf("%q: %s reads as %+v, %v", s, ours.name(), again, err)
		}
		if again, err := parseReference(shortName(ours.name())); err != nil || again != ours {
			t.Errorf("%q: %s reads as %+v, %v", s, shortName(ours.name()), again, err)
		}
	}
}
