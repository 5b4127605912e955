package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// PruneReport says what Prune removed.
type PruneReport struct {
	References int
	Manifests  int // with their configurations
	Layers     int
	Roots      int   // root file systems
	Bytes      int64 // given back to the file system
}

// users names the sandboxes that use a manifest.
func (s *Store) users(d digest) []string {
	if s.Users == nil {
		return nil
	}
	return s.Users(string(d))
}

// Remove drops a reference, then whatever no reference needs. The last
// reference of an image that sandboxes use is refused unless force is set;
// then its root image stays while a sandbox uses it.
//
// The reference is gone when Remove returns. Files go at once, or, while a
// pull or a load is under way, with the next Remove or Prune.
//
// Errors: ImageNotFound, ImageInUse, InvalidArgument.
func (s *Store) Remove(ctx context.Context, ref string, force bool) error {
	if _, err := s.Get(ctx, ref); errdefs.Is(err, errdefs.ImageNotFound) || errdefs.Is(err, errdefs.InvalidArgument) {
		return err
	}
	err := s.updateRefs(ctx, func(r *refs) error {
		row, err := r.match(ref)
		if err != nil {
			return err
		}
		users := s.users(row.Manifest)
		if len(users) > 0 && !force && r.count(row.Manifest) == 1 {
			return errdefs.New(errdefs.ImageInUse, "image %q is used by: %s", ref, strings.Join(users, ", ")).
				WithHint("remove the sandboxes first, or add --force")
		}
		gone := row.Reference
		r.Images = slices.DeleteFunc(r.Images, func(x refRow) bool { return x.Reference == gone })
		return nil
	})
	if err != nil {
		return err
	}
	_, err = s.collect(ctx, false)
	return err
}

func (r *refs) count(d digest) int {
	n := 0
	for _, row := range r.Images {
		if row.Manifest == d {
			n++
		}
	}
	return n
}

// Prune removes every reference that no sandbox uses, and all files that
// nothing needs, broken downloads among them.
func (s *Store) Prune(ctx context.Context) (PruneReport, error) {
	if _, err := os.Stat(s.dir); errors.Is(err, fs.ErrNotExist) {
		return PruneReport{}, nil
	}
	dropped := 0
	err := s.updateRefs(ctx, func(r *refs) error {
		before := len(r.Images)
		r.Images = slices.DeleteFunc(r.Images, func(x refRow) bool { return len(s.users(x.Manifest)) == 0 })
		dropped = before - len(r.Images)
		return nil
	})
	if err != nil {
		return PruneReport{}, err
	}
	rep, err := s.collect(ctx, true)
	rep.References = dropped
	return rep, err
}

// collect removes files that no reference needs. It does nothing while an
// operation holds blobs that are not named yet.
func (s *Store) collect(ctx context.Context, partials bool) (PruneReport, error) {
	var rep PruneReport
	if err := s.ensure(); err != nil {
		return rep, err
	}
	lock, err := tryLockPath(s.useLock(), unix.LOCK_EX)
	if err != nil || lock == nil {
		return rep, err
	}
	defer lock.Close()
	index, err := lockPath(ctx, s.indexLock(), unix.LOCK_SH)
	if err != nil {
		return rep, err
	}
	defer index.Close()
	need, err := s.needed()
	if err != nil {
		return rep, err
	}
	err = errors.Join(s.collectRoots(need, &rep), s.collectBlobs(need, partials, &rep))
	if err != nil {
		err = errdefs.Wrap(errdefs.IO, err, "image store")
	}
	return rep, err
}

// needed returns every digest that a reference leads to.
func (s *Store) needed() (map[digest]bool, error) {
	r, err := s.readRefs()
	if err != nil {
		return nil, err
	}
	need := map[digest]bool{}
	for _, row := range r.Images {
		if need[row.Manifest] {
			continue
		}
		need[row.Manifest] = true
		raw, err := s.readBlob(row.Manifest)
		if errors.Is(err, fs.ErrNotExist) {
			continue // damaged: List says so
		}
		if err != nil {
			return nil, errdefs.Wrap(errdefs.IO, err, "image %s", shortName(row.Reference))
		}
		doc, err := parseDocument(raw, s.limits)
		if err != nil || doc.Config == nil {
			continue
		}
		need[doc.Config.digest()] = true
		for _, y := range doc.Layers {
			need[y.digest()] = true
		}
	}
	return need, nil
}

func (s *Store) collectRoots(need map[digest]bool, rep *PruneReport) error {
	return eachFile(s.rootDir(), func(name string) error {
		path := filepath.Join(s.rootDir(), name)
		base, _, _ := strings.Cut(name, ".")
		d, err := parseDigest("sha256:" + base)
		if err == nil && !strings.HasSuffix(name, buildingSuffix) && !strings.HasSuffix(name, ".new") {
			if need[d] || len(s.users(d)) > 0 {
				return nil
			}
			if strings.HasSuffix(name, ".ext4") {
				rep.Roots++
			}
		}
		return removeFile(path, rep)
	})
}

func (s *Store) collectBlobs(need map[digest]bool, partials bool, rep *PruneReport) error {
	return eachFile(s.blobDir(), func(name string) error {
		path := filepath.Join(s.blobDir(), name)
		d, err := parseDigest("sha256:" + name)
		switch {
		case err != nil && !partials, need[d]:
			return nil
		case err == nil && s.isManifest(d):
			rep.Manifests++
		case err == nil && !s.isConfig(d):
			rep.Layers++
		}
		return removeFile(path, rep)
	})
}

// isManifest and isConfig tell small blobs apart for the report.
func (s *Store) isManifest(d digest) bool {
	raw, err := s.readBlob(d)
	if err != nil {
		return false
	}
	doc, err := parseDocument(raw, s.limits)
	return err == nil && doc.Config != nil
}

func (s *Store) isConfig(d digest) bool {
	raw, err := s.readBlob(d)
	if err != nil {
		return false
	}
	var c configFile
	return decodeJSON(raw, s.limits.manifest, &c) == nil && c.RootFS.Type != ""
}

func eachFile(dir string, fn func(name string) error) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := fn(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func removeFile(path string, rep *PruneReport) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		rep.Bytes += st.Blocks * 512
	}
	return nil
}

// RootFS returns the root image of a manifest digest, also of one that no
// reference names any more but a sandbox still uses.
//
// Errors: ImageNotFound.
func (s *Store) RootFS(manifestDigest string) (string, error) {
	d, err := parseDigest(manifestDigest)
	if err != nil {
		return "", err
	}
	if s.readRoot(d) == nil {
		return "", errdefs.New(errdefs.ImageNotFound, "root image of %s is gone", d).
			WithHint("pull or load the image again")
	}
	return s.rootPath(d), nil
}
