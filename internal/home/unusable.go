package home

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Unusable is the error of a home that could not be made, with the way out
// where there is one.
func (d Dir) Unusable(err error) error {
	var typed *errdefs.Error
	if errors.As(err, &typed) {
		return err
	}
	e := errdefs.Wrap(errdefs.IO, err, "make the home %s", d)
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return e.WithHint("set %s to a directory that you may write to", EnvVar)
	case errors.Is(err, unix.ENOTDIR):
		return e.WithHint("a file is where a directory must be: move it away, or set %s to another directory", EnvVar)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return e.WithHint("free some space, or set %s to a directory on another disk", EnvVar)
	}
	return e
}
