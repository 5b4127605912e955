package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/mount"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// Info is a sandbox as a reader sees it: its record, and the status its lock says.
type Info struct {
	ID, Name, Image      string
	Status               string // running, stopped, crashed, draining, starting
	Cause                string // of a crash
	Config               supervisor.Config
	CreatedAt, UpdatedAt time.Time
}

// Get returns a sandbox. Errors: SandboxNotFound.
func (st *Store) Get(ctx context.Context, name string) (*Info, error) {
	db, err := records.OpenReader(ctx, st.h)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	rec, err := db.SandboxByName(ctx, name)
	if err != nil {
		return nil, err
	}
	return st.info(rec)
}

// List returns a page of sandboxes, newest first, and where the next one begins.
func (st *Store) List(ctx context.Context, f records.SandboxFilter) ([]*Info, string, error) {
	db, err := records.OpenReader(ctx, st.h)
	if err != nil {
		return nil, "", err
	}
	defer db.Close()
	recs, next, err := db.ListSandboxes(ctx, f)
	if err != nil {
		return nil, "", err
	}
	out := make([]*Info, 0, len(recs))
	for _, rec := range recs {
		info, err := st.info(rec)
		if err != nil {
			return nil, "", err
		}
		out = append(out, info)
	}
	return out, next, nil
}

// info derives the status: a record that says alive is believed only while the
// sandbox's lock is held.
func (st *Store) info(rec *records.Sandbox) (*Info, error) {
	i := &Info{
		ID: rec.ID, Name: rec.Name, Image: rec.Image, Status: rec.Status, Cause: rec.LastError,
		CreatedAt: rec.CreatedAt, UpdatedAt: rec.UpdatedAt,
	}
	if len(rec.Config) > 0 {
		if err := json.Unmarshal(rec.Config, &i.Config); err != nil {
			return nil, errdefs.Wrap(errdefs.Internal, err, "definition of sandbox %q", rec.Name)
		}
	}
	if !alive(rec.Status) {
		return i, nil
	}
	held, err := supervisor.Locked(st.h, rec.Name)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "lock of sandbox %q", rec.Name)
	}
	if !held {
		i.Status, i.Cause = supervisor.StatusCrashed, supervisor.SupervisorGone
	} else if rec.Status == supervisor.StatusCreating {
		i.Status = supervisor.StatusStarting
	}
	return i, nil
}

// alive reports whether a recorded status claims a living sandbox.
func alive(status string) bool {
	switch status {
	case supervisor.StatusCreating, supervisor.StatusStarting, supervisor.StatusRunning, supervisor.StatusDraining:
		return true
	}
	return false
}

// isDeadEphemeral reports whether a record is one of an ephemeral sandbox whose
// supervisor died before it could remove it. The caller holds its lock.
func isDeadEphemeral(rec *records.Sandbox) bool {
	var c supervisor.Config
	return alive(rec.Status) && len(rec.Config) > 0 && json.Unmarshal(rec.Config, &c) == nil && c.Ephemeral
}

// Settle stores what dead supervisors and creators could not: records that claim
// a living sandbox whose lock is free become crashed, half-made and ephemeral
// ones go, and so do directories without a record. Every mutating command calls it; a failure is the caller's to ignore.
func (st *Store) Settle(ctx context.Context) error {
	if _, err := os.Stat(st.h.DB()); errors.Is(err, fs.ErrNotExist) {
		return nil // and no home is made for a command that will find nothing
	}
	return st.withDB(ctx, func(db *records.DB) error {
		recs, _, err := db.ListSandboxes(ctx, records.SandboxFilter{})
		if err != nil {
			return err
		}
		var errs []error
		for _, rec := range recs {
			if alive(rec.Status) {
				errs = append(errs, st.settle(ctx, db, rec))
			}
		}
		errs = append(errs, st.sweep(ctx, db))
		return errors.Join(errs...)
	})
}

func (st *Store) settle(ctx context.Context, db *records.DB, rec *records.Sandbox) error {
	lock, err := st.lock(rec.Name)
	if errors.Is(err, supervisor.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer supervisor.Unlock(lock)
	now, err := db.SandboxByName(ctx, rec.Name) // read again under the lock
	if errdefs.Is(err, errdefs.SandboxNotFound) {
		return os.RemoveAll(st.h.Sandbox(rec.Name))
	}
	if err != nil || now.ID != rec.ID || !alive(now.Status) {
		return err
	}
	if now.Status == supervisor.StatusCreating || isDeadEphemeral(now) {
		if err := st.discard(ctx, db, now); err != nil {
			return err
		}
		return os.RemoveAll(st.h.Sandbox(rec.Name))
	}
	os.RemoveAll(st.h.Run(rec.ID))
	return db.UpdateSandbox(ctx, rec.ID, supervisor.StatusCrashed, supervisor.SupervisorGone, nil)
}

// discard deletes the record of a sandbox that is to go. Volumes that a creation
// made which was never completed, and that nobody has used, go too. The caller
// holds the sandbox's lock.
func (st *Store) discard(ctx context.Context, db *records.DB, rec *records.Sandbox) error {
	var c supervisor.Config
	if rec.Status == supervisor.StatusCreating && json.Unmarshal(rec.Config, &c) == nil {
		err := st.withVolumes(func(vols *volstore.Store) error {
			mount.TakeBack(ctx, vols, c.Mounts)
			return nil
		})
		if err != nil {
			return err
		}
	}
	os.RemoveAll(st.h.Run(rec.ID))
	return db.DeleteSandbox(ctx, rec.ID)
}

// lock takes a sandbox's lock, making its directory if need be. The directory
// may be removed meanwhile by who held the lock before.
func (st *Store) lock(name string) (*os.File, error) {
	for {
		if err := os.MkdirAll(st.h.Sandbox(name), 0o700); err != nil {
			return nil, home.WithHint(errdefs.Wrap(errdefs.IO, err, "directory of sandbox %q", name))
		}
		f, err := supervisor.Lock(st.h, name)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
}

// lockNew is lock for a sandbox that is to be made. Who holds the lock of a
// directory without a record may be a sweep that has just found it: it is waited
// for, but not for another maker, whose record comes soon.
func (st *Store) lockNew(ctx context.Context, name string) (*os.File, error) {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		f, err := st.lock(name)
		if !errors.Is(err, supervisor.ErrLocked) || ctx.Err() != nil || time.Now().After(deadline) {
			return f, err
		}
		rerr := st.withDB(ctx, func(db *records.DB) error {
			_, err := db.SandboxByName(ctx, name)
			return err
		})
		if !errdefs.Is(rerr, errdefs.SandboxNotFound) {
			return nil, errors.Join(err, rerr)
		}
	}
}

// sweep removes the directories of sandboxes that have no record: what is left
// when a process dies between making or removing the one and the other.
func (st *Store) sweep(ctx context.Context, db *records.DB) error {
	entries, err := os.ReadDir(st.h.Sandboxes())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if _, err := db.SandboxByName(ctx, e.Name()); !errdefs.Is(err, errdefs.SandboxNotFound) {
			continue
		}
		lock, err := supervisor.Lock(st.h, e.Name())
		if err != nil {
			continue // it is being made, or has just gone
		}
		if _, err := db.SandboxByName(ctx, e.Name()); errdefs.Is(err, errdefs.SandboxNotFound) {
			errs = append(errs, os.RemoveAll(st.h.Sandbox(e.Name())))
		}
		supervisor.Unlock(lock)
	}
	return errors.Join(errs...)
}

// freshDir empties a sandbox's directory but for its lock, which the caller
// holds, and makes the logs directory.
func (st *Store) freshDir(name string) error {
	dir := st.h.Sandbox(name)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "lock" {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Mkdir(filepath.Join(dir, "logs"), 0o700)
}

// forget removes a record and its directory; the caller holds the lock.
func (st *Store) forget(ctx context.Context, id, name string) {
	err := st.withDB(ctx, func(db *records.DB) error { return db.DeleteSandbox(ctx, id) })
	if err == nil || errdefs.Is(err, errdefs.SandboxNotFound) {
		os.RemoveAll(st.h.Sandbox(name))
		os.RemoveAll(st.h.Run(id))
	}
}

func (st *Store) withDB(ctx context.Context, do func(*records.DB) error) error {
	db, err := records.Open(ctx, st.h)
	if err != nil {
		return err
	}
	return errors.Join(do(db), db.Close())
}

func (st *Store) withVolumes(do func(*volstore.Store) error) error {
	vols := volstore.New(st.h)
	return errors.Join(do(vols), vols.Close())
}
