package volstore

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// Store keeps the volumes of one home. It is safe for concurrent use, and any
// number of stores and processes may work on one home.
type Store struct {
	home home.Dir

	mu     sync.Mutex
	names  map[string]*nameMutex // guarded by mu
	reader *handle               // guarded by mu; nil until needed
	writer *handle               // guarded by mu; nil until needed
	making map[string]bool       // ids of stagings of this store; guarded by mu
	closed bool                  // guarded by mu

	// reapElsewhere deletes large trees from the trash; nil: a goroutine here.
	reapElsewhere Reaper
	reaped        atomic.Bool // it was made ready ahead of a removal, see readyReaper
	// countElsewhere counts large volumes; nil: a goroutine here.
	countElsewhere func(h home.Dir, id string) error
	check          Checker // nil: images that need it are refused
	background     sync.WaitGroup
}

// Volume is a volume record with its host paths.
type Volume struct {
	records.Volume
	Path     string // data directory
	DiskPath string // image of a disk volume, "" for a directory volume
}

// Filter selects volumes; the zero value selects all.
type Filter struct {
	Labels    map[string]string // all must be present with equal values
	LabelKeys []string          // all must be present with any values
}

func (f *Filter) matches(r *records.Volume) bool {
	for _, key := range f.LabelKeys {
		if _, ok := r.Labels[key]; !ok {
			return false
		}
	}
	return records.HasLabels(r.Labels, f.Labels)
}

// New returns the store of a home. It does no I/O.
func New(h home.Dir) *Store {
	return &Store{home: h, names: map[string]*nameMutex{}, making: map[string]bool{}}
}

// Reaper starts a detached, niced process that calls ReapTrash once begin is
// called or this process has ended, and returns.
type Reaper func(h home.Dir) (begin func(), err error)

// SetReaper makes large removed trees be deleted by processes that start starts.
// Without it a goroutine of this process does it; what it does not get done before
// the process ends is left for the next mutating command. Call it before the
// store is used.
func (s *Store) SetReaper(start Reaper) { s.reapElsewhere = start }

// Close waits for background work and closes the records. Open Data and
// Attachments stay valid.
func (s *Store) Close() error {
	s.background.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.retire(&s.reader)
	s.retire(&s.writer)
	return nil
}

// handle is an open database with its users: it is closed by the last of them
// once it is retired.
type handle struct {
	db      *records.DB
	users   int  // guarded by Store.mu
	retired bool // guarded by Store.mu
}

// retire gives a handle up, closing it when nobody uses it. s.mu is held.
func (s *Store) retire(h **handle) {
	if *h == nil {
		return
	}
	(*h).retired = true
	if (*h).users == 0 {
		_ = (*h).db.Close()
	}
	*h = nil
}

// records returns a database handle and what gives it back. A handle is kept
// between calls until the home's database is replaced.
func (s *Store) records(ctx context.Context, write bool) (*records.DB, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errdefs.New(errdefs.InvalidHandle, "the volume store of %s is closed", s.home)
	}
	at := &s.reader
	if write || s.writer != nil {
		at = &s.writer // in one process, reads queue behind writes instead of polling for the lock
	}
	if *at != nil && (*at).db.Stale() {
		s.retire(at)
		if !write {
			at = &s.reader
		}
	}
	if *at == nil {
		open := records.OpenReader
		if at == &s.writer {
			open = records.Open
		}
		db, err := open(ctx, s.home)
		if err != nil {
			return nil, nil, err
		}
		*at = &handle{db: db}
	}
	h := *at
	h.users++
	return h.db, func() { s.giveBack(h) }, nil
}

func (s *Store) giveBack(h *handle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.users--
	if h.retired && h.users == 0 {
		_ = h.db.Close()
	}
}

func (s *Store) volume(r *records.Volume) *Volume { return volumeIn(s.home.Volumes()+"/", r) }

// volumeIn adds the paths, in dir, which ends in a slash. A name is one element
// of a path.
func volumeIn(dir string, r *records.Volume) *Volume {
	v := &Volume{Volume: *r, Path: dir + r.Name}
	if r.Kind == KindDisk {
		v.DiskPath = v.Path + "/" + home.DiskFile
	}
	return v
}

// Get returns the volume with a name. Errors: VolumeNotFound.
func (s *Store) Get(ctx context.Context, name string) (*Volume, error) {
	return s.lookup(ctx, name, (*records.DB).VolumeByName)
}

// GetByID returns the volume with an id. Errors: VolumeNotFound.
func (s *Store) GetByID(ctx context.Context, id string) (*Volume, error) {
	return s.lookup(ctx, id, (*records.DB).VolumeByID)
}

func (s *Store) lookup(ctx context.Context, key string, find func(*records.DB, context.Context, string) (*records.Volume, error)) (*Volume, error) {
	db, done, err := s.records(ctx, false)
	if err != nil {
		return nil, s.wrap("get", key, err)
	}
	defer done()
	r, err := find(db, ctx, key)
	if err != nil {
		return nil, s.wrap("get", key, err)
	}
	return s.volume(r), nil
}

// List returns the volumes that f selects, newest first; with an error about
// damaged records it returns the others.
func (s *Store) List(ctx context.Context, f Filter) ([]*Volume, error) {
	db, done, err := s.records(ctx, false)
	if err != nil {
		return nil, err
	}
	defer done()
	all, err := db.ListVolumes(ctx)
	if err != nil && !errors.As(err, new(records.DamagedRows)) {
		return nil, err
	}
	out := make([]*Volume, 0, len(all))
	dir := s.home.Volumes() + "/"
	for _, r := range all {
		if f.matches(r) {
			out = append(out, volumeIn(dir, r))
		}
	}
	return out, err
}
