package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestResolveUser(t *testing.T) {
	img := &Image{Reference: "x", meta: &rootMeta{
		Passwd: "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken:x:abc:1::\napp:x:1000:1001:::\nnoshell:x:5:6\n",
		Group:  "root:x:0:\napp:x:1001:\nwheel:x:10:app\nbad:x:y:\n",
	}}
	tests := map[string]struct {
		uid, gid uint32
		fails    bool
	}{
		"": {}, "root": {}, "0": {}, "app": {uid: 1000, gid: 1001}, "1000": {uid: 1000, gid: 1001}, "4242": {uid: 4242},
		"noshell": {uid: 5, gid: 6}, "app:wheel": {uid: 1000, gid: 10}, "app:77": {uid: 1000, gid: 77}, "4:5": {uid: 4, gid: 5}, ":wheel": {gid: 10}, "app:": {uid: 1000, gid: 1001},
		"nobody": {fails: true}, "broken": {fails: true}, "app:nobody": {fails: true}, "app:bad": {fails: true}, "-1": {fails: true}, "4294967295": {fails: true}, "4294967296": {fails: true},
	}
	for spec, want := range tests {
		uid, gid, err := img.ResolveUser(spec)
		if (err != nil) != want.fails || uid != want.uid || gid != want.gid {
			t.Errorf("ResolveUser(%q) = %d, %d, %v; want %+v", spec, uid, gid, err, want)
		}
		if err != nil {
			wantKind(t, err, errdefs.InvalidConfig)
		}
	}
	if uid, gid, err := (&Image{}).ResolveUser("12"); uid != 12 || gid != 0 || err != nil {
		t.Errorf("without a passwd file: %d, %d, %v", uid, gid, err)
	}
}

// files lists the store's files without the locks.
func files(t testing.TB, s *Store) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(s.dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasSuffix(p, ".lock") && filepath.Base(p) != "index.json" {
			rel, _ := filepath.Rel(s.dir, p)
			out = append(out, rel)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

func TestRemove(t *testing.T) {
	s, ctx := newStore(t), context.Background()
	shared := layerTar(t, file("shared", "1"))
	one := makeImage(t, shared)
	img := mustLoad(t, s, "one:v1", one)
	only := files(t, s)
	mustLoad(t, s, "two:v1", makeImage(t, shared, layerTar(t, file("b", "2"))))
	mustLoad(t, s, "alias:v1", one)

	wantKind(t, s.Remove(ctx, "nope", false), errdefs.ImageNotFound)
	wantKind(t, s.Remove(ctx, "NOPE!", false), errdefs.InvalidArgument)
	if err := s.Remove(ctx, "two:v1", false); err != nil {
		t.Fatal(err)
	}
	if got := files(t, s); !slices.Equal(got, only) {
		t.Errorf("files %q, want %q", got, only)
	}

	s.Users = func(d string) []string {
		if d == img.ManifestDigest {
			return []string{"sb1", "sb2"}
		}
		return nil
	}
	if err := s.Remove(ctx, "alias:v1", false); err != nil {
		t.Errorf("another name of an image in use: %v", err)
	}
	err := s.Remove(ctx, "one:v1", false)
	wantKind(t, err, errdefs.ImageInUse)
	if err == nil || !strings.Contains(err.Error(), "sb1, sb2") {
		t.Errorf("error %v does not name the sandboxes", err)
	}
	if err := s.Remove(ctx, "one:v1", true); err != nil {
		t.Fatal(err)
	}
	if p, err := s.RootFS(img.ManifestDigest); err != nil || p != img.RootFS {
		t.Errorf("root image of a running sandbox: %q, %v", p, err)
	}
	if len(files(t, s)) != 2 { // the root image and its description
		t.Errorf("files %q", files(t, s))
	}
	s.Users = nil
	if _, err := s.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if got := files(t, s); len(got) != 0 {
		t.Errorf("left over: %q", got)
	}
	_, err = s.RootFS(img.ManifestDigest)
	wantKind(t, err, errdefs.ImageNotFound)
}

func TestPrune(t *testing.T) {
	s, ctx := newStore(t), context.Background()
	if rep, err := s.Prune(ctx); err != nil || rep != (PruneReport{}) {
		t.Errorf("Prune() of nothing = %+v, %v", rep, err)
	}
	used := mustLoad(t, s, "used:v1", makeImage(t, layerTar(t, file("a", "1"))))
	mustLoad(t, s, "idle:v1", makeImage(t, layerTar(t, file("b", "2")), layerTar(t, file("c", "3"))))
	if err := os.WriteFile(s.blobPath(digestOf(nil))+partialSuffix, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Users = func(d string) []string {
		if d == used.ManifestDigest {
			return []string{"sb"}
		}
		return nil
	}
	// While somebody pulls, nothing is collected.
	release, err := s.Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	before := len(files(t, s))
	if _, err := s.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if len(files(t, s)) != before {
		t.Error("files went while a pull was under way")
	}
	release()
	rep, err := s.Prune(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if rep.Manifests != 1 || rep.Layers != 2 || rep.Roots != 1 || rep.Bytes == 0 {
		t.Errorf("Prune() = %+v", rep)
	}
	imgs, err := s.List(ctx)
	if err != nil || !slices.Equal(references(imgs), []string{"used:v1"}) || imgs[0].RootFS == "" {
		t.Errorf("left: %q, %v", references(imgs), err)
	}
}

// An image whose blobs were damaged is listed, can be removed, and says what to do.
func TestDamagedImage(t *testing.T) {
	s, ctx := newStore(t), context.Background()
	img := mustLoad(t, s, "bad:v1", makeImage(t, layerTar(t, file("a", "1"))))
	if err := os.Remove(s.blobPath(digest(img.ConfigDigest))); err != nil {
		t.Fatal(err)
	}
	_, err := s.Get(ctx, "bad:v1")
	wantKind(t, err, errdefs.IO)
	imgs, err := s.List(ctx)
	if err != nil || !slices.Equal(references(imgs), []string{"bad:v1"}) {
		t.Errorf("listed %q, %v", references(imgs), err)
	}
	if err := s.Remove(ctx, "bad:v1", false); err != nil {
		t.Fatal(err)
	}
	if got := files(t, s); len(got) != 0 {
		t.Errorf("left over: %q", got)
	}
}

func TestNewerIndexIsRefused(t *testing.T) {
	s, ctx := newStore(t), context.Background()
	mustLoad(t, s, "a:v1", makeImage(t))
	if err := os.WriteFile(s.indexPath(), []byte(`{"version":2,"images":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := s.List(ctx)
	wantKind(t, err, errdefs.UnsupportedOperation)
	wantKind(t, s.Remove(ctx, "a:v1", true), errdefs.UnsupportedOperation)
}
