package microsandbox

import (
	"context"
	"errors"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// VolumeUsage is what a volume holds and may hold.
//
// A directory volume is charged for what it says it holds: a file its size
// rounded up to 4 KiB, once whatever its links, holes included; a symlink nothing
// up to 59 bytes; a directory the blocks that it takes, but for the volume's first
// one; attributes of a file nothing up to 64 bytes, else rounded up to 4 KiB. Each
// name counts as one inode. A disk volume uses what its image takes on the host.
type VolumeUsage struct {
	UsedBytes   uint64
	UsedInodes  uint64  // 0 for a disk volume
	LimitBytes  *uint64 // nil: none
	LimitInodes *uint64 // nil: none

	// OrphanBytes of UsedBytes, and OrphanInodes of UsedInodes, are those of files
	// that were deleted and that a sandbox still has open; PendingBytes are in files
	// that were deleted, until every sandbox has said that it does not have them open.
	OrphanBytes, OrphanInodes, PendingBytes uint64
	// Writers is how many sandboxes and programs may change it now.
	Writers int
	// Exact is false when UsedBytes may be too high: while somebody writes, by 1 MiB
	// and 256 inodes for each that does; or, until the next walk, which comes by
	// itself, when a writer was killed at work, or the machine has booted.
	Exact bool
	// Uncounted says that there is no count to go by, and that UsedBytes is what a
	// walk has just found: the volume was adopted, or made before volumes were
	// counted, and nobody has written to it since; or, with Damaged, its count
	// cannot be understood. The next writer counts, and RescanUsage does. Exact
	// is false then.
	Uncounted, Damaged bool

	// AllocatedBytes is what the host's file system uses for it. It takes a walk:
	// nil where there was none.
	AllocatedBytes *uint64
	// FoundBytes and FoundInodes are what the walk of VerifyUsage or RescanUsage
	// found; nil where there was none.
	FoundBytes, FoundInodes *uint64
	// Quiet says that nothing changed during that walk.
	Quiet bool
}

// Matches reports whether a walk found what was counted, bytes and inodes, as far
// as it can tell: no more than that where only a bound is known. Nothing matches
// what was not counted.
func (u *VolumeUsage) Matches() bool {
	if u.FoundBytes == nil || u.FoundInodes == nil {
		return true
	}
	bytes, inodes := *u.FoundBytes+u.OrphanBytes, *u.FoundInodes+u.OrphanInodes
	switch {
	case u.Uncounted:
		return false
	case !u.Quiet:
		return true
	case !u.Exact:
		return bytes <= u.UsedBytes && inodes <= u.UsedInodes
	}
	return bytes == u.UsedBytes && inodes == u.UsedInodes
}

// Usage returns what the volume holds and may hold. Of a directory volume it
// reads a file beside the volume, whatever the volume's size. It walks a volume
// that is Uncounted, and a small one at the first look after a boot.
//
// Errors: kinds [ErrVolumeNotFound], [ErrFilesystem].
func (h *VolumeHandle) Usage(ctx context.Context) (*VolumeUsage, error) {
	return withoutFound(h.info.usage(ctx, func(b *LocalBackend, v *volstore.Volume) (volstore.Counted, error) {
		state, ok, err := b.store.UsedNow(ctx, v)
		if err == nil && !ok || errors.Is(err, ledger.ErrDamaged) {
			return b.store.Verify(ctx, v)
		}
		return volstore.Counted{State: state, Allocated: -1}, err
	}))
}

// withoutFound drops what a walk found that nobody asked to compare.
func withoutFound(u *VolumeUsage, err error) (*VolumeUsage, error) {
	if err == nil {
		u.FoundBytes, u.FoundInodes = nil, nil
	}
	return u, err
}

// AllocatedUsage is [VolumeHandle.Usage] with AllocatedBytes, which takes a walk.
// What it finds is counted from then on where only a bound was known and nobody
// writes: Exact is true then.
func (h *VolumeHandle) AllocatedUsage(ctx context.Context) (*VolumeUsage, error) {
	return withoutFound(h.info.usage(ctx, func(b *LocalBackend, v *volstore.Volume) (volstore.Counted, error) {
		return b.store.Survey(ctx, v)
	}))
}

// VerifyUsage walks the volume and tells what it found beside what was counted.
// It changes nothing. Errors as of Usage.
func (h *VolumeHandle) VerifyUsage(ctx context.Context) (*VolumeUsage, error) {
	return h.info.usage(ctx, func(b *LocalBackend, v *volstore.Volume) (volstore.Counted, error) {
		return b.store.Verify(ctx, v)
	})
}

// RescanUsage walks the volume and takes what it finds for what the volume holds:
// what programs did that wrote to the directory themselves. Sandboxes may have it
// attached, but must be idle for the time of the walk.
//
// Errors: kind [ErrFilesystem] while the volume is being changed, and those of Usage.
func (h *VolumeHandle) RescanUsage(ctx context.Context) (*VolumeUsage, error) {
	return h.info.usage(ctx, func(b *LocalBackend, v *volstore.Volume) (volstore.Counted, error) {
		return b.store.Recount(ctx, v.ID)
	})
}

// usage converts what measure says of the volume as it is now.
func (i *volumeInfo) usage(ctx context.Context, measure func(*LocalBackend, *volstore.Volume) (volstore.Counted, error)) (*VolumeUsage, error) {
	b, err := i.local("usage of volume")
	if err != nil {
		return nil, err
	}
	v, err := b.store.GetByID(ctx, i.id)
	if err != nil {
		return nil, i.byID("measure", err)
	}
	if v.Kind == volstore.KindDisk {
		n, err := b.store.UsedBytes(ctx, v)
		return &VolumeUsage{UsedBytes: n, LimitBytes: orNil(uint64(v.CapacityBytes)), Exact: true, AllocatedBytes: &n}, toPublic(err)
	}
	c, err := measure(b, v)
	if err != nil {
		if errors.Is(err, ledger.ErrBusy) {
			err = errdefs.Wrap(errdefs.Filesystem, err, "volume %q", v.Name).WithHint("try again when its sandboxes are idle, or stop them")
		}
		return nil, i.byID("measure", err)
	}
	return publicUsage(&c), nil
}

func publicUsage(c *volstore.Counted) *VolumeUsage {
	s := &c.State
	u := &VolumeUsage{
		UsedBytes: uint64(s.Used.Bytes), UsedInodes: uint64(s.Used.Inodes),
		LimitBytes: orNil(uint64(s.Limits.Bytes)), LimitInodes: orNil(uint64(s.Limits.Inodes)),
		OrphanBytes: uint64(max(s.Orphans.Bytes, 0)), OrphanInodes: uint64(max(s.Orphans.Inodes, 0)),
		PendingBytes: uint64(max(s.Pending.Bytes, 0)),
		Writers:      s.Writers, Exact: !s.Unsettled && !s.Busy, Uncounted: s.Uncounted, Damaged: c.Damaged, Quiet: c.Exact,
	}
	if c.Allocated >= 0 {
		allocated, bytes, inodes := uint64(c.Allocated), uint64(max(c.Found.Bytes, 0)), uint64(max(c.Found.Inodes, 0))
		u.AllocatedBytes, u.FoundBytes, u.FoundInodes = &allocated, &bytes, &inodes
		if s.Uncounted {
			u.UsedBytes, u.UsedInodes = bytes, inodes
		}
	}
	return u
}

// KnownUsedBytes is [VolumeHandle.UsedBytes] where it is known without a walk: of
// a directory volume that was written to since volumes are counted, and of a disk
// volume that has its image.
func (h *VolumeHandle) KnownUsedBytes() (used uint64, ok bool) {
	b, isLocal := h.info.backend.(*LocalBackend)
	if !isLocal {
		return 0, false
	}
	if h.info.kind == VolumeKindDisk {
		n := h.info.used()
		return n, n > 0 // the image has blocks, or is not there
	}
	v := volstore.Volume{}
	v.ID, v.Name, v.Kind = h.info.id, h.info.name, volstore.KindDir
	state, ok, err := b.store.Used(&v)
	return uint64(state.Used.Bytes), ok && err == nil
}

// VolumeLimits are what [VolumeHandle.SetQuota] sets; nil leaves a limit as it is.
type VolumeLimits struct {
	QuotaMiB *uint32 // 0: none
	Inodes   *uint64 // 0: the default, which goes with the quota: one per 4 KiB, at least 1024
}

// SetQuota changes the limits of a directory volume, attached or not, and returns
// a handle with the new ones. Its writers know them within a second. A limit below
// what the volume holds refuses growth and nothing else.
//
// After a crash each of the two is the old limit or the new one. Errors: kinds
// [ErrVolumeNotFound]; [ErrInvalidConfig] for a disk volume.
func (h *VolumeHandle) SetQuota(ctx context.Context, limits VolumeLimits) (*VolumeHandle, error) {
	b, err := h.info.local("set the quota of volume")
	if err != nil {
		return nil, err
	}
	q := volstore.Quota{MiB: limits.QuotaMiB}
	if limits.Inodes != nil {
		n := inodeLimit(*limits.Inodes)
		q.Inodes = &n
	}
	v, err := b.store.SetQuota(ctx, h.info.id, q)
	if err != nil {
		return nil, h.info.byID("set quota", err)
	}
	return &VolumeHandle{b.describe(v)}, nil
}

// inodeLimit converts a limit; one that is too large stays so, and is refused.
func inodeLimit(n uint64) int64 { return int64(min(n, volstore.MaxInodes+1)) }

// SetCounter makes start be called when there is a large volume to count: it
// should start a process that outlives this one and runs `msb count-volume ID` on
// the home, and return. Without it a goroutine counts, and what it does not get
// done before the program ends is left for the next writer. Call it before the
// backend is used.
func (b *LocalBackend) SetCounter(start func(home, id string) error) {
	b.store.SetCounter(func(h home.Dir, id string) error { return start(string(h), id) })
}
