package microsandbox

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
)

// emptyLayout makes an OCI layout with one image without layers.
func emptyLayout(t *testing.T) string {
	t.Helper()
	c, err := empty.Image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Config.Cmd, c.Config.User = "linux", runtime.GOARCH, []string{"sh"}, "7:8"
	img, err := mutate.ConfigFile(empty.Image, c)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = l.AppendImage(img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestImageFactory(t *testing.T) {
	t.Setenv(home.EnvVar, t.TempDir())
	ctx := context.Background()
	if imgs, err := Image.List(ctx); err != nil || len(imgs) != 0 {
		t.Errorf("List() of a new home = %v, %v", imgs, err)
	}
	_, err := Image.Get(ctx, "absent")
	if !IsKind(err, ErrImageNotFound) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get(absent) = %v", err)
	}
	imgs, err := Image.Load(ctx, emptyLayout(t), "app", "app:v2")
	if err != nil || len(imgs) != 2 {
		t.Fatalf("Load() = %v, %v", imgs, err)
	}
	h, err := Image.Get(ctx, "app")
	if err != nil {
		t.Fatal(err)
	}
	if h.Reference() != "app:latest" || !strings.HasPrefix(h.ManifestDigest(), "sha256:") || h.OS() != "linux" ||
		h.Architecture() != runtime.GOARCH || h.LayerCount() != 0 || *h.SizeBytes() == 0 || time.Since(h.CreatedAt()) > time.Minute || h.LastUsedAt().Before(h.CreatedAt()) {
		t.Errorf("handle %+v", h.img)
	}
	d, err := h.Inspect(ctx)
	if err != nil || d.Config.User != "7:8" || len(d.Config.Cmd) != 1 || len(d.Layers) != 0 || d.Config.Digest == "" {
		t.Errorf("Inspect() = %+v, %v", d, err)
	}
	out := filepath.Join(t.TempDir(), "app.tar")
	if err := Image.Save(ctx, []string{"app"}, out, ImageArchiveOCI); err != nil {
		t.Error(err)
	}
	if err := Image.Save(ctx, []string{"app"}, out, ImageArchiveDocker); !IsKind(err, ErrUnsupportedOperation) {
		t.Errorf("Save(docker) = %v", err)
	}
	if err := h.Remove(ctx, false); err != nil {
		t.Error(err)
	}
	rep, err := Image.Prune(ctx)
	if err != nil || rep.ImageRefsRemoved != 1 || *rep.BytesReclaimed == 0 {
		t.Errorf("Prune() = %+v, %v", rep, err)
	}
}

// An image that a sandbox uses is kept, whatever the sandbox's state.
func TestImageInUse(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(home.EnvVar, dir)
	ctx := context.Background()
	imgs, err := Image.Load(ctx, emptyLayout(t), "app")
	if err != nil {
		t.Fatal(err)
	}
	db, err := records.Open(ctx, home.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	cfg, err := json.Marshal(supervisor.Config{Name: "web", Image: "app", Digest: imgs[0].ManifestDigest()})
	if err != nil {
		t.Fatal(err)
	}
	for id, c := range map[string][]byte{"01J00000000000000000000001": cfg, "01J00000000000000000000002": nil} {
		rec := &records.Sandbox{ID: id, Name: "web" + id[25:], Status: "stopped", Image: "app", Config: c, CreatedAt: time.Now(), UpdatedAt: time.Now()}
		if err := db.InsertSandbox(ctx, rec); err != nil {
			t.Fatal(err)
		}
	}
	err = Image.Remove(ctx, "app", false)
	if !IsKind(err, ErrImageInUse) || !strings.Contains(err.Error(), "web1") || !strings.Contains(err.Error(), "web2") {
		t.Errorf("Remove() = %v, want ErrImageInUse naming web1 and web2", err)
	}
	if rep, err := Image.Prune(ctx); err != nil || rep.ImageRefsRemoved != 0 || rep.FsmetaRemoved != 0 {
		t.Errorf("Prune() = %+v, %v", rep, err)
	}
	if err := Image.Remove(ctx, "app", true); err != nil {
		t.Error(err)
	}
}
