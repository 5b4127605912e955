package main

import (
	"context"
	"io"
	"log"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// TestTypicalFlow runs the example against a registry on loopback that serves
// the demo image under the name python.
func TestTypicalFlow(t *testing.T) {
	vmtest.Home(t)
	ctx := context.Background()
	if err := run(ctx, serveImage(t)); err != nil {
		t.Fatal(err)
	}
	h, err := microsandbox.GetVolume(ctx, "pip-cache")
	if err != nil {
		t.Fatal(err)
	}
	got, err := h.FS().ReadString(ctx, "/wheels/requests.whl")
	if err != nil || got != "wheel\n" {
		t.Errorf("what the guest wrote = %q, %v", got, err)
	}
	if page, err := microsandbox.ListSandboxes(ctx); err != nil || len(page.Sandboxes) != 0 {
		t.Errorf("sandboxes left: %v, %v", page, err)
	}
}

// serveImage starts a registry and returns a reference to the image in it.
func serveImage(t *testing.T) string {
	t.Helper()
	seed := vmtest.Seed(t)
	idx, err := layout.ImageIndexFromPath(filepath.Join(filepath.Dir(string(seed)), "demo-image"))
	if err != nil {
		prereq.Missing(t, "the demo image's OCI layout: %v", err)
	}
	m, err := idx.IndexManifest()
	if err != nil || len(m.Manifests) == 0 {
		t.Fatalf("demo image: %v", err)
	}
	img, err := idx.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	ref, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://") + "/python")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}
