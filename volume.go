package microsandbox

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"
)

// VolumeKind says how a volume's bytes are kept.
type VolumeKind string

// Volume kinds; no other is accepted when a volume is created.
const (
	// VolumeKindDir keeps files in a host directory, mounted through virtiofs.
	VolumeKindDir VolumeKind = "dir"
	// VolumeKindDirectory is VolumeKindDir.
	VolumeKindDirectory = VolumeKindDir
	// VolumeKindDisk keeps a raw ext4 image, mounted through virtio-blk.
	VolumeKindDisk VolumeKind = "disk"
)

// Label is a key and its value.
type Label struct{ Key, Value string }

// CreateVolume provisions a named volume and returns a live handle to it.
//
// Sizes are mebibytes (1 MiB = 1<<20 bytes). A directory volume may have a quota
// (none: unlimited); a disk volume must have a size and gets an ext4 image of
// exactly that size, allocated sparsely. A name begins with an ASCII letter or
// digit and consists of those and ".", "-", "_".
//
// The record is durable when CreateVolume returns. After a crash the volume is
// absent or complete, never half made; cancelling ctx leaves nothing behind.
//
// Errors: kinds [ErrVolumeAlreadyExists], [ErrInvalidConfig], [ErrCancelled]; the
// cause names the volume.
func CreateVolume(ctx context.Context, name string, opts ...VolumeOption) (*Volume, error) {
	var spec VolumeSpec
	for _, set := range opts {
		set(&spec)
	}
	spec.Name = name
	return CreateVolumeFromSpec(ctx, spec)
}

// CreateVolumeFromSpec is [CreateVolume] with everything in one value.
func CreateVolumeFromSpec(ctx context.Context, spec VolumeSpec) (*Volume, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	return b.CreateVolume(ctx, spec)
}

// GetVolume returns a handle to an existing volume. It works on a full disk and
// in a home that cannot be written.
//
// Errors: kind [ErrVolumeNotFound].
func GetVolume(ctx context.Context, name string) (*VolumeHandle, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	return b.GetVolume(ctx, name)
}

// ListVolumes returns handles of all named volumes, newest first; volumes made
// in the same instant are in the order of their ids. With an error about volumes
// whose records were damaged, of kind [ErrFilesystem], it returns the others.
func ListVolumes(ctx context.Context) ([]*VolumeHandle, error) { return ListVolumesWith(ctx) }

// ListVolumesWith is [ListVolumes] of the volumes that all options select.
func ListVolumesWith(ctx context.Context, opts ...VolumeListOption) ([]*VolumeHandle, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	return b.ListVolumes(ctx, opts...)
}

// RemoveVolume deletes a volume and its contents. The name can be used again at
// once; large contents are deleted in the background. After a crash the volume
// is there or it is not, and the next command finishes the rest.
//
// Errors: kinds [ErrVolumeNotFound]; [ErrInvalidConfig] with cause
// [ErrVolumeInUse] while a sandbox has it, naming who.
func RemoveVolume(ctx context.Context, name string) error {
	b, err := defaultBackend()
	if err != nil {
		return err
	}
	return b.RemoveVolume(ctx, name)
}

// GetDefaultVolume returns the volume that every cloud account has and that has
// no name. The local backend has none.
//
// Errors: kind [ErrUnsupportedOperation] on the local backend.
func GetDefaultVolume(ctx context.Context) (*VolumeHandle, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	return b.DefaultVolume(ctx)
}

// volumeInfo is what Volume and VolumeHandle are made of: a record as it was
// read, and the backend it came from. It never changes.
type volumeInfo struct {
	backend       Backend
	id, name      string
	kind          VolumeKind
	quotaMiB      uint32 // 0: none
	capacityBytes uint64 // 0: none
	format        string
	fstype        string
	labels        map[string]string
	createdAt     time.Time
	path          string // "" on a cloud backend
	diskPath      string // "" but for a local disk volume
	used          func() uint64
	cloud         *VolumeCloudState
}

// orNil returns a pointer to a copy of v, nil for the zero value.
func orNil[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func (i *volumeInfo) files() *VolumeFs {
	f := &VolumeFs{backend: i.backend, name: i.name}
	f.volume.Store(i)
	return f
}

// Volume is a live volume. It stays bound to the backend it was created on and,
// by its id, to this very volume: it never means a later one of the same name.
// Its methods may be called from several goroutines.
type Volume struct{ info *volumeInfo }

// Name returns the unique name.
func (v *Volume) Name() string { return v.info.name }

// Kind returns how the bytes are kept.
func (v *Volume) Kind() VolumeKind { return v.info.kind }

// FS gives access to the files from the host, without a running sandbox.
func (v *Volume) FS() *VolumeFs { return v.info.files() }

// Path returns the data directory on this host, "" on a cloud backend.
func (v *Volume) Path() string { return v.info.path }

// HostPath is [Volume.Path] with an error of kind [ErrUnsupportedOperation]
// where there is none.
func (v *Volume) HostPath() (string, error) {
	if v.info.path == "" {
		return "", unsupported("host path", v.info.name, "the cloud backend keeps the bytes elsewhere")
	}
	return v.info.path, nil
}

// DiskPath returns the image file of a local disk volume, otherwise nil.
func (v *Volume) DiskPath() *string { return orNil(v.info.diskPath) }

// CapacityBytes returns the size of a disk volume in bytes, nil for a directory.
func (v *Volume) CapacityBytes() *uint64 { return orNil(v.info.capacityBytes) }

// DiskFormat returns "raw" for a disk volume, nil for a directory.
func (v *Volume) DiskFormat() *string { return orNil(v.info.format) }

// DiskFstype returns "ext4" for a disk volume, nil for a directory.
func (v *Volume) DiskFstype() *string { return orNil(v.info.fstype) }

// BackendKind returns where the volume lives.
func (v *Volume) BackendKind() BackendKind { return v.info.backend.Kind() }

// Local returns what only a local volume has, nil for a cloud volume.
func (v *Volume) Local() *VolumeLocalState {
	if v.info.cloud != nil {
		return nil
	}
	return &VolumeLocalState{
		Path: v.info.path, Kind: v.info.kind, CapacityBytes: v.CapacityBytes(),
		DiskFormat: v.DiskFormat(), DiskFstype: v.DiskFstype(),
	}
}

// Cloud returns what only a cloud volume has, nil for a local one.
func (v *Volume) Cloud() *VolumeCloudState { return v.info.cloud.clone() }

// Remove deletes this volume and its contents, as [RemoveVolume] does.
func (v *Volume) Remove(ctx context.Context) error { return v.info.backend.removeVolume(ctx, v.info) }

// VolumeHandle is an existing volume as it was when the handle was made. It
// stays bound to its backend and, by its id, to this very volume. Its methods
// may be called from several goroutines.
type VolumeHandle struct{ info *volumeInfo }

// Name returns the unique name; "" for a cloud account's default volume.
func (h *VolumeHandle) Name() string { return h.info.name }

// Kind returns how the bytes are kept.
func (h *VolumeHandle) Kind() VolumeKind { return h.info.kind }

// IsDefault reports whether this is a cloud account's default volume.
func (h *VolumeHandle) IsDefault() bool {
	return h.info.cloud != nil && h.info.cloud.Kind == "host"
}

// FS gives access to the files from the host, without a running sandbox.
func (h *VolumeHandle) FS() *VolumeFs { return h.info.files() }

// Path returns the data directory on this host, "" on a cloud backend.
func (h *VolumeHandle) Path() string { return h.info.path }

// DiskPath returns the image file of a local disk volume, otherwise nil.
func (h *VolumeHandle) DiskPath() *string { return orNil(h.info.diskPath) }

// UsedBytes returns how much the volume holds, in bytes: for a directory the sum
// of charges as [VolumeUsage] explains them, for a disk the allocated bytes of the
// image. It is read once per handle, at the first call; 0 if that fails.
func (h *VolumeHandle) UsedBytes() uint64 { return h.info.used() }

// QuotaMiB returns the limit of a directory volume in MiB, nil for none.
func (h *VolumeHandle) QuotaMiB() *uint32 { return orNil(h.info.quotaMiB) }

// CapacityBytes returns the size of a disk volume in bytes, nil for a directory.
func (h *VolumeHandle) CapacityBytes() *uint64 { return orNil(h.info.capacityBytes) }

// DiskFormat returns "raw" for a disk volume, nil for a directory.
func (h *VolumeHandle) DiskFormat() *string { return orNil(h.info.format) }

// DiskFstype returns "ext4" for a disk volume, nil for a directory.
func (h *VolumeHandle) DiskFstype() *string { return orNil(h.info.fstype) }

// Labels returns a copy of the labels; it is never nil.
func (h *VolumeHandle) Labels() map[string]string { return copyLabels(h.info.labels) }

// LabelPairs returns the labels in the order of their keys.
func (h *VolumeHandle) LabelPairs() []Label {
	pairs := make([]Label, 0, len(h.info.labels))
	for k, v := range h.info.labels {
		pairs = append(pairs, Label{k, v})
	}
	slices.SortFunc(pairs, func(a, b Label) int { return strings.Compare(a.Key, b.Key) })
	return pairs
}

// CreatedAt returns when the volume was created, in UTC; the zero time if that
// is not recorded.
func (h *VolumeHandle) CreatedAt() time.Time { return h.info.createdAt }

// BackendKind returns where the volume lives.
func (h *VolumeHandle) BackendKind() BackendKind { return h.info.backend.Kind() }

// Local returns what only a local volume has, nil for a cloud volume.
func (h *VolumeHandle) Local() *VolumeHandleLocalState {
	if h.info.cloud != nil {
		return nil
	}
	return &VolumeHandleLocalState{
		ID: h.info.id, Path: h.info.path, QuotaMiB: h.QuotaMiB(), Kind: h.info.kind, UsedBytes: h.UsedBytes(),
		CapacityBytes: h.CapacityBytes(), DiskFormat: h.DiskFormat(), DiskFstype: h.DiskFstype(),
		Labels: h.Labels(), CreatedAt: h.info.createdAt,
	}
}

// Cloud returns what only a cloud volume has, nil for a local one.
func (h *VolumeHandle) Cloud() *VolumeHandleCloudState { return h.info.cloud.clone() }

// Remove deletes this volume and its contents, as [RemoveVolume] does. When it
// is gone already the error is of kind [ErrVolumeNotFound], also if another
// volume has its name by now: that one is not touched.
func (h *VolumeHandle) Remove(ctx context.Context) error {
	return h.info.backend.removeVolume(ctx, h.info)
}

// SetLabels replaces the labels of the volume. The handle keeps those it was
// made with; get the volume again to see the new ones.
func (h *VolumeHandle) SetLabels(ctx context.Context, labels map[string]string) error {
	return h.info.backend.setLabels(ctx, h.info, labels)
}

// VolumeLocalState is what only a volume of the local backend has.
type VolumeLocalState struct {
	Path          string // data directory on this host
	Kind          VolumeKind
	CapacityBytes *uint64
	DiskFormat    *string
	DiskFstype    *string
}

// VolumeHandleLocalState is what only a handle of the local backend has.
type VolumeHandleLocalState struct {
	ID            string // of the record: a ULID, never used twice
	Path          string // data directory on this host
	QuotaMiB      *uint32
	Kind          VolumeKind
	UsedBytes     uint64 // as VolumeHandle.UsedBytes
	CapacityBytes *uint64
	DiskFormat    *string
	DiskFstype    *string
	Labels        map[string]string
	CreatedAt     time.Time
}

// VolumeCloudState is what only a volume of a cloud backend has.
type VolumeCloudState struct {
	ID            string // the server's UUID
	UsedBytes     *uint64
	CapacityBytes *uint64 // storage limit
	Labels        map[string]string
	Kind          string // "host": the account's default volume; "managed": a named one
	Status        string // "active" or "deleting"
	CreatedAt     time.Time
	UpdatedAt     time.Time
}

// VolumeHandleCloudState is [VolumeCloudState].
type VolumeHandleCloudState = VolumeCloudState

func (s *VolumeCloudState) clone() *VolumeCloudState {
	if s == nil {
		return nil
	}
	c := *s
	c.Labels = copyLabels(s.Labels)
	return &c
}

func copyLabels(labels map[string]string) map[string]string {
	c := make(map[string]string, len(labels))
	maps.Copy(c, labels)
	return c
}
