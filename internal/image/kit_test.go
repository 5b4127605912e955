package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

func newStore(t testing.TB) *Store {
	t.Helper()
	return New(home.Dir(t.TempDir()), testTools)
}

// testTools start this program as msb-fetch.
var testTools = fetch.Program{Find: os.Executable}

var testTime = time.Unix(1_700_000_000, 123_000_000)

// Entries of a layer. A body is a string; the rest may be changed by the caller.
func dir(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755, ModTime: testTime}
}

func file(name, body string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: testTime, Size: int64(len(body)), Uname: body}
}

func link(name, target string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: testTime}
}

func hard(name, target string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, ModTime: testTime}
}

// layerTar writes headers made by the functions above; Uname carries a file's body.
func layerTar(t testing.TB, entries ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := *e
		body := h.Uname
		h.Uname = ""
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("header %q: %v", h.Name, err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// testImage is an image in memory: its blobs by digest.
type testImage struct {
	manifest []byte
	config   []byte
	blobs    map[digest][]byte
}

func (i *testImage) digest() digest { return digestOf(i.manifest) }

// makeImage makes an image of gzip layers for this host.
func makeImage(t testing.TB, layers ...[]byte) *testImage {
	t.Helper()
	var c configFile
	c.OS, c.Architecture = guestOS, runtime.GOARCH
	c.Config.Env = []string{"PATH=/bin"}
	c.Config.Cmd = []string{"sh"}
	c.Config.WorkingDir = "/srv"
	c.Config.User = "app"
	c.RootFS.Type = "layers"
	return makeImageWith(t, c, layers...)
}

func makeImageWith(t testing.TB, c configFile, layers ...[]byte) *testImage {
	t.Helper()
	im := &testImage{blobs: map[digest][]byte{}}
	doc := document{SchemaVersion: 2, MediaType: typeOCIManifest}
	for _, y := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, string(digestOf(y)))
		packed := gz(t, y)
		im.blobs[digestOf(packed)] = packed
		doc.Layers = append(doc.Layers, descriptor{MediaType: typeOCILayer + "+gzip", Digest: string(digestOf(packed)), Size: int64(len(packed))})
	}
	im.config = mustJSON(t, c)
	im.blobs[digestOf(im.config)] = im.config
	doc.Config = &descriptor{MediaType: typeOCIConfig, Digest: string(digestOf(im.config)), Size: int64(len(im.config))}
	im.manifest = mustJSON(t, doc)
	im.blobs[im.digest()] = im.manifest
	return im
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// layoutFiles returns an OCI layout of named images.
func layoutFiles(t testing.TB, named map[string]*testImage) map[string][]byte {
	t.Helper()
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	index := document{SchemaVersion: 2, MediaType: typeOCIIndex}
	names := make([]string, 0, len(named))
	for name := range named {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		im := named[name]
		for d, b := range im.blobs {
			files["blobs/sha256/"+d.hex()] = b
		}
		m := descriptor{MediaType: typeOCIManifest, Digest: string(im.digest()), Size: int64(len(im.manifest))}
		if name != "" {
			m.Annotations = map[string]string{annotationRefName: name}
		}
		index.Manifests = append(index.Manifests, m)
	}
	files["index.json"] = mustJSON(t, index)
	return files
}

func writeDir(t testing.TB, files map[string][]byte) string {
	t.Helper()
	root := t.TempDir()
	for name, b := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func tarOf(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var hs []*tar.Header
	for name, b := range files {
		hs = append(hs, file(name, string(b)))
	}
	slices.SortFunc(hs, func(a, b *tar.Header) int { return strings.Compare(a.Name, b.Name) })
	return layerTar(t, hs...)
}

// load puts an image into a store through an OCI layout.
func load(t testing.TB, s *Store, name string, im *testImage) (*Image, error) {
	t.Helper()
	imgs, err := s.Load(context.Background(), writeDir(t, layoutFiles(t, map[string]*testImage{name: im})), nil, nil)
	if err != nil {
		return nil, err
	}
	return imgs[0], nil
}

func mustLoad(t testing.TB, s *Store, name string, im *testImage) *Image {
	t.Helper()
	img, err := load(t, s, name, im)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// stream merges layers and returns the tar stream that makes the root image.
func stream(t testing.TB, l limits, layers ...[]byte) ([]byte, error) {
	t.Helper()
	s := newStore(t)
	s.limits = l
	if err := s.ensure(); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	img := &Image{Reference: "test"}
	for i, y := range layers {
		d, err := s.putBytes(ctx, y)
		if err != nil {
			t.Fatal(err)
		}
		img.Layers = append(img.Layers, Layer{BlobDigest: string(d), DiffID: string(d), CompressedSize: int64(len(y)), Position: i})
	}
	b := &rootBuilder{store: s, img: img, rep: newReporter(nil)}
	if err := b.index(ctx); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err := b.emit(ctx, b.tree.plan(len(layers)), &out)
	return out.Bytes(), err
}

// emit writes a plan as a tar stream: parents first, hard links last.
func (b *rootBuilder) emit(ctx context.Context, p *plan, w io.Writer) error {
	tw := tar.NewWriter(w)
	var links []*dentry
	var walk func(d *dentry) error
	walk = func(d *dentry) error {
		if d.ino.first != d {
			links = append(links, d)
		} else if d.ino.typ != typeRegular || d.ino.size == 0 {
			if err := tw.WriteHeader(d.ino.header()); err != nil {
				return err
			}
		}
		for _, c := range d.sorted() {
			if err := walk(c); err != nil {
				return err
			}
		}
		return nil
	}
	if err := walk(b.tree.root); err != nil {
		return err
	}
	err := b.eachFile(ctx, p, func(ino *inode, r io.Reader) error {
		if err := tw.WriteHeader(ino.header()); err != nil {
			return err
		}
		return copyExactly(tw, r, ino.size, make([]byte, 32<<10))
	})
	if err != nil {
		return err
	}
	for _, d := range links {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: d.path(), Linkname: d.ino.first.path(), Format: tar.FormatPAX}); err != nil {
			return err
		}
	}
	return tw.Close()
}

// listing describes a stream: a line for each name but the root, sorted.
func listing(t testing.TB, raw []byte) []string {
	t.Helper()
	var out []string
	r := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(out)
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "./" {
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			out = append(out, h.Name)
		case tar.TypeReg:
			body, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, fmt.Sprintf("%s = %s", h.Name, body))
		case tar.TypeSymlink:
			out = append(out, fmt.Sprintf("%s -> %s", h.Name, h.Linkname))
		case tar.TypeLink:
			out = append(out, fmt.Sprintf("%s == %s", h.Name, h.Linkname))
		default:
			out = append(out, fmt.Sprintf("%s (%c)", h.Name, h.Typeflag))
		}
	}
}

func wantKind(t testing.TB, err error, kind errdefs.Kind) {
	t.Helper()
	if !errdefs.Is(err, kind) {
		t.Errorf("error %v has kind %d, want %d", err, errdefs.KindOf(err), kind)
	}
}

// header describes the inode under its first name.
func (i *inode) header() *tar.Header {
	t := time.Unix(i.sec, int64(i.nsec))
	h := &tar.Header{
		Name: i.first.path(), Mode: int64(i.mode), Uid: int(i.uid), Gid: int(i.gid),
		ModTime: t, AccessTime: t, ChangeTime: t, Format: tar.FormatPAX,
	}
	switch i.typ {
	case typeRegular:
		h.Typeflag, h.Size = tar.TypeReg, i.size
	case typeDir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case typeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, i.target
	case typeChar, typeBlock:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(i.major), int64(i.minor)
		if i.typ == typeBlock {
			h.Typeflag = tar.TypeBlock
		}
	case typeFIFO:
		h.Typeflag = tar.TypeFifo
	}
	for k, v := range i.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattr+k] = v
	}
	return h
}
