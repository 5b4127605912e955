package mount

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// identity tells one file or directory of the running host from all others.
type identity struct{ dev, ino uint64 }

func identityOf(st *unix.Stat_t) identity { return identity{st.Dev, st.Ino} }

// sectorSize is what a virtio-blk device counts in, in bytes.
const sectorSize = 512

// resolveHost makes the source of a bind or disk image mount absolute, follows
// its links, checks what is there and notes its identity.
func resolveHost(s *Spec, protected []protectedDir) error {
	given := s.Source
	real, err := realPath(given)
	if err != nil {
		return hostError(s, given, err)
	}
	if !utf8.ValidString(real) {
		return invalid(s, "host path %q leads to %q, which is not valid UTF-8", given, real)
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return hostError(s, given, err)
	}
	if err := checkOutside(s, real, identityOf(&st), protected); err != nil {
		return err
	}
	check := checkDirectory
	if s.Kind == KindDisk {
		check = checkImage
	}
	if err := check(s, real, &st); err != nil {
		return err
	}
	s.Source = real
	s.Resolved.Dev, s.Resolved.Ino = st.Dev, st.Ino
	return nil
}

func realPath(p string) (string, error) {
	abs, err := filepath.Abs(p)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

// hostError explains why a host path cannot be used.
func hostError(s *Spec, given string, err error) *errdefs.Error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	e := invalid(s, "host path %q", given)
	e.Cause = err
	if abs, absErr := filepath.Abs(given); absErr == nil && abs != given && errors.Is(err, fs.ErrNotExist) {
		_ = e.WithHint("it was looked for at %s", abs)
	}
	return e
}

func checkDirectory(s *Spec, real string, st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
	case unix.S_IFREG:
		return errdefs.New(errdefs.UnsupportedOperation, "%s: %q is a file, and mounts of single files are not supported yet", s, s.Source).
			WithHint("mount the directory it is in; an image of a disk is a disk mount")
	default:
		return invalid(s, "host path %q is not a directory", s.Source)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, real, unix.R_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return hostError(s, s.Source, err)
	}
	return nil
}

func checkImage(s *Spec, real string, st *unix.Stat_t) error {
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return invalid(s, "disk image %q is not a regular file", s.Source)
	case st.Size == 0:
		return invalid(s, "disk image %q is empty", s.Source)
	case st.Size%sectorSize != 0:
		return invalid(s, "the size of disk image %q is %d bytes, no multiple of %d", s.Source, st.Size, sectorSize).
			WithHint("truncate --size=%%%d pads it", sectorSize)
	}
	access := uint32(unix.R_OK)
	if !s.Readonly {
		access |= unix.W_OK
	}
	if err := unix.Faccessat(unix.AT_FDCWD, real, access, unix.AT_EACCESS); err != nil {
		e := hostError(s, s.Source, err)
		if !s.Readonly {
			_ = e.WithHint("a read-only mount only has to read it")
		}
		return e
	}
	return nil
}

// protectedDir is a directory of this module's own data. A guest that could
// write there would own records, locks and other sandboxes' volumes.
type protectedDir struct {
	path string // links resolved as far as it exists
	ids  []identity
}

// protectedDirs lists the data directory and those of its parts that hold
// data; each may be a link to another place. ids are those of the directory and
// of all its parents.
func protectedDirs(h home.Dir) []protectedDir {
	var out []protectedDir
	for _, dir := range []string{string(h), h.Volumes(), h.Images(), h.Kernels(), h.Sandboxes()} {
		p := realPrefix(dir)
		out = append(out, protectedDir{path: p, ids: chain(p)})
	}
	return out
}

// realPrefix resolves the links of the part of p that exists.
func realPrefix(p string) string {
	p = filepath.Clean(p)
	if real, err := filepath.EvalSymlinks(p); err == nil {
		return real
	}
	parent := filepath.Dir(p)
	if parent == p {
		return p
	}
	return filepath.Join(realPrefix(parent), filepath.Base(p))
}

// chain returns the identities of a resolved path and its parents, the path's
// own first; {0, 0} stands for what does not exist.
func chain(p string) []identity {
	var ids []identity
	for {
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err == nil {
			ids = append(ids, identityOf(&st))
		} else {
			ids = append(ids, identity{})
		}
		parent := filepath.Dir(p)
		if parent == p {
			return ids
		}
		p = parent
	}
}

// checkOutside refuses a host path that is, contains or lies in a protected
// directory: by path, and by identity, for the same directory can be mounted at
// several places of the host.
func checkOutside(s *Spec, real string, id identity, protected []protectedDir) error {
	parents := chain(real)
	for _, p := range protected {
		inside := within(real, p.path) || contains(parents, p.ids[0])
		around := within(p.path, real) || contains(p.ids, id)
		var how string
		switch {
		case inside && around:
			how = "is"
		case inside:
			how = "lies in"
		case around:
			how = "holds"
		default:
			continue
		}
		return invalid(s, "host path %q %s the data directory %s", s.Source, how, p.path).
			WithHint("mount a volume by its name, or keep the data elsewhere with %s", home.EnvVar)
	}
	return nil
}

func contains(ids []identity, id identity) bool {
	if id == (identity{}) {
		return false
	}
	return slices.Contains(ids, id)
}

// openResolved opens a resolved host path without following any link and
// demands the identity that was seen when it was resolved.
func openResolved(s *Spec, flags uint64) (*os.File, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, s.Source, &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		// Before Linux 5.6, or behind a filter that does not know openat2: the
		// identity check below has to do.
		fd, err = unix.Open(s.Source, int(flags)|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return nil, hostError(s, s.Source, err)
	}
	f := os.NewFile(uintptr(fd), s.Source)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		f.Close()
		return nil, hostError(s, s.Source, err)
	}
	if err := sameObject(s, identityOf(&st)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sameObject refuses what has taken the place of the object that was resolved.
func sameObject(s *Spec, id identity) error {
	if id == (identity{s.Resolved.Dev, s.Resolved.Ino}) {
		return nil
	}
	return invalid(s, "host path %q was replaced while the sandbox was being started", s.Source).
		WithHint("start it again")
}
