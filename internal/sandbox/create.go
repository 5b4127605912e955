package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/image"
	"github.com/microsandbox-go/microsandbox/internal/mount"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

var (
	pointRecorded    = failpoint.New("sandbox.recorded")
	pointProvisioned = failpoint.New("sandbox.provisioned")
	pointStored      = failpoint.New("sandbox.stored")
)

// launch is one creation or start under way. undo runs in reverse order.
type launch struct {
	st   *Store
	spec *Spec
	msb  string
	lock *os.File
	cfg  supervisor.Config
	undo []func(context.Context)
	done []func() // run when the launch has succeeded

	release func() // of the image's files, once the record says that they are used
}

// Create makes and boots a sandbox. On any error, and when ctx ends, everything
// that was made is gone again; a pulled image stays.
//
// Errors: InvalidConfig, SandboxAlreadyExists, ImageNotFound, ImagePullFailed,
// VolumeNotFound, VolumeAlreadyExists, LibraryNotLoaded (msb, QEMU, kernel).
func (st *Store) Create(ctx context.Context, spec *Spec) (*Running, error) {
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	msb, err := FindRuntime(st.h)
	if err != nil {
		return nil, err
	}
	if err := st.h.Ensure(); err != nil {
		return nil, st.h.Unusable(err)
	}
	l := &launch{st: st, spec: spec, msb: msb}
	for _, step := range []func(context.Context) error{l.reserve, l.checkMounts, l.resolveImage, l.provision, l.store, l.format} {
		if err := step(ctx); err != nil {
			return nil, l.fail(err)
		}
	}
	run, err := l.boot(ctx)
	if err != nil {
		return nil, l.fail(err)
	}
	return run, nil
}

// fail undoes the launch. It does so even when the caller's context has ended.
func (l *launch) fail(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i := len(l.undo) - 1; i >= 0; i-- {
		l.undo[i](ctx)
	}
	return err
}

// reserve takes the name: directory, lock and a record in status "creating".
func (l *launch) reserve(ctx context.Context) error {
	st, name := l.st, l.spec.Name
	lock, err := st.lockNew(ctx, name)
	if errors.Is(err, supervisor.ErrLocked) {
		return exists(name)
	}
	if err != nil {
		return err
	}
	l.lock = lock
	l.undo = append(l.undo, func(context.Context) { lock.Close() })
	l.cfg.ID = ulid.Make().String()
	rec := &records.Sandbox{ID: l.cfg.ID, Name: name, Status: supervisor.StatusCreating, Image: l.spec.Image, Labels: l.spec.Labels, CreatedAt: time.Now().UTC()}
	err = st.withDB(ctx, func(db *records.DB) error {
		old, err := db.SandboxByName(ctx, name)
		switch {
		case errdefs.Is(err, errdefs.SandboxNotFound):
		case err != nil:
			return err
		case old.Status != supervisor.StatusCreating && !isDeadEphemeral(old):
			return exists(name)
		default: // what a killed creator left: its lock was free, and is ours now
			if err := st.discard(ctx, db, old); err != nil {
				return err
			}
		}
		return db.InsertSandbox(ctx, rec)
	})
	if err != nil {
		st.dropEmpty(name)
		return err
	}
	l.undo = append(l.undo, func(ctx context.Context) { st.forget(ctx, l.cfg.ID, name) })
	if err := st.freshDir(name); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "directory of sandbox %q", name)
	}
	return pointRecorded.Hit()
}

// dropEmpty removes the directory of a sandbox that has nothing in it but its
// lock, which the caller holds.
func (st *Store) dropEmpty(name string) {
	dir := st.h.Sandbox(name)
	if entries, err := os.ReadDir(dir); err == nil && len(entries) == 1 && entries[0].Name() == "lock" {
		os.RemoveAll(dir)
	}
}

func exists(name string) error {
	return errdefs.New(errdefs.SandboxAlreadyExists, "sandbox %q already exists", name).
		WithHint("msb start %s starts it, msb rm %s removes it", name, name)
}

// resolveImage pulls the image if need be and takes the definition's defaults
// from it.
func (l *launch) resolveImage(ctx context.Context) error {
	s, images := l.spec, Images(l.st.h)
	release, err := images.Hold(ctx)
	if err != nil {
		return err
	}
	l.release = sync.OnceFunc(release)
	l.undo = append(l.undo, func(context.Context) { l.release() })
	img, err := images.Resolve(ctx, s.Image, s.PullPolicy, image.PullOptions{
		Insecure: s.Insecure, Auth: s.Auth,
		Progress: func(p image.Progress) {
			if s.Progress != nil {
				s.Progress(Progress{Step: "image", Message: string(p.Phase), Done: p.Current, Total: p.Total})
			}
		},
	})
	if err != nil {
		return err
	}
	user := first(s.User, img.Config.User, "0") // by number: an image need not name it
	uid, gid, err := img.ResolveUser(user)
	if err != nil {
		return err
	}
	l.cfg = supervisor.Config{
		ID: l.cfg.ID, Name: s.Name, Image: s.Image, Digest: img.ManifestDigest, RootFS: img.RootFS,
		CPUs: or(s.CPUs, DefaultCPUs), MemoryMiB: or(s.MemoryMiB, DefaultMemoryMiB),
		Accel: first(s.Accel, os.Getenv("MSB_ACCEL"), "auto"), UpperMiB: or(s.UpperMiB, DefaultUpperMiB),
		Hostname: first(s.Hostname, hostname(s.Name)), User: user, GuestUID: uid, GuestGID: gid,
		Workdir: first(s.Workdir, img.Config.WorkingDir, "/"), Shell: first(s.Shell, DefaultShell),
		Env: environment(img.Config.Env, s.Env), Labels: s.Labels,
		Entrypoint: img.Config.Entrypoint, Cmd: img.Config.Cmd,
		Ephemeral: s.Ephemeral, BootTimeout: s.BootTimeout,
	}
	if s.Entrypoint != nil { // the image's command belongs to the image's entrypoint
		l.cfg.Entrypoint, l.cfg.Cmd = s.Entrypoint, nil
	}
	if s.Cmd != nil {
		l.cfg.Cmd = s.Cmd
	}
	return nil
}

// checkMounts refuses before a pull what provision would refuse after it.
func (l *launch) checkMounts(ctx context.Context) error {
	return l.st.withVolumes(func(vols *volstore.Store) error { return mount.Check(ctx, vols, l.st.h, l.spec.Mounts) })
}

func (l *launch) provision(ctx context.Context) error {
	if len(l.spec.Mounts) == 0 {
		return nil
	}
	l.spec.report("volumes", fmt.Sprintf("%d mounts", len(l.spec.Mounts)))
	vols := volstore.New(l.st.h)
	l.undo = append(l.undo, func(context.Context) { vols.Close() })
	l.done = append(l.done, func() { vols.Close() })
	// The volumes' ids are written down first: whoever finds this record after
	// our death knows what to take back.
	l.cfg.Mounts = mount.Intend(l.spec.Mounts)
	if err := l.st.update(ctx, l.cfg.ID, supervisor.StatusCreating, "", &l.cfg); err != nil {
		return err
	}
	resolved, undo, err := mount.Provision(ctx, vols, l.st.h, l.cfg.Mounts)
	if err != nil {
		return err
	}
	l.undo = append(l.undo, undo)
	l.cfg.Mounts = resolved
	return pointProvisioned.Hit()
}

// format makes the sandbox's writable layer, an ext4 image that is as good as
// empty until something is written.
func (l *launch) format(ctx context.Context) error {
	path := filepath.Join(l.st.h.Sandbox(l.spec.Name), supervisor.UpperFile)
	options := diskimg.FormatOptions{Label: "msb-upper", Templates: l.st.h.Templates()}
	return diskimg.FormatExt4(ctx, path, l.cfg.UpperMiB<<20, options)
}

// store makes the record's definition complete.
func (l *launch) store(ctx context.Context) error {
	if err := l.st.update(ctx, l.cfg.ID, supervisor.StatusCreating, "", &l.cfg); err != nil {
		return err
	}
	l.release()
	return pointStored.Hit()
}

// boot launches the supervisor and gives the lock to it.
func (l *launch) boot(ctx context.Context) (*Running, error) {
	l.spec.report("boot", "starting "+l.cfg.Name)
	h, err := supervisor.Launch(ctx, l.st.h, l.msb, &l.cfg, l.lock, func(step string) { l.spec.report("boot", step) })
	if err != nil {
		return nil, err
	}
	l.lock.Close()
	for _, f := range l.done {
		f()
	}
	if l.spec.Detached {
		if err := h.Detach(); err != nil {
			h.Release()
			<-h.Exited()
			return nil, err
		}
	}
	l.spec.report("ready", l.cfg.Name)
	return &Running{st: l.st, cfg: l.cfg, handle: h}, nil
}

func (st *Store) update(ctx context.Context, id, status, cause string, cfg *supervisor.Config) error {
	var raw []byte
	if cfg != nil {
		var err error
		if raw, err = json.Marshal(cfg); err != nil {
			return err
		}
	}
	return st.withDB(ctx, func(db *records.DB) error { return db.UpdateSandbox(ctx, id, status, cause, raw) })
}

// environment merges the image's variables and the caller's, with a PATH.
func environment(img []string, over map[string]string) []string {
	env := map[string]string{"PATH": DefaultPath}
	for _, kv := range img {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			env[k] = v
		}
	}
	maps.Copy(env, over)
	out := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		out = append(out, k+"="+env[k])
	}
	return out
}

// hostname makes a host name of a sandbox name, which may be longer.
func hostname(name string) string {
	return name[:min(len(name), maxHostname)]
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func or[T int | int64](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}
