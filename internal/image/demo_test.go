package image

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// demoLayout is the image of `make demo-image`.
const demoLayout = "../../build/demo-image"

// TestDemoImage loads the Debian image that the demo uses.
func TestDemoImage(t *testing.T) {
	if _, err := os.Stat(filepath.Join(demoLayout, "index.json")); err != nil {
		prereq.Missing(t, "build/demo-image")
	}
	s := New(home.Dir(t.TempDir()), testTools)
	imgs, err := s.Load(context.Background(), demoLayout, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(imgs) != 2 || imgs[0].Reference != "demo:latest" {
		t.Fatalf("Load() = %d images, first %+v", len(imgs), imgs[0])
	}
	fsck(t, imgs[0].RootFS)
	if uid, gid, err := imgs[0].ResolveUser("www-data"); uid != 33 || gid != 33 || err != nil {
		t.Errorf("ResolveUser(www-data) = %d, %d, %v", uid, gid, err)
	}
}

// fsck demands that e2fsck finds nothing at all.
func fsck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command(prereq.Program(t, "e2fsck", "e2fsprogs"), "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck -fn: %v\n%s", err, out)
	}
}
