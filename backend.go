package microsandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// BackendKind says where volumes and sandboxes live.
type BackendKind string

// Backend kinds.
const (
	BackendLocal   BackendKind = "local"
	BackendCloud   BackendKind = "cloud"
	BackendUnknown BackendKind = "unknown"
)

// BackendInfo describes a backend and how it was chosen. It never holds a key.
type BackendInfo struct {
	Kind    BackendKind
	APIURL  string // of a cloud backend
	Source  string // "programmatic", "MSB_BACKEND", "MSB_PROFILE", "active_profile" or "default"
	Profile string // name of the profile in the configuration file, if one was used
}

// Backend is where volumes live. The functions of this package work on the
// default backend; volumes, handles and file access stay with the backend they
// came from. Only this package implements it.
type Backend interface {
	Kind() BackendKind
	// CreateVolume is the backend's [CreateVolumeFromSpec].
	CreateVolume(ctx context.Context, spec VolumeSpec) (*Volume, error)
	// GetVolume is the backend's [GetVolume].
	GetVolume(ctx context.Context, name string) (*VolumeHandle, error)
	// ListVolumes is the backend's [ListVolumesWith].
	ListVolumes(ctx context.Context, opts ...VolumeListOption) ([]*VolumeHandle, error)
	// RemoveVolume is the backend's [RemoveVolume].
	RemoveVolume(ctx context.Context, name string) error
	// DefaultVolume is the backend's [GetDefaultVolume].
	DefaultVolume(ctx context.Context) (*VolumeHandle, error)

	info() BackendInfo
	volumePath(name string) string
	removeVolume(ctx context.Context, v *volumeInfo) error
	setLabels(ctx context.Context, v *volumeInfo, labels map[string]string) error
	openVolume(ctx context.Context, v *volumeInfo) (*openVolume, error)
}

// LocalBackend keeps volumes in a directory of this host. It needs no daemon:
// any number of processes may use the same directory.
type LocalBackend struct {
	home  home.Dir
	store *volstore.Store
	open  openVolumes
}

// NewLocalBackend returns the backend of a home directory; "" means $MSB_HOME,
// else ~/.microsandbox. It does no I/O: the directory is made when something is
// created in it.
func NewLocalBackend(homeDir string) (*LocalBackend, error) {
	dir, err := home.Resolve()
	if homeDir != "" {
		var abs string
		abs, err = filepath.Abs(homeDir)
		dir = home.Dir(abs)
	}
	if err != nil {
		return nil, toPublic(errdefs.Wrap(errdefs.InvalidConfig, err, "home directory"))
	}
	b := &LocalBackend{home: dir, store: volstore.New(dir)}
	b.open.store, b.open.home = b.store, dir
	return b, nil
}

// SetReaper makes start be called when there is a large removed volume to
// delete, or is about to be: it should start a process that outlives this one and
// runs `msb reap-trash` on the home once begin is called or this process has
// ended, and return. Without it a goroutine deletes the files, and what it does
// not get done before the program ends is left for the next call that changes
// volumes. Call it before the backend is used.
func (b *LocalBackend) SetReaper(start func(home string) (begin func(), err error)) {
	b.store.SetReaper(func(h home.Dir) (func(), error) { return start(string(h)) })
}

// Close releases what the backend holds open. It is for programs that use many
// homes; volumes and file access of the backend must not be used afterwards.
func (b *LocalBackend) Close() error {
	b.open.closeIdle()
	return toPublic(b.store.Close())
}

// Home returns the absolute path of the home directory.
func (b *LocalBackend) Home() string { return string(b.home) }

// Kind returns BackendLocal.
func (b *LocalBackend) Kind() BackendKind { return BackendLocal }

// CreateVolume is [CreateVolumeFromSpec] in this home.
func (b *LocalBackend) CreateVolume(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	v, err := b.store.Create(ctx, spec.internal())
	if err != nil {
		return nil, toPublic(err)
	}
	return &Volume{b.describe(v)}, nil
}

// GetVolume is the function of that name in this home.
func (b *LocalBackend) GetVolume(ctx context.Context, name string) (*VolumeHandle, error) {
	v, err := b.store.Get(ctx, name)
	if err != nil {
		return nil, toPublic(err)
	}
	return &VolumeHandle{b.describe(v)}, nil
}

// ListVolumes is [ListVolumesWith] in this home.
func (b *LocalBackend) ListVolumes(ctx context.Context, opts ...VolumeListOption) ([]*VolumeHandle, error) {
	var filter volumeFilter
	for _, set := range opts {
		set(&filter)
	}
	list, err := b.store.List(ctx, volstore.Filter{Labels: filter.labels, LabelKeys: filter.keys})
	if filter.nothing {
		list = nil
	}
	handles := make([]*VolumeHandle, len(list))
	for i, v := range list {
		handles[i] = &VolumeHandle{b.describe(v)}
	}
	return handles, toPublic(err)
}

// RemoveVolume is the function of that name in this home.
func (b *LocalBackend) RemoveVolume(ctx context.Context, name string) error {
	return toPublic(b.store.Remove(ctx, name))
}

// DefaultVolume fails with kind [ErrUnsupportedOperation]: only cloud accounts
// have a default volume.
func (b *LocalBackend) DefaultVolume(context.Context) (*VolumeHandle, error) {
	return nil, unsupported("default volume", "", "only a cloud account has one")
}

func (b *LocalBackend) info() BackendInfo { return BackendInfo{Kind: BackendLocal} }

func (b *LocalBackend) volumePath(name string) string { return b.home.Volume(name) }

func (b *LocalBackend) removeVolume(ctx context.Context, v *volumeInfo) error {
	return v.byID("remove", b.store.RemoveID(ctx, v.id))
}

func (b *LocalBackend) setLabels(ctx context.Context, v *volumeInfo, labels map[string]string) error {
	_, err := b.store.SetLabels(ctx, v.id, copyLabels(labels))
	return v.byID("set labels", err)
}

func (b *LocalBackend) openVolume(ctx context.Context, v *volumeInfo) (*openVolume, error) {
	o, err := b.open.acquire(ctx, v)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		return nil, toPublic(goneVolume("open", v))
	}
	return o, toPublic(err)
}

// describe converts a record.
func (b *LocalBackend) describe(v *volstore.Volume) *volumeInfo {
	info := &volumeInfo{
		backend: b, id: v.ID, name: v.Name, kind: VolumeKind(v.Kind),
		quotaMiB: v.QuotaMiB, capacityBytes: uint64(max(0, v.CapacityBytes)),
		format: v.DiskFormat, fstype: v.DiskFstype, labels: v.Labels,
		path: v.Path, diskPath: v.DiskPath,
	}
	if !v.CreatedAt.IsZero() {
		info.createdAt = v.CreatedAt.UTC()
	}
	info.used = sync.OnceValue(func() uint64 {
		used, err := b.store.UsedBytes(context.Background(), v)
		if err != nil {
			return 0
		}
		return used
	})
	return info
}

// goneVolume is what every call on a removed volume gets: the store knows it
// only by id.
func goneVolume(op string, v *volumeInfo) error {
	e := errdefs.New(errdefs.VolumeNotFound, "volume %q has been removed", v.name)
	e.Op, e.Volume = op, v.name
	return e
}

func unsupported(op, volume, why string) *Error {
	msg := fmt.Sprintf("%s: %s", op, why)
	if volume != "" {
		msg = fmt.Sprintf("%s %q: %s", op, volume, why)
	}
	return &Error{Kind: ErrUnsupportedOperation, Message: msg}
}

// The default backend. It is the one piece of state of this package.
var chosen struct {
	sync.Mutex
	programmatic Backend
	// automatic is what the variables in env led to; it is kept until they
	// change, so that one process goes on with one backend.
	automatic Backend
	selection BackendInfo
	err       error
	env       [6]string
}

// SetDefaultBackend makes b the backend of this process, whatever the
// environment says; nil goes back to the environment. Existing volumes, handles
// and file access stay with their backend.
func SetDefaultBackend(b Backend) {
	chosen.Lock()
	defer chosen.Unlock()
	chosen.programmatic = b
}

// DefaultBackendInfo says which backend the package works on and why. The first
// of these decides: SetDefaultBackend, $MSB_BACKEND, $MSB_PROFILE, the
// configuration file's active_profile; otherwise it is local. A key alone
// selects nothing.
//
// Errors: kind [ErrInvalidConfig]; there is no falling back to another backend.
func DefaultBackendInfo() (BackendInfo, error) {
	chosen.Lock()
	defer chosen.Unlock()
	if b := chosen.programmatic; b != nil {
		info := b.info()
		info.Source = "programmatic"
		return info, nil
	}
	chooseBackend()
	return chosen.selection, chosen.err
}

// DefaultBackend returns the backend that the functions of this package use; see
// [DefaultBackendInfo] for how it is chosen.
func DefaultBackend() (Backend, error) { return defaultBackend() }

// defaultBackend is DefaultBackend.
func defaultBackend() (Backend, error) {
	chosen.Lock()
	defer chosen.Unlock()
	if chosen.programmatic != nil {
		return chosen.programmatic, nil
	}
	chooseBackend()
	if chosen.err != nil {
		return nil, chosen.err
	}
	if chosen.automatic == nil {
		return nil, unsupported("cloud backend", "", "not built into this version")
	}
	return chosen.automatic, nil
}

// localBackend returns the default backend if it is local; sandboxes and images
// have no other yet.
func localBackend() (*LocalBackend, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	local, ok := b.(*LocalBackend)
	if !ok {
		return nil, unsupported("sandbox", "", "only the local backend runs sandboxes in this version")
	}
	return local, nil
}

// chooseBackend fills automatic, selection and err. The lock is held.
func chooseBackend() {
	env := [...]string{os.Getenv(home.EnvVar), os.Getenv("HOME"), envOrUnset(envBackend), os.Getenv(envProfile),
		os.Getenv(envKey) + "\x00" + os.Getenv(envURL), os.Getenv(envConfig)}
	if chosen.env == env && (chosen.automatic != nil || chosen.err != nil || chosen.selection.Kind != "") {
		return
	}
	chosen.env, chosen.automatic = env, nil
	chosen.selection, chosen.err = selectBackend()
	if chosen.err == nil && chosen.selection.Kind == BackendLocal {
		var b *LocalBackend
		if b, chosen.err = NewLocalBackend(""); chosen.err == nil {
			chosen.automatic = b
		}
	}
}
