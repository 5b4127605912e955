package microsandbox

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// RenameVolume gives a volume another name. Its id, contents and labels stay,
// and file access that is open goes on working.
//
// After a crash it has one of the two names. Errors: kinds [ErrVolumeNotFound],
// [ErrVolumeAlreadyExists], [ErrInvalidConfig], the last with cause
// [ErrVolumeInUse] while a sandbox has the volume.
func RenameVolume(ctx context.Context, from, to string) (*VolumeHandle, error) {
	b, err := localVolumes("rename volume", from)
	if err != nil {
		return nil, err
	}
	return b.RenameVolume(ctx, from, to)
}

// RenameVolume is the function of that name in this home.
func (b *LocalBackend) RenameVolume(ctx context.Context, from, to string) (*VolumeHandle, error) {
	return b.handle(b.store.Rename(ctx, from, to))
}

// Rename gives the volume another name, as [RenameVolume] does, and returns a
// handle with that name.
func (h *VolumeHandle) Rename(ctx context.Context, to string) (*VolumeHandle, error) {
	b, err := h.info.local("rename volume")
	if err != nil {
		return nil, err
	}
	v, err := b.store.RenameID(ctx, h.info.id, to)
	if err != nil {
		return nil, h.info.byID("rename", err)
	}
	return &VolumeHandle{b.describe(v)}, nil
}

// UpdateLabels sets the labels in set and removes the keys in remove, in one
// step, and returns a handle with the labels that the volume has then.
func (h *VolumeHandle) UpdateLabels(ctx context.Context, set map[string]string, remove ...string) (*VolumeHandle, error) {
	b, err := h.info.local("update labels of volume")
	if err != nil {
		return nil, err
	}
	v, err := b.store.EditLabels(ctx, h.info.id, copyLabels(set), remove)
	if err != nil {
		return nil, h.info.byID("set labels", err)
	}
	return &VolumeHandle{b.describe(v)}, nil
}

// VolumeAdoptOptions of [AdoptVolume]. With Kind "" a directory that holds
// disk.raw and nothing else becomes a disk volume, any other a directory volume.
type VolumeAdoptOptions struct {
	Kind     VolumeKind
	QuotaMiB uint32 // directory volumes only; 0: unlimited
	Labels   map[string]string
}

// AdoptVolume makes a volume of a directory that lies at a volume's place in the
// home and belongs to none, as it is. If name is a volume whose directory was
// replaced behind our back (restored from a backup), the volume takes the one
// that is there now; its other attributes stay.
//
// Errors: kinds [ErrVolumeNotFound] where there is no such directory,
// [ErrVolumeAlreadyExists] where it is the volume's own, [ErrInvalidConfig].
func AdoptVolume(ctx context.Context, name string, opt VolumeAdoptOptions) (*VolumeHandle, error) {
	b, err := localVolumes("adopt volume", name)
	if err != nil {
		return nil, err
	}
	return b.AdoptVolume(ctx, name, opt)
}

// AdoptVolume is the function of that name in this home.
func (b *LocalBackend) AdoptVolume(ctx context.Context, name string, opt VolumeAdoptOptions) (*VolumeHandle, error) {
	return b.handle(b.store.Adopt(ctx, name, volstore.AdoptOptions{
		Kind: string(opt.Kind), QuotaMiB: opt.QuotaMiB, Labels: copyLabels(opt.Labels),
	}))
}

// ResizeVolume makes a disk volume larger; sizes are MiB. A volume cannot
// shrink, and the size it has is no error. No sandbox may have it attached.
//
// The space takes none on the host before it is used. The file system in the
// volume grows when a sandbox next mounts it for writing; until then
// CapacityBytes is what it will have. A file system that cannot grow (it is
// damaged, say) stays usable at its old size: the sandbox starts all the same,
// its console says why, and each start tries again.
//
// After a crash the volume has its old size or the new one, and so it has after
// an error. A killed resize may also take effect when the volume is next attached.
//
// Errors: kinds [ErrVolumeNotFound]; [ErrInvalidConfig] for a directory volume,
// for a size below the present one, naming both, for one that the file system or
// the host's cannot have, and, with the cause [ErrVolumeInUse], for an attached
// volume; [ErrUnsupportedOperation] for an adopted volume without ext4.
func ResizeVolume(ctx context.Context, name string, sizeMiB uint32) (*VolumeHandle, error) {
	b, err := localVolumes("resize volume", name)
	if err != nil {
		return nil, err
	}
	return b.ResizeVolume(ctx, name, sizeMiB)
}

// ResizeVolume is the function of that name in this home.
func (b *LocalBackend) ResizeVolume(ctx context.Context, name string, sizeMiB uint32) (*VolumeHandle, error) {
	return b.handle(b.store.Grow(ctx, name, sizeMiB))
}

// VolumeHolder is who has a volume attached.
type VolumeHolder struct {
	Sandbox  string // name; "" for a program of its own
	PID      int    // of the sandbox's supervisor, or of the program
	Readonly bool
	Cache    CacheMode // CacheModeAlways of who therefore has it alone, else ""
	Since    time.Time
}

// Holders lists who has the volume attached now. It is the state of kernel locks,
// not of records: a holder that was killed is not in it.
//
// Errors: kind [ErrVolumeNotFound] when the volume is removed.
func (h *VolumeHandle) Holders(ctx context.Context) ([]VolumeHolder, error) {
	b, err := h.info.local("holders of volume")
	if err != nil {
		return nil, err
	}
	found, err := b.store.Holders(ctx, h.info.id)
	if err != nil {
		return nil, h.info.byID("list the holders of", err)
	}
	out := make([]VolumeHolder, len(found))
	for i, f := range found {
		out[i] = VolumeHolder{Sandbox: f.Sandbox, PID: f.PID, Readonly: f.Readonly, Cache: CacheMode(f.Cache), Since: f.Since}
	}
	return out, nil
}

// ProtectLabel is the label key that keeps a volume from being pruned, whatever
// its value.
const ProtectLabel = volstore.ProtectLabel

// VolumePruneOptions select what [PruneVolumes] removes: all that are set must
// hold. The zero value selects every volume.
type VolumePruneOptions struct {
	Labels    map[string]string // all must be present with equal values
	Kind      VolumeKind        // "": both
	OlderThan time.Duration     // created at least this long ago; 0: at any time
	DryRun    bool              // say what would be removed, remove nothing
	LabelKeys []string          // all must be present, with any value
}

// PrunedVolume is what [PruneVolumes] did with one volume that it selected.
type PrunedVolume struct {
	Name string
	ID   string
	// Kept is "protected" or "in use" for a volume that stays, otherwise "".
	Kept string
	// Err says who uses a volume, or why one could not be removed. Nil: it was
	// removed, would be, or is protected.
	Err error
}

// PruneVolumes removes the volumes that o selects, but never one that is
// attached nor one with a label [ProtectLabel]. It goes on after a failure: the
// result has an entry for every selected volume, newest first. A volume of a
// sandbox that is stopped is not attached.
func PruneVolumes(ctx context.Context, o VolumePruneOptions) ([]PrunedVolume, error) {
	b, err := localVolumes("prune volumes", "")
	if err != nil {
		return nil, err
	}
	return b.PruneVolumes(ctx, o)
}

// PruneVolumes is the function of that name in this home.
func (b *LocalBackend) PruneVolumes(ctx context.Context, o VolumePruneOptions) ([]PrunedVolume, error) {
	f := volstore.PruneFilter{Filter: volstore.Filter{Labels: o.Labels, LabelKeys: o.LabelKeys}, Kind: string(o.Kind), DryRun: o.DryRun}
	if o.OlderThan != 0 {
		f.Before = time.Now().Add(-o.OlderThan)
	}
	found, err := b.store.Prune(ctx, f)
	out := make([]PrunedVolume, len(found))
	for i, p := range found {
		out[i] = PrunedVolume{Name: p.Volume.Name, ID: p.Volume.ID, Kept: p.Kept, Err: toPublic(p.Err)}
	}
	return out, toPublic(err)
}

// VolumeFinding is something odd about a home.
type VolumeFinding struct {
	// Kind is stable: "unfinished-creation", "unfinished-removal",
	// "unfinished-rename", "unfinished-resize", "trash", "missing-state" are
	// remainders of killed programs, which changing calls mend; "bad-record" is an
	// edited record, which RepairVolumes restores if it has its copy; "stranger",
	// "missing-data", "foreign-data", "bad-image", "orphan-state" are for a person
	// to decide.
	Kind string
	Name string // of the volume, or of the stranger's directory; may be ""
	ID   string // of the volume; may be ""
	Path string
	// Detail says what can be done, Action what was done.
	Detail, Action string
}

// Done reports whether the finding was dealt with.
func (f VolumeFinding) Done() bool { return f.Action != "" }

// CheckVolumes looks for leftovers of killed programs, for directories that
// belong to no volume, and for volumes whose directory is missing or another
// one. It changes nothing.
func CheckVolumes(ctx context.Context) ([]VolumeFinding, error) {
	b, err := localVolumes("check volumes", "")
	if err != nil {
		return nil, err
	}
	return b.CheckVolumes(ctx)
}

// CheckVolumes is the function of that name in this home.
func (b *LocalBackend) CheckVolumes(ctx context.Context) ([]VolumeFinding, error) {
	return publicFindings(b.store.Check(ctx))
}

// RepairVolumes does at once what changing calls do by and by: it finishes or
// undoes what killed programs left. The result holds what was done and what is
// left to decide; with an error, what could not be done. Nothing is deleted that is
// not ours, so it is never needed and always safe.
func RepairVolumes(ctx context.Context) ([]VolumeFinding, error) {
	b, err := localVolumes("repair volumes", "")
	if err != nil {
		return nil, err
	}
	return b.RepairVolumes(ctx)
}

// RepairVolumes is the function of that name in this home.
func (b *LocalBackend) RepairVolumes(ctx context.Context) ([]VolumeFinding, error) {
	return publicFindings(b.store.Repair(ctx))
}

func publicFindings(found []volstore.Finding, err error) ([]VolumeFinding, error) {
	out := make([]VolumeFinding, len(found))
	for i, f := range found {
		out[i] = VolumeFinding{Kind: string(f.Kind), Name: f.Name, ID: f.ID, Path: f.Path, Detail: f.Detail, Action: f.Action}
	}
	return out, toPublic(err)
}

// handle converts what the store returns.
func (b *LocalBackend) handle(v *volstore.Volume, err error) (*VolumeHandle, error) {
	if err != nil {
		return nil, toPublic(err)
	}
	return &VolumeHandle{b.describe(v)}, nil
}

// localVolumes returns the default backend for an operation that only a local
// one has.
func localVolumes(op, volume string) (*LocalBackend, error) {
	b, err := defaultBackend()
	if err != nil {
		return nil, err
	}
	return (&volumeInfo{backend: b, name: volume}).local(op)
}

// local returns the volume's backend for an operation that only a local one has.
func (i *volumeInfo) local(op string) (*LocalBackend, error) {
	b, ok := i.backend.(*LocalBackend)
	if !ok {
		return nil, unsupported(op, i.name, "only the local backend does this in this version")
	}
	return b, nil
}

// byID names the volume in the error of a call that the store knows only by id.
func (i *volumeInfo) byID(op string, err error) error {
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		err = goneVolume(op, i)
	}
	var e *errdefs.Error
	if errors.As(err, &e) && i.name != "" {
		if e.Volume == i.id {
			e.Volume = i.name
		}
		e.Msg = strings.ReplaceAll(e.Msg, `"`+i.id+`"`, `"`+i.name+`"`)
	}
	return toPublic(err)
}
