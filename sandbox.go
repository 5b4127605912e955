package microsandbox

import (
	"context"
	"encoding/json"
	"maps"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
)

// SandboxStatus is where a sandbox is in its life. It is derived when it is
// read: a record never proves that a sandbox lives.
type SandboxStatus string

// Sandbox statuses. A sandbox that is being created or started reads as
// "starting".
const (
	SandboxStatusRunning  SandboxStatus = "running"
	SandboxStatusStopped  SandboxStatus = "stopped"
	SandboxStatusCrashed  SandboxStatus = "crashed"
	SandboxStatusDraining SandboxStatus = "draining"
	SandboxStatusPaused   SandboxStatus = "paused"
	SandboxStatusStarting SandboxStatus = "starting"
)

// Default times of [Sandbox.Stop] and [Sandbox.Kill].
const (
	defaultStopTimeout = 10 * time.Second
	defaultKillTimeout = 5 * time.Second
)

// Sandbox is a running sandbox. Methods may be called from several goroutines.
//
// A sandbox made by CreateSandbox or StartSandbox ends with its process, however
// that ends, unless it was detached. One reached by name is only looked at.
type Sandbox struct {
	st  *sandbox.Store
	run *sandbox.Running
}

func sandboxStore() (*sandbox.Store, error) {
	b, err := localBackend()
	if err != nil {
		return nil, err
	}
	return sandbox.New(b.home), nil
}

// CreateSandbox makes and boots a sandbox and returns when its guest serves
// requests.
//
// The whole definition is checked before anything is made. If creation fails,
// ctx ends or the process is killed, nothing of it stays but the pulled image:
// no record, no sandbox directory, no volume that this call created.
//
// Errors: kinds [ErrInvalidConfig], [ErrSandboxAlreadyExists], [ErrImageNotFound],
// [ErrImagePullFailed], [ErrVolumeNotFound], [ErrVolumeAlreadyExists],
// [ErrLibraryNotLoaded] (msb, QEMU or guest kernel missing; the hint says how to
// get them), [ErrCancelled].
func CreateSandbox(ctx context.Context, name string, opts ...SandboxOption) (*Sandbox, error) {
	cfg := SandboxConfig{}
	for _, o := range opts {
		o(&cfg)
	}
	cfg.Name = name
	spec, err := cfg.spec()
	if err != nil {
		return nil, toPublic(err)
	}
	st, err := sandboxStore()
	if err != nil {
		return nil, toPublic(err)
	}
	_ = st.Settle(ctx) // what it cannot mend now, the next command can
	run, err := st.Create(ctx, spec)
	if err != nil {
		return nil, toPublic(err)
	}
	return &Sandbox{st: st, run: run}, nil
}

// spec finalizes the definition.
func (c *SandboxConfig) spec() (*sandbox.Spec, error) {
	mounts, err := c.mountSpecs()
	if err != nil {
		return nil, err
	}
	s := &sandbox.Spec{
		Name: c.Name, Image: c.Image, PullPolicy: string(c.PullPolicy), Insecure: c.RegistryInsecure,
		CPUs: int(c.CPUs), MemoryMiB: int(c.MemoryMiB), UpperMiB: int64(c.OCIUpperSizeMiB),
		Workdir: c.Workdir, Shell: c.Shell, Hostname: c.Hostname, User: c.User, Env: c.Env,
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Labels: c.Labels, Mounts: mounts,
		Detached: c.Detached, Ephemeral: c.Ephemeral, Accel: c.Accelerator, BootTimeout: c.BootTimeout,
		Progress: progress(c.Progress),
	}
	if c.RegistryAuth != nil {
		s.Auth = &fetch.Auth{Username: c.RegistryAuth.Username, Password: c.RegistryAuth.Password}
	}
	return s, s.Validate()
}

func progress(f func(LaunchProgress)) func(sandbox.Progress) {
	if f == nil {
		return nil
	}
	return func(p sandbox.Progress) {
		f(LaunchProgress{Step: p.Step, Message: p.Message, Done: p.Done, Total: p.Total})
	}
}

// StartSandbox boots a stopped or crashed sandbox again, with its mounts. The
// sandbox ends with this process unless it is detached.
//
// Errors: kinds [ErrSandboxNotFound], [ErrSandboxStillRunning],
// [ErrVolumeNotFound] (a volume it was created with is gone).
func StartSandbox(ctx context.Context, name string) (*Sandbox, error) {
	return startSandbox(ctx, name, sandbox.StartOptions{})
}

// StartSandboxDetached is StartSandbox for a sandbox that outlives this process.
func StartSandboxDetached(ctx context.Context, name string) (*Sandbox, error) {
	return startSandbox(ctx, name, sandbox.StartOptions{Detached: true})
}

func startSandbox(ctx context.Context, name string, o sandbox.StartOptions) (*Sandbox, error) {
	st, err := sandboxStore()
	if err != nil {
		return nil, toPublic(err)
	}
	_ = st.Settle(ctx)
	run, err := st.Start(ctx, name, o)
	if err != nil {
		return nil, toPublic(err)
	}
	return &Sandbox{st: st, run: run}, nil
}

// RemoveSandbox deletes a sandbox that does not run: its record, its writable
// layer and its logs. Volumes stay.
//
// Errors: kinds [ErrSandboxNotFound], [ErrSandboxStillRunning].
func RemoveSandbox(ctx context.Context, name string) error {
	st, err := sandboxStore()
	if err != nil {
		return toPublic(err)
	}
	err = st.Remove(ctx, name) // first: what is listed can be removed, also if Settle would
	_ = st.Settle(ctx)
	return toPublic(err)
}

// BackendKind returns where the sandbox runs.
func (s *Sandbox) BackendKind() BackendKind { return BackendLocal }

// Name returns the sandbox's name.
func (s *Sandbox) Name() string { return s.run.Config().Name }

// StopOption adjusts [Sandbox.Stop].
type StopOption func(*lifecycleOptions)

// KillOption adjusts [Sandbox.Kill].
type KillOption func(*lifecycleOptions)

type lifecycleOptions struct{ timeout time.Duration }

// WithStopTimeout sets how long the guest may take to power off before it is
// killed [10 s].
func WithStopTimeout(timeout time.Duration) StopOption {
	return func(o *lifecycleOptions) { o.timeout = timeout }
}

// WithKillTimeout sets how long Kill waits for the sandbox to be gone [5 s].
func WithKillTimeout(timeout time.Duration) KillOption {
	return func(o *lifecycleOptions) { o.timeout = timeout }
}

// Stop ends the sandbox: its programs get SIGTERM, then SIGKILL, file systems are
// synced and unmounted, the guest powers off. One that does not within the stop
// timeout is killed. When Stop returns every lock of the sandbox is free.
//
// Errors: kind [ErrSandboxNotRunning].
func (s *Sandbox) Stop(ctx context.Context, opts ...StopOption) error {
	return stopSandbox(ctx, s.run.Stop, opts)
}

// Kill ends the sandbox at once, as a power cut would: what the guest has not
// synced may be lost. When Kill returns every lock of the sandbox is free.
func (s *Sandbox) Kill(ctx context.Context, opts ...KillOption) error {
	return killSandbox(ctx, s.run.Stop, opts)
}

// stopFunc ends a sandbox that may take the grace time to do so itself.
type stopFunc func(ctx context.Context, grace time.Duration) error

func stopSandbox(ctx context.Context, stop stopFunc, opts []StopOption) error {
	o := lifecycleOptions{timeout: defaultStopTimeout}
	for _, opt := range opts {
		opt(&o)
	}
	return toPublic(stop(ctx, max(o.timeout, time.Millisecond)))
}

func killSandbox(ctx context.Context, stop stopFunc, opts []KillOption) error {
	o := lifecycleOptions{timeout: defaultKillTimeout}
	for _, opt := range opts {
		opt(&o)
	}
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return toPublic(stop(ctx, 0))
}

// Close lets go of the sandbox: one that is attached to this process ends, a
// detached one lives on. Close does not wait for the end; it is idempotent.
func (s *Sandbox) Close() error {
	s.run.Release()
	return nil
}

// Detach lets the sandbox outlive this process; it is found again by name.
func (s *Sandbox) Detach(context.Context) error { return toPublic(s.run.Detach()) }

// OwnsLifecycle reports whether the sandbox ends with this process.
func (s *Sandbox) OwnsLifecycle() (bool, error) { return s.run.Owned(), nil }

// OwnsLifecycleOrFalse is OwnsLifecycle without the error.
func (s *Sandbox) OwnsLifecycleOrFalse() bool { return s.run.Owned() }

// SandboxStopResult says how a sandbox ended.
type SandboxStopResult struct {
	Name       string
	Status     SandboxStatus
	ExitCode   *int
	Signal     *int
	ObservedAt time.Time
	Source     *string // the cause of an end that nobody asked for
}

// WaitUntilStopped returns when the sandbox has ended, and how.
func (s *Sandbox) WaitUntilStopped(ctx context.Context) (*SandboxStopResult, error) {
	if err := s.st.WaitGone(ctx, s.Name()); err != nil {
		return nil, toPublic(err)
	}
	res := &SandboxStopResult{Name: s.Name(), Status: SandboxStatusStopped, ObservedAt: time.Now().UTC()}
	i, err := s.st.Get(ctx, s.Name())
	if errdefs.Is(err, errdefs.SandboxNotFound) { // it was ephemeral
		if cause, ok := s.run.Ended(ctx); ok && cause != "" {
			res.Status, res.Source = SandboxStatusCrashed, &cause
		}
		return res, nil
	}
	if err != nil {
		return nil, toPublic(err)
	}
	res.Status = SandboxStatus(i.Status)
	if i.Cause != "" {
		res.Source = &i.Cause
	}
	return res, nil
}

// SandboxHandle is what is known of a sandbox at the time it was read.
type SandboxHandle struct {
	st   *sandbox.Store
	info *sandbox.Info
}

// GetSandbox returns a sandbox by name. Errors: kind [ErrSandboxNotFound].
func GetSandbox(ctx context.Context, name string) (*SandboxHandle, error) {
	st, err := sandboxStore()
	if err != nil {
		return nil, toPublic(err)
	}
	i, err := st.Get(ctx, name)
	if err != nil {
		return nil, toPublic(err)
	}
	return &SandboxHandle{st: st, info: i}, nil
}

// SandboxPage is one page of a listing, newest first.
type SandboxPage struct {
	Sandboxes  []*SandboxHandle
	NextCursor *string // nil on the last page
}

// SandboxListOption selects what a listing shows.
type SandboxListOption func(*sandboxListOptions)

type sandboxListOptions struct{ filter records.SandboxFilter }

// WithListCursor continues after the page that returned the cursor.
func WithListCursor(cursor string) SandboxListOption {
	return func(o *sandboxListOptions) { o.filter.Cursor = cursor }
}

// WithListLimit sets the size of a page [no limit].
func WithListLimit(limit uint32) SandboxListOption {
	return func(o *sandboxListOptions) { o.filter.Limit = int(limit) }
}

// WithListLabels selects sandboxes that have all these labels.
func WithListLabels(labels map[string]string) SandboxListOption {
	return func(o *sandboxListOptions) { o.filter.Labels = maps.Clone(labels) }
}

// ListSandboxes returns all sandboxes, newest first.
func ListSandboxes(ctx context.Context) (*SandboxPage, error) { return ListSandboxesWith(ctx) }

// ListSandboxesWith returns the sandboxes that options select, newest first.
func ListSandboxesWith(ctx context.Context, configure ...SandboxListOption) (*SandboxPage, error) {
	var o sandboxListOptions
	for _, c := range configure {
		c(&o)
	}
	st, err := sandboxStore()
	if err != nil {
		return nil, toPublic(err)
	}
	infos, next, err := st.List(ctx, o.filter)
	if err != nil {
		return nil, toPublic(err)
	}
	page := &SandboxPage{Sandboxes: make([]*SandboxHandle, 0, len(infos))}
	for _, i := range infos {
		page.Sandboxes = append(page.Sandboxes, &SandboxHandle{st: st, info: i})
	}
	if next != "" {
		page.NextCursor = &next
	}
	return page, nil
}

// Name returns the sandbox's name.
func (h *SandboxHandle) Name() string { return h.info.Name }

// Status returns the status when the handle was read.
func (h *SandboxHandle) Status() SandboxStatus { return SandboxStatus(h.info.Status) }

// Cause says why a sandbox crashed, or stopped without being asked to ("creator
// gone"); "" otherwise.
func (h *SandboxHandle) Cause() string { return h.info.Cause }

// Image returns the image reference the sandbox was created from.
func (h *SandboxHandle) Image() string { return h.info.Image }

// Labels returns the sandbox's labels.
func (h *SandboxHandle) Labels() map[string]string { return maps.Clone(h.info.Config.Labels) }

// BackendKind returns where the sandbox lives.
func (h *SandboxHandle) BackendKind() BackendKind { return BackendLocal }

// CreatedAt returns when the sandbox was created, in UTC.
func (h *SandboxHandle) CreatedAt() time.Time { return h.info.CreatedAt }

// UpdatedAt returns when the record last changed, in UTC.
func (h *SandboxHandle) UpdatedAt() time.Time { return h.info.UpdatedAt }

// ConfigJSON returns the stored definition: image, resources, environment and
// resolved mounts.
func (h *SandboxHandle) ConfigJSON() string {
	b, err := json.Marshal(h.info.Config)
	if err != nil {
		return "{}"
	}
	return string(b)
}

// Refresh reads the sandbox again.
func (h *SandboxHandle) Refresh(ctx context.Context) (*SandboxHandle, error) {
	return GetSandbox(ctx, h.Name())
}

// Connect returns the sandbox, which must be running.
func (h *SandboxHandle) Connect(ctx context.Context) (*Sandbox, error) {
	run, err := h.st.Connect(ctx, h.Name())
	if err != nil {
		return nil, toPublic(err)
	}
	return &Sandbox{st: h.st, run: run}, nil
}

// Start boots the sandbox again, attached to this process.
func (h *SandboxHandle) Start(ctx context.Context) (*Sandbox, error) {
	return StartSandbox(ctx, h.Name())
}

// StartDetached boots the sandbox again; it outlives this process.
func (h *SandboxHandle) StartDetached(ctx context.Context) (*Sandbox, error) {
	return StartSandboxDetached(ctx, h.Name())
}

// Stop ends the sandbox as [Sandbox.Stop] does.
func (h *SandboxHandle) Stop(ctx context.Context, opts ...StopOption) error {
	return stopSandbox(ctx, h.stop, opts)
}

// Kill ends the sandbox as [Sandbox.Kill] does.
func (h *SandboxHandle) Kill(ctx context.Context, opts ...KillOption) error {
	return killSandbox(ctx, h.stop, opts)
}

func (h *SandboxHandle) stop(ctx context.Context, grace time.Duration) error {
	return h.st.Stop(ctx, h.Name(), grace)
}

// Remove deletes the sandbox as [RemoveSandbox] does.
func (h *SandboxHandle) Remove(ctx context.Context) error { return RemoveSandbox(ctx, h.Name()) }

// EnsureInstalled reports whether sandboxes can be started here: it looks for
// msb. It downloads nothing.
func EnsureInstalled(context.Context, ...SetupOption) error {
	h, err := home.Resolve()
	if err != nil {
		return toPublic(err)
	}
	_, err = sandbox.FindRuntime(h)
	return toPublic(err)
}

// SetupOption is accepted for compatibility.
type SetupOption func(*setupConfig)

type setupConfig struct{}

// WithSkipDownload is accepted for compatibility: nothing is ever downloaded.
func WithSkipDownload() SetupOption { return func(*setupConfig) {} }

// IsInstalled reports whether EnsureInstalled succeeds.
func IsInstalled() bool { return EnsureInstalled(context.Background()) == nil }
