package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"
)

// ociLayout is the script command "ocilayout DIR REFERENCE [FILE=CONTENT...]":
// it makes an OCI layout with one image of one layer. REFERENCE may be "-".
func ociLayout(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: ocilayout DIR REFERENCE [FILE=CONTENT...]")
	}
	img, err := tinyImage(args[2:])
	ts.Check(err)
	dir, err := layout.Write(ts.MkAbs(args[0]), empty.Index)
	ts.Check(err)
	var opts []layout.Option
	if args[1] != "-" {
		opts = append(opts, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": args[1]}))
	}
	ts.Check(dir.AppendImage(img, opts...))
}

// tinyImage makes an image of files given as NAME=CONTENT.
func tinyImage(files []string) (v1.Image, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		path, content, _ := strings.Cut(f, "=")
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	y, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, y)
	if err != nil {
		return nil, err
	}
	c, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", runtime.GOARCH
	c.Config = v1.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"/bin/hello", "two words"}, WorkingDir: "/srv", User: "app", Labels: map[string]string{"kind": "tiny"}}
	return mutate.ConfigFile(img, c)
}

// loopbackRegistry is the script command "registry": it serves an empty registry
// until the script ends and puts its address into $REGISTRY.
func loopbackRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: registry")
	}
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	ts.Defer(s.Close)
	ts.Setenv("REGISTRY", strings.TrimPrefix(s.URL, "http://"))
}

// pushLayout is the script command "push DIR REFERENCE": it uploads the first
// image of an OCI layout.
func pushLayout(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: push DIR REFERENCE")
	}
	ts.Check(push(ts.MkAbs(args[0]), args[1]))
}

func push(dir, reference string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	if len(manifest.Manifests) == 0 {
		return fmt.Errorf("%s: no image", dir)
	}
	img, err := index.Image(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(reference)
	if err != nil {
		return err
	}
	return remote.Write(ref, img)
}
