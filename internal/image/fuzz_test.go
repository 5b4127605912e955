package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
)

// fuzzLimits keep one input quick.
func fuzzLimits() limits {
	l := defaultLimits
	l.entries, l.unpacked, l.ratioFloor, l.meta = 2000, 1<<20, 1<<20, 1<<20
	return l
}

// FuzzLayer: a stranger made the archive. Merging it may refuse it; it may not
// panic, and what it accepts must be a tree that has every name once, parents
// first, no way out, and that the ext4 writer takes.
func FuzzLayer(f *testing.F) {
	for _, y := range []layer{
		{file("a", "1"), dir("d"), link("l", "d"), file("l/x", "2"), hard("h", "l/x")},
		{file("../x", ""), file("/abs", ""), file("a/../b", "")},
		{link("a", "b"), link("b", "a"), file("a/b/c", "")},
		{file(".wh.", ""), file(".wh..wh..opq", ""), file(".wh.a", ""), file("d/.wh..", "")},
		{file("a", "1"), file("a", "2"), dir("a"), file("a/b", "3"), file("a", "4")},
		{link("lost+found", "x"), file("proc", "x"), link("tmp", "/nowhere")},
		{{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3}, {Typeflag: tar.TypeFifo, Name: "p"}},
		{file(strings.Repeat("x/", 1000)+"x", "")},
		{{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{paxXattr + "user.a": "v", paxXattr + aclAccess: acl()}}},
	} {
		f.Add(layerTar(f, y...), layerTar(f, file("d/.wh.x", ""), file("a", "9")))
	}
	f.Add(gz(f, layerTar(f, file("a", "1"))), []byte{0x28, 0xb5, 0x2f, 0xfd, 0})
	store := newStore(f)
	store.limits = fuzzLimits()
	if err := store.ensure(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		ctx := context.Background()
		img := &Image{Reference: "fuzz", ManifestDigest: string(digestOf(lower))}
		for i, raw := range [][]byte{lower, upper} {
			d := digestOf(raw)
			p := store.blobPath(d)
			if err := os.WriteFile(p, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			defer os.Remove(p)
			img.Layers = append(img.Layers, Layer{BlobDigest: string(d), DiffID: diffOf(raw), CompressedSize: int64(len(raw)), Position: i})
		}
		out, err := os.Create(filepath.Join(store.dir, "fuzz.ext4"))
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(out.Name())
		defer out.Close()
		b := &rootBuilder{store: store, img: img, rep: newReporter(nil), out: out}
		if err := b.index(ctx); err != nil {
			return
		}
		b.tree.addMountPoints()
		var raw bytes.Buffer
		plan := b.tree.plan(len(img.Layers))
		if err := b.emit(ctx, plan, &raw); err != nil {
			t.Fatalf("accepted, then: %v", err)
		}
		checkStream(t, raw.Bytes())
		if d := b.tree.root.children["lost+found"]; d != nil && !d.isDir() {
			return // refused
		}
		m, err := b.layout(plan)
		if err != nil {
			t.Fatalf("the ext4 writer refuses what was accepted: %v", err)
		}
		if err := b.writeExt4(ctx, plan, m); err != nil {
			t.Fatal(err)
		}
	})
}

// diffOf is the digest of the uncompressed bytes, as far as they can be read.
func diffOf(raw []byte) string {
	var r io.Reader = bytes.NewReader(raw)
	for c, magic := range magics {
		if bytes.HasPrefix(raw, magic) {
			z, err := fetcher.InProcess{}.Decompress(context.Background(), c, r)
			if err != nil {
				return string(digestOf(nil))
			}
			defer z.Close()
			r = z
		}
	}
	b, _ := io.ReadAll(io.LimitReader(r, 2<<20))
	return string(digestOf(b))
}

// checkStream demands what a file system relies on.
func checkStream(t *testing.T, raw []byte) {
	t.Helper()
	seen := map[string]byte{".": tar.TypeDir}
	r := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		name := path.Clean(h.Name)
		if name != "." {
			if _, ok := seen[name]; ok {
				t.Fatalf("%q comes twice", name)
			}
		}
		if !filepath.IsLocal(name) {
			t.Fatalf("%q leads out", name)
		}
		if typ, ok := seen[path.Dir(name)]; !ok || typ != tar.TypeDir {
			t.Fatalf("%q comes before its directory", name)
		}
		if h.Typeflag == tar.TypeLink {
			if typ, ok := seen[path.Clean(h.Linkname)]; !ok || typ == tar.TypeDir {
				t.Fatalf("%q links to %q, which is not there", name, h.Linkname)
			}
		}
		seen[name] = h.Typeflag
	}
}

// FuzzManifest: a registry or an archive sent these bytes. What is accepted has
// only checked digests and sizes, and fits its configuration.
func FuzzManifest(f *testing.F) {
	im := makeImage(f, []byte("x"))
	f.Add(im.manifest, im.config)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x","size":1}]}`), []byte(`{}`))
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:`+strings.Repeat("a", 64)+`","size":-1}}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		doc, err := parseDocument(manifest, defaultLimits)
		if err != nil {
			return
		}
		all := append([]descriptor{}, doc.Layers...)
		if doc.isIndex() {
			if one, err := doc.choose(); err == nil {
				all = append(all, one)
			}
		} else {
			all = append(all, *doc.Config)
			if c, err := parseConfig(config, len(doc.Layers), defaultLimits); err == nil && len(c.RootFS.DiffIDs) != len(doc.Layers) {
				t.Fatal("configuration and manifest disagree")
			}
		}
		for _, d := range all {
			if !doc.isIndex() && len(d.digest().hex()) != 64 || strings.ContainsAny(d.digest().hex(), "/.") || d.Size < 0 {
				t.Fatalf("descriptor %+v", d)
			}
		}
	})
}

// FuzzArchive: a stranger made the archive that is loaded.
func FuzzArchive(f *testing.F) {
	f.Add(layerTar(f, dockerFiles(f, "d:v1")...))
	f.Add(tarOf(f, layoutFiles(f, map[string]*testImage{"a": makeImage(f, layerTar(f, file("a", "1")))})))
	f.Add(layerTar(f, link("index.json", "index.json"), hard("manifest.json", "manifest.json")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s := newStore(t)
		s.limits = fuzzLimits()
		imgs, err := s.Load(context.Background(), writeArchive(t, raw), nil, nil)
		if err != nil {
			return
		}
		for _, i := range imgs {
			if _, err := s.Get(context.Background(), i.Reference); err != nil {
				t.Fatal(err)
			}
		}
	})
}
