package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func writeArchive(t testing.TB, raw []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(p, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// dockerFiles is what docker save writes: plain layers, a second name for one
// of them as a symbolic link.
func dockerFiles(t testing.TB, tags ...string) []*tar.Header {
	t.Helper()
	y1, y2 := layerTar(t, file("a", "1")), layerTar(t, file("b", "2"))
	im := makeImage(t, y1, y2, y1)
	manifest := mustJSON(t, []dockerImage{{Config: "abc.json", RepoTags: tags, Layers: []string{"1/layer.tar", "2/layer.tar", "3/layer.tar"}}})
	return []*tar.Header{
		file("abc.json", string(im.config)), file("1/layer.tar", string(y1)), file("2/layer.tar", string(y2)),
		link("3/layer.tar", "../1/layer.tar"), file("manifest.json", string(manifest)), file("repositories", "{}"),
	}
}

func references(imgs []*Image) []string {
	var out []string
	for _, i := range imgs {
		out = append(out, i.Reference)
	}
	slices.Sort(out)
	return out
}

func TestLoad(t *testing.T) {
	one := makeImage(t, layerTar(t, file("a", "1")))
	two := makeImage(t, layerTar(t, file("b", "2")))
	layout := layoutFiles(t, map[string]*testImage{"one": one, "team/two:v2": two, "alias:v1": one})
	unnamed := layoutFiles(t, map[string]*testImage{"": one})
	tests := map[string]struct {
		path string
		tags []string
		want []string
	}{
		"directory":          {writeDir(t, layout), nil, []string{"alias:v1", "one:latest", "team/two:v2"}},
		"tar":                {writeArchive(t, tarOf(t, layout)), nil, []string{"alias:v1", "one:latest", "team/two:v2"}},
		"tar.gz":             {writeArchive(t, gz(t, tarOf(t, layout))), nil, []string{"alias:v1", "one:latest", "team/two:v2"}},
		"tar.zst":            {writeArchive(t, zst(t, tarOf(t, layout))), nil, []string{"alias:v1", "one:latest", "team/two:v2"}},
		"tags":               {writeDir(t, unnamed), []string{"mine", "reg.example:5000/x:1"}, []string{"mine:latest", "reg.example:5000/x:1"}},
		"docker archive":     {writeArchive(t, layerTar(t, dockerFiles(t, "d:v1", "d:v2")...)), nil, []string{"d:v1", "d:v2"}},
		"docker archive, gz": {writeArchive(t, gz(t, layerTar(t, dockerFiles(t, "d:v1")...))), []string{"e"}, []string{"e:latest"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			imgs, err := s.Load(context.Background(), tt.path, tt.tags, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := references(imgs); !slices.Equal(got, tt.want) {
				t.Errorf("loaded %q, want %q", got, tt.want)
			}
			listed, err := s.List(context.Background())
			if err != nil || !slices.Equal(references(listed), tt.want) {
				t.Errorf("listed %q, %v", references(listed), err)
			}
			for _, i := range imgs {
				fsck(t, i.RootFS)
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	one := makeImage(t, layerTar(t, file("a", "1")))
	two := makeImage(t, layerTar(t, file("b", "2")))
	layout := func(change func(files map[string][]byte)) string {
		files := layoutFiles(t, map[string]*testImage{"one": one})
		change(files)
		return writeDir(t, files)
	}
	y := "blobs/sha256/" + layerDigest(t, one, 0).hex()
	escape := writeDir(t, layoutFiles(t, map[string]*testImage{"one": one}))
	if err := os.Remove(filepath.Join(escape, y)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(escape, y)); err != nil {
		t.Fatal(err)
	}
	docker := func(im dockerImage) string {
		return writeArchive(t, layerTar(t, file("manifest.json", string(mustJSON(t, []dockerImage{im})))))
	}
	liar := makeImage(t, layerTar(t, file("a", "1")))
	var c configFile
	if err := decodeJSON(liar.config, 1<<20, &c); err != nil {
		t.Fatal(err)
	}
	c.RootFS.DiffIDs[0] = string(digestOf([]byte("else")))
	liar = relayer(t, liar, mustJSON(t, c))
	tests := map[string]struct {
		path string
		tags []string
		kind errdefs.Kind
		says string
	}{
		"nothing there":     {filepath.Join(t.TempDir(), "no"), nil, errdefs.PathNotFound, "no such file"},
		"a device":          {"/dev/null", nil, errdefs.InvalidArgument, "regular file"},
		"empty directory":   {t.TempDir(), nil, errdefs.InvalidArgument, "neither an OCI layout"},
		"not a tar":         {writeArchive(t, []byte("hello, this is no archive")), nil, errdefs.InvalidArgument, "load"},
		"no name":           {writeDir(t, layoutFiles(t, map[string]*testImage{"": one})), nil, errdefs.InvalidArgument, "has no name"},
		"tags for two":      {writeDir(t, layoutFiles(t, map[string]*testImage{"one": one, "two": two})), []string{"x"}, errdefs.InvalidArgument, "2 images"},
		"bad tag":           {writeDir(t, layoutFiles(t, map[string]*testImage{"": one})), []string{"NO!"}, errdefs.InvalidArgument, "NO!"},
		"layer missing":     {layout(func(f map[string][]byte) { delete(f, y) }), nil, errdefs.InvalidArgument, "no such file"},
		"layer changed":     {layout(func(f map[string][]byte) { f[y] = append([]byte("x"), f[y][1:]...) }), nil, errdefs.InvalidArgument, "content has digest"},
		"layer short":       {layout(func(f map[string][]byte) { f[y] = f[y][:10] }), nil, errdefs.InvalidArgument, "shorter"},
		"manifest changed":  {layout(func(f map[string][]byte) { f["blobs/sha256/"+one.digest().hex()] = two.manifest }), nil, errdefs.InvalidArgument, "content has digest"},
		"index is garbage":  {layout(func(f map[string][]byte) { f["index.json"] = []byte("[]") }), nil, errdefs.InvalidArgument, "manifest"},
		"link leads out":    {escape, nil, errdefs.InvalidArgument, "escapes"},
		"content disagrees": {writeDir(t, layoutFiles(t, map[string]*testImage{"liar": liar})), nil, errdefs.InvalidArgument, "the configuration says"},
		"docker: climbs":    {docker(dockerImage{Config: "../../etc/passwd", RepoTags: []string{"x"}}), nil, errdefs.InvalidArgument, "leads out"},
		"docker: absolute":  {docker(dockerImage{Config: "/etc/passwd", RepoTags: []string{"x"}}), nil, errdefs.InvalidArgument, "leads out"},
		"docker: missing":   {docker(dockerImage{Config: "c.json", RepoTags: []string{"x"}}), nil, errdefs.InvalidArgument, "c.json"},
		"docker: no image":  {writeArchive(t, layerTar(t, file("manifest.json", "[]"))), nil, errdefs.InvalidArgument, "names no image"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Load(context.Background(), tt.path, tt.tags, nil)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("error %v, want one with %q", err, tt.says)
			}
			wantKind(t, err, tt.kind)
			if imgs, err := s.List(context.Background()); err != nil || len(imgs) != 0 {
				t.Errorf("after a refused load: %q, %v", references(imgs), err)
			}
			if left := unfinished(files(t, s)); len(left) > 0 {
				t.Errorf("left over: %q", left)
			}
		})
	}
}

// relayer gives an image another configuration.
func relayer(t testing.TB, im *testImage, config []byte) *testImage {
	t.Helper()
	var doc document
	if err := decodeJSON(im.manifest, 1<<20, &doc); err != nil {
		t.Fatal(err)
	}
	doc.Config = &descriptor{MediaType: typeOCIConfig, Digest: string(digestOf(config)), Size: int64(len(config))}
	out := &testImage{config: config, manifest: mustJSON(t, doc), blobs: map[digest][]byte{}}
	for _, y := range doc.Layers {
		out.blobs[y.digest()] = im.blobs[y.digest()]
	}
	out.blobs[digestOf(config)] = config
	out.blobs[out.digest()] = out.manifest
	return out
}

func TestSave(t *testing.T) {
	s, ctx := newStore(t), context.Background()
	one := mustLoad(t, s, "one:v1", makeImage(t, layerTar(t, file("a", "1"))))
	mustLoad(t, s, "two:v1", makeImage(t, layerTar(t, file("a", "1")), layerTar(t, file("b", "2"))))
	out := filepath.Join(t.TempDir(), "saved.tar")
	if err := s.Save(ctx, []string{"one:v1", "two:v1"}, out); err != nil {
		t.Fatal(err)
	}
	imgs, err := newStore(t).Load(ctx, out, nil, nil)
	if err != nil || !slices.Equal(references(imgs), []string{"one:v1", "two:v1"}) {
		t.Fatalf("loaded %q, %v", references(imgs), err)
	}
	if imgs[0].ManifestDigest != one.ManifestDigest {
		t.Errorf("digest %s became %s", one.ManifestDigest, imgs[0].ManifestDigest)
	}
	err = s.Save(ctx, []string{"three"}, out+".2")
	wantKind(t, err, errdefs.ImageNotFound)
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 1 {
		t.Errorf("files after a refused save: %v, %v", left, err)
	}
}

// TestSaveInto: what is no regular file is written to, never replaced; what a
// link leads to is replaced, the link is not.
func TestSaveInto(t *testing.T) {
	s, ctx, dir := newStore(t), context.Background(), t.TempDir()
	mustLoad(t, s, "one:v1", makeImage(t, layerTar(t, file("a", "1"))))
	fifo, target, link, dangling := filepath.Join(dir, "fifo"), filepath.Join(dir, "target"), filepath.Join(dir, "link"), filepath.Join(dir, "dangling")
	err := errors.Join(unix.Mkfifo(fifo, 0o600), os.WriteFile(target, []byte("old"), 0o600), os.Symlink("target", link), os.Symlink("nowhere", dangling))
	if err != nil {
		t.Fatal(err)
	}
	piped := make(chan []byte)
	go func() {
		b, _ := os.ReadFile(fifo)
		piped <- b
	}()
	if err := errors.Join(s.Save(ctx, []string{"one:v1"}, fifo), s.Save(ctx, []string{"one:v1"}, link)); err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(target)
	if err != nil || len(saved) < 1024 || !bytes.Equal(<-piped, saved) {
		t.Errorf("target has %d bytes, %v", len(saved), err)
	}
	if to, err := os.Readlink(link); err != nil || to != "target" {
		t.Errorf("link leads to %q, %v", to, err)
	}
	for _, bad := range []string{dangling, dir} {
		wantKind(t, s.Save(ctx, []string{"one:v1"}, bad), errdefs.InvalidArgument)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
		t.Errorf("files: %v, %v", left, err)
	}
}
