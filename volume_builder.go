package microsandbox

import (
	"context"
	"maps"
	"math"

	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// VolumeConfig says what volume to create. The zero value but for the name is a
// directory volume without quota and labels.
type VolumeConfig struct {
	// QuotaMiB limits what a directory volume may hold, in MiB; 0: unlimited.
	QuotaMiB uint32
	// Kind is "" for a directory.
	Kind VolumeKind
	// SizeMiB is the size of a disk volume in MiB; 0: not set.
	SizeMiB uint32
	// Labels organize and filter volumes.
	Labels map[string]string
	// Name is the volume's name. A VolumeOption does not set it: CreateVolume
	// gets it separately.
	Name string
	// Inodes limits how many files, directories and further names a directory
	// volume may hold; 0: the default, which goes with the quota: one per 4 KiB of
	// it, at least 1024, and none without a quota.
	Inodes uint64
}

// VolumeSpec is VolumeConfig under its other name.
type VolumeSpec = VolumeConfig

// Validate checks everything that can be checked without storage.
//
// Errors: kind [ErrInvalidConfig].
func (c VolumeConfig) Validate() error { return toPublic(c.internal().Validate()) }

func (c VolumeConfig) internal() volstore.Spec {
	return volstore.Spec{
		Name: c.Name, Kind: string(c.Kind), QuotaMiB: c.QuotaMiB, SizeMiB: c.SizeMiB, Labels: maps.Clone(c.Labels),
		Inodes: inodeLimit(c.Inodes),
	}
}

// VolumeOption sets a field of a [VolumeConfig].
type VolumeOption func(*VolumeConfig)

// WithVolumeKind sets the kind.
func WithVolumeKind(kind VolumeKind) VolumeOption { return func(c *VolumeConfig) { c.Kind = kind } }

// WithVolumeSize sets the size of a disk volume in MiB.
func WithVolumeSize(mebibytes uint32) VolumeOption {
	return func(c *VolumeConfig) { c.SizeMiB = mebibytes }
}

// WithVolumeQuota limits a directory volume, in MiB; 0: unlimited.
func WithVolumeQuota(mebibytes uint32) VolumeOption {
	return func(c *VolumeConfig) { c.QuotaMiB = mebibytes }
}

// WithVolumeInodes limits the files of a directory volume; 0: the default.
func WithVolumeInodes(n uint64) VolumeOption { return func(c *VolumeConfig) { c.Inodes = n } }

// WithVolumeLabels adds labels; of equal keys the later one wins.
func WithVolumeLabels(labels map[string]string) VolumeOption {
	return func(c *VolumeConfig) { c.addLabels(labels) }
}

func (c *VolumeConfig) addLabels(labels map[string]string) {
	if len(labels) == 0 {
		return
	}
	if c.Labels == nil {
		c.Labels = make(map[string]string, len(labels))
	}
	maps.Copy(c.Labels, labels)
}

// VolumeListOption narrows what [ListVolumesWith] returns.
type VolumeListOption func(*volumeFilter)

type volumeFilter struct {
	labels  map[string]string
	keys    []string
	nothing bool // two values of one label are asked for
}

// WithVolumeListLabels selects the volumes that have all of these labels with
// these values; an empty value is one like others. A list with several such
// options selects what all of them do: with two values for one key, nothing.
func WithVolumeListLabels(labels map[string]string) VolumeListOption {
	return func(f *volumeFilter) {
		if f.labels == nil {
			f.labels = map[string]string{}
		}
		for k, v := range labels {
			if other, ok := f.labels[k]; ok && other != v {
				f.nothing = true
			}
			f.labels[k] = v
		}
	}
}

// WithVolumeListLabelKeys selects the volumes that have labels with all of these
// keys, whatever their values.
func WithVolumeListLabelKeys(keys ...string) VolumeListOption {
	return func(f *volumeFilter) { f.keys = append(f.keys, keys...) }
}

// VolumeBuilder collects a [VolumeSpec]. Setters never fail and do no I/O;
// everything is checked by Create. A builder is not safe for concurrent use.
type VolumeBuilder struct{ spec VolumeSpec }

// NewVolumeBuilder starts a directory volume without quota and labels.
func NewVolumeBuilder(name string) *VolumeBuilder {
	return NewVolumeBuilderFrom(VolumeSpec{Name: name})
}

// NewVolumeBuilderFrom starts from a copy of a spec.
func NewVolumeBuilderFrom(spec VolumeSpec) *VolumeBuilder {
	spec.Labels = maps.Clone(spec.Labels)
	return &VolumeBuilder{spec}
}

// Directory makes it a directory, mounted through virtiofs: the default.
func (b *VolumeBuilder) Directory() *VolumeBuilder { b.spec.Kind = VolumeKindDir; return b }

// Disk makes it a raw ext4 image, mounted through virtio-blk. It needs a size.
func (b *VolumeBuilder) Disk() *VolumeBuilder { b.spec.Kind = VolumeKindDisk; return b }

// Size sets the size of a disk volume in MiB.
func (b *VolumeBuilder) Size(mib uint32) *VolumeBuilder { b.spec.SizeMiB = mib; return b }

// Quota limits a directory volume, in MiB; 0: unlimited.
func (b *VolumeBuilder) Quota(mib uint32) *VolumeBuilder { b.spec.QuotaMiB = mib; return b }

// Inodes limits the files of a directory volume; 0: the default.
func (b *VolumeBuilder) Inodes(n uint64) *VolumeBuilder { b.spec.Inodes = n; return b }

// Label adds a label; of equal keys the later one wins.
func (b *VolumeBuilder) Label(key, value string) *VolumeBuilder {
	b.spec.addLabels(map[string]string{key: value})
	return b
}

// Build returns a copy of the spec. It creates nothing and checks nothing.
func (b *VolumeBuilder) Build() VolumeSpec {
	spec := b.spec
	spec.Labels = maps.Clone(spec.Labels)
	return spec
}

// Create is [CreateVolumeFromSpec] of Build.
func (b *VolumeBuilder) Create(ctx context.Context) (*Volume, error) {
	return CreateVolumeFromSpec(ctx, b.Build())
}

// MiB is n mebibytes as a size: n itself.
func MiB(n uint32) uint32 { return n }

// GiB is n gibibytes as a size in MiB. A size that does not fit is the largest
// one, 4 PiB less 1 MiB.
func GiB(n uint32) uint32 {
	if n > math.MaxUint32/1024 {
		return math.MaxUint32
	}
	return n * 1024
}
