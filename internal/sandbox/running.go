package sandbox

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/mount"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// Running is a sandbox that lived when it was returned: made or started here, or
// found by name.
type Running struct {
	st     *Store
	cfg    supervisor.Config
	handle *supervisor.Handle // nil when found by name
}

// Config returns the sandbox's definition.
func (r *Running) Config() supervisor.Config { return r.cfg }

// Owned reports whether the sandbox ends with this process.
func (r *Running) Owned() bool { return r.handle != nil && r.handle.Held() }

// Ended waits for the end of a sandbox that was started here and returns why it
// crashed, "" for a clean stop. ok is false for one that was found by name.
func (r *Running) Ended(ctx context.Context) (cause string, ok bool) {
	if r.handle == nil {
		return "", false
	}
	select {
	case <-r.handle.Exited():
		return r.handle.Cause(), true
	case <-ctx.Done():
		return "", false
	}
}

// Dial connects to the guest's agent.
func (r *Running) Dial(ctx context.Context) (*agentclient.Conn, error) {
	c, err := agentclient.Dial(ctx, filepath.Join(r.st.h.Run(r.cfg.ID), supervisor.AgentSocket))
	var e *errdefs.Error
	if errors.As(err, &e) {
		e.Msg = "sandbox \"" + r.cfg.Name + "\": " + e.Msg
		if errors.Is(err, os.ErrDeadlineExceeded) && e.Hint == "" {
			_ = e.WithHint("see msb logs %s; msb kill %s ends it", r.cfg.Name, r.cfg.Name)
		}
	}
	return c, err
}

// Detach lets the sandbox outlive this process.
func (r *Running) Detach() error {
	if r.handle == nil {
		return nil
	}
	return r.handle.Detach()
}

// Release ends the sandbox if it is attached to this process, without waiting.
func (r *Running) Release() {
	if r.handle != nil {
		r.handle.Release()
	}
}

// Live asks the supervisor about the sandbox.
func (r *Running) Live(ctx context.Context) (*supervisor.Live, error) {
	return supervisor.Query(ctx, r.st.h, r.cfg.ID)
}

// Connect returns a running sandbox by name. Errors: SandboxNotFound,
// SandboxNotRunning with the present status.
func (st *Store) Connect(ctx context.Context, name string) (*Running, error) {
	i, err := st.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if i.Status != supervisor.StatusRunning {
		return nil, notRunning(i)
	}
	return &Running{st: st, cfg: i.Config}, nil
}

func notRunning(i *Info) error {
	state := i.Status
	if i.Cause != "" {
		state += " (" + i.Cause + ")"
	}
	return errdefs.New(errdefs.SandboxNotRunning, "sandbox %q is not running: %s", i.Name, state).
		WithHint("msb start %s", i.Name)
}

// StartOptions say how a stopped sandbox is started again.
type StartOptions struct {
	Detached bool
	Progress func(Progress)
}

// Start boots a stopped or crashed sandbox again, with its mounts. Its named
// volumes must be the ones it was created with.
//
// Errors: SandboxNotFound, SandboxStillRunning, VolumeNotFound and what a boot
// can fail with; the sandbox stays stopped then.
func (st *Store) Start(ctx context.Context, name string, o StartOptions) (*Running, error) {
	msb, err := FindRuntime(st.h)
	if err != nil {
		return nil, err
	}
	if _, err := st.Get(ctx, name); err != nil {
		return nil, err
	}
	lock, err := st.lock(name)
	if errors.Is(err, supervisor.ErrLocked) {
		return nil, errdefs.New(errdefs.SandboxStillRunning, "sandbox %q is running already", name).WithHint("msb exec %s -- COMMAND", name)
	}
	if err != nil {
		return nil, err
	}
	i, err := st.Get(ctx, name) // again, under the lock
	if err != nil {
		supervisor.Unlock(lock)
		return nil, err
	}
	l := &launch{st: st, spec: &Spec{Name: name, Detached: o.Detached, Progress: o.Progress}, msb: msb, lock: lock, cfg: i.Config}
	l.undo = append(l.undo, func(context.Context) { lock.Close() })
	if i.Config.ID == "" {
		return nil, l.fail(errdefs.New(errdefs.SandboxNotFound, "sandbox %q was never completed", name).WithHint("msb rm %s", name))
	}
	err = st.withVolumes(func(vols *volstore.Store) error {
		l.cfg.Mounts, err = mount.Refresh(ctx, vols, st.h, i.Config.Mounts)
		return err
	})
	if err != nil {
		return nil, l.fail(err)
	}
	if err := st.update(ctx, i.ID, supervisor.StatusStarting, "", &l.cfg); err != nil {
		return nil, l.fail(err)
	}
	l.undo = append(l.undo, func(ctx context.Context) {
		_ = st.update(ctx, i.ID, supervisor.StatusStopped, "", nil)
	})
	run, err := l.boot(ctx)
	if err != nil {
		return nil, l.fail(err)
	}
	return run, nil
}

// Stop asks the guest to power off and kills it after grace; with no grace it
// is killed at once. It returns when the sandbox is gone and every lock of it
// is free. A supervisor that does not answer is killed after grace, and the
// sandbox has crashed then. Errors: SandboxNotFound, SandboxNotRunning.
func (st *Store) Stop(ctx context.Context, name string, grace time.Duration) error {
	i, err := st.Get(ctx, name)
	if err != nil {
		return err
	}
	if i.Status != supervisor.StatusRunning && i.Status != supervisor.StatusDraining {
		return notRunning(i)
	}
	err = supervisor.RequestStop(ctx, st.h, i.ID, grace)
	if errors.Is(err, supervisor.ErrSilent) && ctx.Err() == nil {
		return st.killSilent(ctx, i)
	}
	if err != nil {
		if held, lerr := supervisor.Locked(st.h, name); lerr != nil || held {
			return err
		}
		return nil // it ended meanwhile
	}
	wait := grace + endWait
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end)/2)
	}
	end, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	err = st.WaitGone(end, name)
	if err != nil && end.Err() != nil && ctx.Err() == nil {
		return st.killSilent(ctx, i)
	}
	return err
}

// endWait is how long a supervisor may take to end after the grace time; its
// tear-down takes 2 s.
const endWait = 30 * time.Second

// killSilent ends a sandbox whose supervisor does not answer, and stores what
// became of it.
func (st *Store) killSilent(ctx context.Context, i *Info) error {
	err := supervisor.KillSilent(ctx, st.h, i.ID, i.Name)
	if err != nil && !errdefs.Is(err, errdefs.SandboxNotRunning) {
		return err
	}
	if err := st.WaitGone(ctx, i.Name); err != nil {
		return err
	}
	_ = st.Settle(ctx) // the next command would do it
	return nil
}

// Stop ends the sandbox as Store.Stop does and waits until a supervisor that was
// started here is reaped.
func (r *Running) Stop(ctx context.Context, grace time.Duration) error {
	err := r.st.Stop(ctx, r.cfg.Name, grace)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, reapWait)
		defer cancel()
		r.Ended(ctx)
	}
	return err
}

// reapWait is how long a supervisor may take to exit after it freed its lock.
const reapWait = 5 * time.Second

// WaitGone returns when nobody holds the sandbox.
func (st *Store) WaitGone(ctx context.Context, name string) error {
	pause := time.Millisecond
	for {
		held, err := supervisor.Locked(st.h, name)
		if err != nil || !held {
			return err
		}
		select {
		case <-ctx.Done():
			return errdefs.Wrap(errdefs.Cancelled, context.Cause(ctx), "sandbox %q has not ended", name)
		case <-time.After(pause):
			pause = min(2*pause, 20*time.Millisecond)
		}
	}
}

// Remove deletes a sandbox that does not run: record, writable layer, logs.
// Volumes stay, but those of a creation that was killed, as far as nobody has
// used them. Errors: SandboxNotFound, SandboxStillRunning.
func (st *Store) Remove(ctx context.Context, name string) error {
	if err := ValidateName(name); err != nil {
		return err
	}
	i, err := st.Get(ctx, name)
	if err != nil {
		return err
	}
	lock, err := st.lock(name)
	if errors.Is(err, supervisor.ErrLocked) && i.Status == supervisor.StatusStarting {
		return errdefs.New(errdefs.SandboxStillRunning, "sandbox %q is being started", name).
			WithHint("end the command that starts it, or wait for it")
	}
	if errors.Is(err, supervisor.ErrLocked) {
		return errdefs.New(errdefs.SandboxStillRunning, "sandbox %q is running", name).
			WithHint("msb stop %s first, or msb rm --force %s", name, name)
	}
	if err != nil {
		return err
	}
	defer supervisor.Unlock(lock)
	err = st.withDB(ctx, func(db *records.DB) error {
		rec, err := db.SandboxByName(ctx, name)
		if err != nil {
			return err
		}
		return st.discard(ctx, db, rec)
	})
	if err != nil {
		return err
	}
	if err := os.RemoveAll(st.h.Sandbox(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errdefs.Wrap(errdefs.IO, err, "directory of sandbox %q", name)
	}
	return nil
}

// LogDir is where a sandbox's logs are.
func (st *Store) LogDir(name string) string { return filepath.Join(st.h.Sandbox(name), "logs") }
