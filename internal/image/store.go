package image

import (
	"context"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Store is the image part of a home. The zero value is not useful; see New.
type Store struct {
	// Users names the sandboxes that use the image with this manifest
	// digest; nil means none do. Remove and Prune ask it. Set it before use.
	Users func(digest string) []string

	home   home.Dir
	tools  fetch.Tools
	dir    string
	limits limits
	free   func(dir string) (int64, error) // bytes an ordinary user may still write
}

// New returns the store of a home. It does no I/O. tools reach registries and
// decompress layers.
func New(h home.Dir, tools fetch.Tools) *Store {
	return &Store{home: h, tools: tools, dir: h.Images(), limits: defaultLimits, free: freeBytes}
}

// digest is "sha256:" and 64 lower-case hexadecimal digits; only parseDigest
// makes one, so that hex() is always safe as a file name.
type digest string

func parseDigest(s string) (digest, error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 64 || strings.ToLower(h) != h {
		return "", errdefs.New(errdefs.InvalidArgument, "digest %.80q is not sha256 with 64 hexadecimal digits", s)
	}
	if _, err := hex.DecodeString(h); err != nil {
		return "", errdefs.New(errdefs.InvalidArgument, "digest %q is not hexadecimal", s)
	}
	return digest(s), nil
}

func (d digest) hex() string { return strings.TrimPrefix(string(d), "sha256:") }

func (s *Store) blobDir() string          { return filepath.Join(s.dir, "blobs", "sha256") }
func (s *Store) blobPath(d digest) string { return filepath.Join(s.blobDir(), d.hex()) }
func (s *Store) rootDir() string          { return filepath.Join(s.dir, "rootfs") }
func (s *Store) rootPath(d digest) string { return filepath.Join(s.rootDir(), d.hex()+".ext4") }
func (s *Store) metaPath(d digest) string { return filepath.Join(s.rootDir(), d.hex()+".json") }
func (s *Store) indexPath() string        { return filepath.Join(s.dir, "index.json") }
func (s *Store) indexLock() string        { return filepath.Join(s.dir, "index.lock") }
func (s *Store) useLock() string          { return filepath.Join(s.dir, "use.lock") }

// Suffixes of files that are being made. The file is also the lock of its
// maker, so what a killed process left is free to be taken over.
const (
	partialSuffix  = ".partial"
	buildingSuffix = ".building"
)

func (s *Store) ensure() error {
	if err := s.home.Foreign(); err != nil {
		return err
	}
	for _, p := range []string{s.blobDir(), s.rootDir()} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "image store")
		}
	}
	return nil
}

// Hold keeps every file of the store where it is until release: while blobs are
// put that no reference names yet, and while a sandbox that uses an image is not
// recorded yet. It takes the use lock shared; the collector takes it exclusively.
func (s *Store) Hold(ctx context.Context) (release func(), err error) {
	if err := s.ensure(); err != nil {
		return nil, err
	}
	f, err := lockPath(ctx, s.useLock(), unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}
