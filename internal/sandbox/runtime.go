package sandbox

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/image"
)

// RuntimeEnv names the msb program to use.
const RuntimeEnv = "MSB_PATH"

// FindRuntime returns the path of msb: $MSB_PATH, else msb beside the running
// program, else on PATH, else bin/msb in the home. Its version is checked when
// it is started.
func FindRuntime(h home.Dir) (string, error) {
	if p := os.Getenv(RuntimeEnv); p != "" {
		if err := executable(p); err != nil {
			return "", errdefs.Wrap(errdefs.LibraryNotLoaded, err, "%s=%s", RuntimeEnv, p).
				WithHint("set %s to the msb program of this release, or unset it", RuntimeEnv)
		}
		return filepath.Abs(p)
	}
	if self, err := os.Executable(); err == nil {
		if p := filepath.Join(filepath.Dir(self), "msb"); executable(p) == nil {
			return p, nil
		}
	}
	if p, err := exec.LookPath("msb"); err == nil {
		return filepath.Abs(p)
	}
	if p := filepath.Join(string(h), "bin", "msb"); executable(p) == nil {
		return p, nil
	}
	return "", errdefs.New(errdefs.LibraryNotLoaded, "msb not found: sandboxes and images need it").
		WithHint("build it with make build and set %s, put it on PATH, or copy it to %s", RuntimeEnv, filepath.Join(string(h), "bin", "msb"))
}

// Tools reach what comes from outside: by msb, found when it is needed.
func Tools(h home.Dir) fetch.Tools {
	return fetch.Program{Find: func() (string, error) { return FindRuntime(h) }}
}

// Images is the image store of a home.
func Images(h home.Dir) *image.Store { return image.New(h, Tools(h)) }

func executable(p string) error {
	fi, err := os.Stat(p)
	if err != nil {
		return err
	}
	if fi.IsDir() || fi.Mode().Perm()&0o111 == 0 {
		return &fs.PathError{Op: "exec", Path: p, Err: errors.New("not an executable file")}
	}
	return nil
}
