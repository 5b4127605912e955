package image

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Environment of the child that is killed: the home and the layout to load.
const (
	crashHome   = "MSB_TEST_IMAGE_HOME"
	crashLayout = "MSB_TEST_IMAGE_LAYOUT"
)

// TestMain is msb-fetch, too, which the stores of the tests start.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fetch.Process {
		os.Exit(fetcher.Main(os.Args[2:]))
	}
	if h := os.Getenv(crashHome); h != "" {
		os.Exit(crashChild(h, os.Getenv(crashLayout)))
	}
	os.Exit(m.Run())
}

func crashChild(h, layout string) int {
	if failpoint.ArmFromEnv() != nil {
		return 3
	}
	if _, err := New(home.Dir(h), testTools).Load(context.Background(), layout, nil, nil); err != nil {
		return 4
	}
	return 0
}

// A load that is killed between any two durable steps leaves the image absent
// or complete, and the next load mends what is left.
func TestCrash(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	layout := writeDir(t, layoutFiles(t, map[string]*testImage{"c:v1": makeImage(t, layerTar(t, file("a", "1")), layerTar(t, file("b", "2")))}))
	points := 0
	for _, point := range failpoint.Names() {
		if !strings.HasPrefix(point, "image.") {
			continue
		}
		points++
		t.Run(point, func(t *testing.T) {
			h := home.Dir(t.TempDir())
			cmd := exec.Command(exe)
			cmd.Env = append(os.Environ(), crashHome+"="+string(h), crashLayout+"="+layout, failpoint.EnvVar+"="+point+"=kill")
			var exit *exec.ExitError
			err := cmd.Run()
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("the child was not killed at %s: %v", point, err)
			}
			s, ctx := New(h, testTools), context.Background()
			if img, err := s.Get(ctx, "c:v1"); err == nil {
				fsck(t, img.RootFS)
			} else if !errdefs.Is(err, errdefs.ImageNotFound) {
				t.Errorf("half an image: %v", err)
			}
			imgs, err := s.Load(ctx, layout, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			fsck(t, imgs[0].RootFS)
			if left := unfinished(files(t, s)); len(left) > 0 {
				t.Errorf("left over: %q", left)
			}
			if err := s.Remove(ctx, "c:v1", false); err != nil {
				t.Fatal(err)
			}
			if left := files(t, s); len(left) > 0 {
				t.Errorf("left over after removal: %q", left)
			}
		})
	}
	if points == 0 {
		t.Error("the package declares no points")
	}
}

func unfinished(names []string) []string {
	var out []string
	for _, n := range names {
		if strings.HasSuffix(n, partialSuffix) || strings.HasSuffix(n, buildingSuffix) || strings.HasSuffix(n, ".new") {
			out = append(out, n)
		}
	}
	return out
}
