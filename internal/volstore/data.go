package volstore

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// Data is the open data directory of a volume. It means the volume with one id:
// a successor of its name is never reached through it.
type Data struct {
	Dir *os.File // O_PATH

	s     *Store
	v     *Volume
	alive atomic.Pointer[aliveFile] // nil: ask the records
	gone  atomic.Bool

	mu   sync.Mutex
	held []*os.File // alive files, open until Close since another goroutine may be looking; guarded by mu
}

// aliveFile is an open alive file.
type aliveFile struct {
	*os.File        // O_PATH
	names    uint64 // how many it has while the volume exists: 2 where it is the note, too
}

// OpenData opens the data directory of the volume with this id, without
// following symlinks, and checks that it is the volume's own. It works on a
// read-only home.
//
// Errors: VolumeNotFound; Filesystem when the directory is missing or was
// replaced behind our back.
func (s *Store) OpenData(ctx context.Context, id string) (*Data, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, err
	}
	d := &Data{s: s, v: v}
	if d.Dir, err = s.openOwn(v); err != nil {
		return nil, s.wrap("open", v.Name, err)
	}
	if err := d.watch(ctx); err != nil {
		_ = d.Close()
		return nil, s.wrap("open", v.Name, err)
	}
	return d, nil
}

// openOwn opens the data directory and checks its identity. While a rename is
// unfinished the data may lie under either name.
func (s *Store) openOwn(v *Volume) (*os.File, error) {
	paths := []string{v.Path}
	if v.MovingFrom != "" {
		paths = append(paths, s.home.Volume(v.MovingFrom))
	}
	for _, path := range paths {
		dir, err := openDir(path, unix.O_PATH)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue
		}
		if err != nil {
			return nil, err
		}
		id, err := identityOf(dir)
		if err == nil && id.Same(v.Identity) {
			return dir, nil
		}
		_ = dir.Close()
		if err != nil {
			return nil, err
		}
	}
	if !exists(v.Path) {
		return nil, errdefs.New(errdefs.Filesystem, "volume %q: its data directory %s is missing", v.Name, v.Path).
			WithHint("put it back and run msb volume adopt %s, or remove the volume", v.Name)
	}
	return nil, errdefs.New(errdefs.Filesystem, "volume %q: %s is not the directory that was made for it", v.Name, v.Path).
		WithHint("if it was restored from a backup: msb volume adopt %s", v.Name)
}

// watch opens the alive file. Where it is missing (power cut, or a removal that
// failed) it is made again, if the home can be written.
func (d *Data) watch(ctx context.Context) error {
	if d.openAlive() {
		return nil
	}
	err := d.s.settleByID(ctx, &d.v.Volume)
	if errdefs.Is(err, errdefs.VolumeNotFound) || errdefs.Is(err, errdefs.Cancelled) {
		return err
	}
	d.openAlive()
	return nil
}

func (d *Data) openAlive() bool {
	path := filepath.Join(d.s.home.State(d.v.ID), aliveName)
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f := &aliveFile{os.NewFile(uintptr(fd), path), 1}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = append(d.held, f.File)
	var alive, other unix.Stat_t
	if unix.Fstat(fd, &alive) != nil {
		return false
	}
	// It was another name of attach before. A note that is replaced takes a name
	// away: then the records are asked, and this is done again.
	for i, name := range []string{noteName, attachName} {
		err := unix.Lstat(filepath.Join(filepath.Dir(path), name), &other)
		if err != nil && i == 0 {
			return false // on its way to the trash
		}
		if err == nil && other.Ino == alive.Ino {
			f.names = 2
		}
	}
	d.alive.Store(f)
	return true
}

// Alive returns a VolumeNotFound error once the volume is removed. Called after
// an operation and before acknowledging it, it makes sure that what was
// acknowledged did not land in the trash. It costs one fstat.
func (d *Data) Alive() error {
	if f := d.alive.Load(); f != nil && linkCount(f.File) >= f.names {
		return nil
	}
	return d.recheck()
}

// recheck asks the records: a removal unlinks the alive file before it commits
// and makes it again if the commit fails.
func (d *Data) recheck() error {
	if d.gone.Load() {
		return records.VolumeNotFound(d.v.Name)
	}
	_, err := d.s.GetByID(context.Background(), d.v.ID)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		d.gone.Store(true)
		return records.VolumeNotFound(d.v.Name)
	}
	if err == nil {
		d.openAlive()
	}
	return err
}

// Close releases the descriptors. No other method may run at the same time.
func (d *Data) Close() error {
	var err error
	if d.Dir != nil {
		err = d.Dir.Close()
	}
	for _, f := range d.held {
		err = errors.Join(err, f.Close())
	}
	d.Dir, d.held = nil, nil
	d.alive.Store(nil)
	return err
}
