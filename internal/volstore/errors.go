package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

const hintNoRoom = "free some space, for example with: msb volume rm NAME"

// wrap turns an error of the file system into the error of this package: which
// operation on which volume. Typed errors pass; they learn the operation.
func (s *Store) wrap(op, name string, err error) error {
	if err == nil {
		return nil
	}
	var typed *errdefs.Error
	if !errors.As(err, &typed) || typed.Op == "" && errors.Is(err, unix.ENOSPC) { // else nobody says which volume
		typed = s.classify(op, name, err)
		err = typed
	}
	if typed.Hint == "" && noRoom(err) {
		typed.Hint = hintNoRoom
		if op == "remove" || op == "prune" {
			typed.Hint = fmt.Sprintf("free some space beside the volumes in the file system of %s, then try again", s.home)
		}
	}
	if typed.Op == "" {
		typed.Op, typed.Volume = op, name
	}
	return err
}

func (s *Store) classify(op, name string, err error) *errdefs.Error {
	what := op + " volume " + quote(name)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return errdefs.Wrap(errdefs.Cancelled, err, "%s", what)
	case noRoom(err):
		return errdefs.Wrap(errdefs.IO, err, "%s: no space left in %s", what, s.home)
	case errors.Is(err, unix.EROFS), errors.Is(err, fs.ErrPermission):
		return s.noAccess(what, err)
	case errors.Is(err, home.ErrNotRegular):
		return errdefs.Wrap(errdefs.Filesystem, err, "%s", what).WithHint("move it away: what belongs there is made anew")
	}
	return errdefs.Wrap(errdefs.IO, err, "%s", what)
}

func quote(name string) string { return `"` + name + `"` }

// inUse is the error of an operation that needs a volume nobody holds.
func inUse(name string, holders []Holder) error {
	if i := slices.IndexFunc(holders, func(h Holder) bool { return h.Task == taskResize }); i >= 0 {
		e := &errdefs.Error{Kind: errdefs.InvalidConfig, Cause: held(fmt.Sprintf("volume %q is being resized by process %d", name, holders[i].PID))}
		return e.WithHint("try again when that is done")
	}
	who := "another process"
	if len(holders) > 0 {
		names := make([]string, len(holders))
		for i, h := range holders {
			names[i] = h.String()
		}
		who = strings.Join(names, ", ")
	}
	e := &errdefs.Error{Kind: errdefs.InvalidConfig, Cause: held(fmt.Sprintf("volume %q is attached by %s", name, who))}
	return e.WithHint("%s", stopHint(holders))
}

// hintCache tells the way out of a refused attachment of a directory volume.
// Directories are shared but for one reason: one side keeps what it has seen for
// good.
func hintCache(err error, kind string, mode AttachMode) error {
	var e *errdefs.Error
	if kind != KindDir || !errors.As(err, &e) || !errors.Is(err, errdefs.ErrVolumeInUse) {
		return err
	}
	if mode == Exclusive {
		_ = e.WithHint("cache=always is for a volume that one sandbox uses: mount it with cache=auto or cache=none")
	} else {
		_ = e.WithHint("cache=always keeps others out: stop that sandbox, or mount the volume there with cache=auto or cache=none")
	}
	return err
}

// held is ErrVolumeInUse in words of its own.
type held string

func (h held) Error() string { return string(h) }
func (h held) Unwrap() error { return errdefs.ErrVolumeInUse }

func alreadyExists(name string) *errdefs.Error {
	return errdefs.New(errdefs.VolumeAlreadyExists, "volume %q already exists", name).
		WithHint("take another name; msb volume inspect %s shows this one", name)
}
