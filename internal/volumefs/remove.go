package volumefs

import (
	"context"

	"golang.org/x/sys/unix"
)

// Remove deletes a file or a link; of a link, the link itself wherever it
// leads. A directory is an error.
func (f *FS) Remove(ctx context.Context, path string) error {
	rel, err := f.begin(ctx, "remove", path)
	if err != nil {
		return err
	}
	return f.end("remove", path, f.remove(rel))
}

func (f *FS) remove(rel string) error {
	s, err := f.victim(rel)
	if err != nil {
		return err
	}
	defer s.close()
	if s.isDir() {
		return &refusal{text: "is a directory", errno: unix.EISDIR, hint: "remove it as a directory"}
	}
	return f.unlink(s.dir, s.name)
}

// RemoveDir deletes a directory and everything in it. The volume's root, a
// file, a link and a missing path are errors.
func (f *FS) RemoveDir(ctx context.Context, path string) error {
	rel, err := f.begin(ctx, "rmdir", path)
	if err != nil {
		return err
	}
	return f.end("rmdir", path, f.removeDir(ctx, rel))
}

func (f *FS) removeDir(ctx context.Context, rel string) error {
	s, err := f.victim(rel)
	if err != nil {
		return err
	}
	defer s.close()
	if !s.isDir() {
		return errNotDir
	}
	return f.removeTree(ctx, s)
}

// victim finds what is to be removed: anything but the root, links themselves.
func (f *FS) victim(rel string) (*spot, error) {
	if rel == "" {
		return nil, errRoot
	}
	return f.find(rel, itself)
}

// RemoveAll deletes whatever has the path: a directory with everything in it, a
// file, a link. A missing path is no error, the volume's root is one.
func (f *FS) RemoveAll(ctx context.Context, path string) error {
	rel, err := f.begin(ctx, "remove", path)
	if err != nil {
		return err
	}
	return f.end("remove", path, f.removeAll(ctx, rel))
}

func (f *FS) removeAll(ctx context.Context, rel string) error {
	s, err := f.victim(rel)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil
	}
	if err != nil {
		return err
	}
	defer s.close()
	if s.isDir() {
		err = f.removeTree(ctx, s)
	} else {
		err = f.unlink(s.dir, s.name)
	}
	if err == unix.ENOENT {
		return nil
	}
	return err
}

const (
	// maxOpenLevels bounds the descriptors that removeTree holds: what lies
	// deeper is moved up before it is emptied.
	maxOpenLevels = 64
	// maxPasses bounds how often a directory that was read as empty is not: somebody
	// keeps filling it.
	maxPasses = 1000
)

// removeTree deletes a directory and everything below it. No path is built and
// no link followed: every step is a single name in an open directory.
func (f *FS) removeTree(ctx context.Context, s *spot) error {
	t := &treeRemoval{fs: f, ctx: ctx}
	defer t.close()
	whole, err := f.account() // what is freed is written down a chunk at a time
	if f.noRoomToCount(err) {
		whole, err = &change{}, nil
	}
	if err != nil {
		return err
	}
	defer whole.close()
	err = t.enter(s.dir, s.name)
	if err != nil {
		return err
	}
	for len(t.levels) > 0 {
		if err := t.step(s.dir); err != nil {
			return err
		}
	}
	return nil
}

// level is a directory being emptied.
type level struct {
	fd     int
	name   string   // in the level above
	names  []string // still to be removed
	passes int
}

type treeRemoval struct {
	fs     *FS
	ctx    context.Context
	levels []*level
}

// enter opens a directory and makes it the current level.
func (t *treeRemoval) enter(dir int, name string) error {
	fd, err := t.fs.openIn(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	t.levels = append(t.levels, &level{fd: fd, name: name})
	return nil
}

// step removes one name of the current level, reads more names, or removes the
// empty level itself. base is the directory that holds the top level.
func (t *treeRemoval) step(base int) error {
	l := t.levels[len(t.levels)-1]
	if len(l.names) > 0 {
		name := l.names[len(l.names)-1]
		l.names = l.names[:len(l.names)-1]
		return t.removeName(l, name)
	}
	if _, err := unix.Seek(l.fd, 0, unix.SEEK_SET); err != nil {
		return err
	}
	var err error
	if l.names, err = readNames(t.ctx, l.fd); err != nil || len(l.names) > 0 {
		return err
	}
	above := base
	if n := len(t.levels); n > 1 {
		above = t.levels[n-2].fd
	}
	err = t.fs.rmdir(above, l.name)
	if l.passes++; err == unix.ENOTEMPTY && l.passes < maxPasses {
		return nil // somebody made a name meanwhile: another pass
	}
	if err != nil && (err != unix.ENOENT || len(t.levels) == 1) {
		return err
	}
	_ = unix.Close(l.fd)
	t.levels = t.levels[:len(t.levels)-1]
	return nil
}

func (t *treeRemoval) removeName(l *level, name string) error {
	err := t.fs.unlink(l.fd, name)
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR:
	default:
		return err
	}
	if len(t.levels) >= maxOpenLevels {
		// To the top of the tree that goes anyway; it is read again later.
		err = t.lift(l, name)
	} else {
		err = t.enter(l.fd, name)
	}
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil // changed meanwhile: the next pass sees what it is now
	}
	return err
}

// lift moves a directory to the top of the tree.
func (t *treeRemoval) lift(l *level, name string) error {
	top := t.levels[0].fd
	c, err := t.fs.account(t.fs.inodeOf(l.fd), t.fs.inodeOf(top))
	if err != nil {
		return err
	}
	defer c.close()
	from, to := c.dirSize(l.fd), c.dirSize(top)
	if err := renameat(l.fd, name, top, tempName()); err != nil {
		return err
	}
	c.dirGrew(l.fd, from)
	c.dirGrew(top, to)
	return c.done()
}

func (t *treeRemoval) close() {
	for _, l := range t.levels {
		_ = unix.Close(l.fd)
	}
}
