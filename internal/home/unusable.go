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
	return WithHint(errdefs.Wrap(errdefs.IO, err, "make the home %s", d))
}

// WithHint adds the way out to the error of something that could not be written
// in a home, where there is one.
func WithHint(e *errdefs.Error) *errdefs.Error {
	switch {
	case errors.Is(e, unix.EROFS), errors.Is(e, fs.ErrPermission):
		return e.WithHint("set %s to a directory that you may write to", EnvVar)
	case errors.Is(e, unix.ENOTDIR):
		return e.WithHint("a file is where a directory must be: move it away, or set %s to another directory", EnvVar)
	case errors.Is(e, ErrNotRegular):
		return e.WithHint("move it away")
	case errors.Is(e, unix.ENOSPC), errors.Is(e, unix.EDQUOT):
		return e.WithHint("free some space, or set %s to a directory on another disk", EnvVar)
	}
	return e
}
