package microsandbox

import (
	"maps"
	"slices"

	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// MountBuilder describes one mount of a sandbox step by step. Setters return
// the builder and never fail; [MountBuilder.Build] and CreateSandbox report
// what is wrong. Exactly one of Bind, Named, NamedWith, Tmpfs and Disk has to be
// called, once.
type MountBuilder struct {
	guest  string
	kinds  []MountKind // one for each call of a kind's setter
	source string      // of the last one
	named  *NamedVolumeBuilder

	format, fstype       string
	formatSet, fstypeSet bool
	options              MountOptions
	sizeMiB              uint32
	nilNamed             bool // the function of NamedWith returned no builder
}

// NewMountBuilder returns a builder of a mount at an absolute guest path. No
// kind is set; the mount is read-write without restrictions.
func NewMountBuilder(guest string) *MountBuilder { return &MountBuilder{guest: guest} }

// Bind mounts a directory of the host; changes are seen on both sides. The path
// must be valid UTF-8 without "," ":" and ";".
func (b *MountBuilder) Bind(host string) *MountBuilder { return b.kind(MountKindBind, host) }

// Named mounts a volume that exists.
func (b *MountBuilder) Named(name string) *MountBuilder { return b.kind(MountKindNamed, name) }

// NamedWith mounts a volume that exists, is made when the sandbox is created,
// or is made if needed, as f says. f is called at once and makes nothing.
func (b *MountBuilder) NamedWith(name string, f func(*NamedVolumeBuilder) *NamedVolumeBuilder) *MountBuilder {
	n := NewNamedVolumeBuilder(name)
	if f != nil {
		n = f(n)
	}
	b.named, b.nilNamed = n, n == nil
	return b.kind(MountKindNamed, name)
}

// Tmpfs mounts memory of the guest, limited by Size; its files are gone when
// the sandbox stops.
func (b *MountBuilder) Tmpfs() *MountBuilder { return b.kind(MountKindTmpfs, "") }

// Disk mounts the file system in a disk image file of the host. The format is
// the one of the file's extension, raw if that says nothing.
func (b *MountBuilder) Disk(host string) *MountBuilder { return b.kind(MountKindDisk, host) }

func (b *MountBuilder) kind(k MountKind, source string) *MountBuilder {
	b.kinds = append(b.kinds, k)
	b.source = source
	return b
}

// Format overrides the format of a disk image.
func (b *MountBuilder) Format(format DiskImageFormat) *MountBuilder {
	b.format, b.formatSet = string(format), true
	return b
}

// Fstype names the file system of a disk image, "ext4" for instance; without it
// the guest probes the image.
func (b *MountBuilder) Fstype(fstype string) *MountBuilder {
	b.fstype, b.fstypeSet = fstype, true
	return b
}

// Readonly refuses writes, in the guest and at the host.
func (b *MountBuilder) Readonly() *MountBuilder { b.options.Readonly = true; return b }

// Noexec refuses to execute files directly; interpreters can still read scripts.
func (b *MountBuilder) Noexec() *MountBuilder { b.options.Noexec = true; return b }

// Nosuid takes the effect from setuid and setgid bits.
func (b *MountBuilder) Nosuid() *MountBuilder { b.options.Nosuid = true; return b }

// Nodev takes the effect from device files.
func (b *MountBuilder) Nodev() *MountBuilder { b.options.Nodev = true; return b }

// StatVirtualization sets the policy for file metadata of a bind mount or a
// directory volume.
func (b *MountBuilder) StatVirtualization(policy StatVirtualization) *MountBuilder {
	b.options.StatVirtualization = policy
	return b
}

// HostPermissions sets whether chmod reaches the host's files of a bind mount
// or a directory volume.
func (b *MountBuilder) HostPermissions(policy HostPermissions) *MountBuilder {
	b.options.HostPermissions = policy
	return b
}

// Cache sets what the guest may keep of a bind mount or a directory volume.
func (b *MountBuilder) Cache(mode CacheMode) *MountBuilder { b.options.Cache = mode; return b }

// Size limits a tmpfs, in MiB; 0 leaves it to the guest's kernel.
func (b *MountBuilder) Size(mebibytes uint32) *MountBuilder { b.sizeMiB = mebibytes; return b }

// Build checks the mount and returns it. It makes nothing and does not look at
// the host.
//
// Errors: kind [ErrInvalidConfig]; [ErrInvalidArgument] for an unknown policy,
// mode or volume kind.
func (b *MountBuilder) Build() (VolumeMount, error) {
	s := b.spec()
	if err := mount.Validate([]mount.Spec{s}); err != nil {
		return VolumeMount{}, toPublic(err)
	}
	return VolumeMount{guest: mount.CleanGuest(s.Guest), config: configOf(s)}, nil
}

// spec returns what was set, with every mistake.
func (b *MountBuilder) spec() mount.Spec {
	if b == nil {
		return mount.Spec{Problem: "the mount function returned no builder"}
	}
	s := mount.Spec{
		Guest:     b.guest,
		Source:    b.source,
		Format:    b.format,
		FormatSet: b.formatSet,
		Fstype:    b.fstype,
		FstypeSet: b.fstypeSet,
		Readonly:  b.options.Readonly,
		Noexec:    b.options.Noexec,
		Nosuid:    b.options.Nosuid,
		Nodev:     b.options.Nodev,
		StatVirt:  string(b.options.StatVirtualization),
		HostPerms: string(b.options.HostPermissions),
		Cache:     string(b.options.Cache),
		SizeMiB:   b.sizeMiB,
	}
	setKinds(&s, b.kinds)
	if b.nilNamed {
		s.Problem = "the function of the named volume returned no builder"
	}
	if b.named != nil && s.Kind == mount.KindNamed {
		s.Source, s.Named = b.named.name, b.named.spec()
	}
	return s
}

// configOf returns a checked mount as a MountConfig.
func configOf(s mount.Spec) MountConfig {
	m := MountConfig{
		Tmpfs:              s.Kind == mount.KindTmpfs,
		Format:             s.Format,
		Fstype:             s.Fstype,
		Readonly:           s.Readonly,
		Noexec:             s.Noexec,
		Nosuid:             s.Nosuid,
		Nodev:              s.Nodev,
		SizeMiB:            s.SizeMiB,
		StatVirtualization: StatVirtualization(s.StatVirt),
		HostPermissions:    HostPermissions(s.HostPerms),
		Cache:              CacheMode(s.Cache),
	}
	switch s.Kind {
	case mount.KindBind:
		m.Bind = s.Source
	case mount.KindDisk:
		m.Disk = s.Source
	case mount.KindNamed:
		m.Named, m.NamedMode, m.NamedKind = s.Source, s.Named.Mode, s.Named.Kind
		m.SizeMiB, m.QuotaMiB = s.Named.SizeMiB, s.Named.QuotaMiB
		m.labels = encodeLabels(s.Named.Labels)
	}
	return m
}

// NamedVolumeBuilder says what to do about the volume of a named mount when the
// sandbox is created; see [MountBuilder.NamedWith]. The default is a volume that
// exists. Size, Quota, Label, Directory and Disk describe a volume that is made.
type NamedVolumeBuilder struct {
	name     string
	mode     string
	kind     string
	sizeMiB  uint32
	quotaMiB uint32
	labels   map[string]string
}

// NewNamedVolumeBuilder returns a builder for an existing volume.
func NewNamedVolumeBuilder(name string) *NamedVolumeBuilder {
	return &NamedVolumeBuilder{name: name}
}

// Existing demands that the volume exists. This is the default.
func (b *NamedVolumeBuilder) Existing() *NamedVolumeBuilder {
	b.mode = NamedVolumeModeExisting
	return b
}

// Create makes the volume when the sandbox is created and fails if there is one.
func (b *NamedVolumeBuilder) Create() *NamedVolumeBuilder { b.mode = NamedVolumeModeCreate; return b }

// EnsureExists makes the volume if it is missing. One that is there must be of
// the same kind and have the quota, size and labels set here; further labels do
// not matter, and it is never changed.
func (b *NamedVolumeBuilder) EnsureExists() *NamedVolumeBuilder {
	b.mode = NamedVolumeModeEnsureExists
	return b
}

// Name overrides the name given to NamedWith.
func (b *NamedVolumeBuilder) Name(name string) *NamedVolumeBuilder { b.name = name; return b }

// Directory makes a directory volume. This is the default. A size set before is
// cleared.
func (b *NamedVolumeBuilder) Directory() *NamedVolumeBuilder {
	b.kind, b.sizeMiB = mount.VolumeDir, 0
	return b
}

// Disk makes a disk volume, which needs a Size. A quota set before is cleared.
func (b *NamedVolumeBuilder) Disk() *NamedVolumeBuilder {
	b.kind, b.quotaMiB = mount.VolumeDisk, 0
	return b
}

// Size sets the capacity of a disk volume in MiB; 0 means not set.
func (b *NamedVolumeBuilder) Size(mebibytes uint32) *NamedVolumeBuilder {
	b.sizeMiB = mebibytes
	return b
}

// Quota limits a directory volume, in MiB; 0 means no limit.
func (b *NamedVolumeBuilder) Quota(mebibytes uint32) *NamedVolumeBuilder {
	b.quotaMiB = mebibytes
	return b
}

// Label attaches a label; for the same key the later value wins.
func (b *NamedVolumeBuilder) Label(key, value string) *NamedVolumeBuilder {
	if b.labels == nil {
		b.labels = map[string]string{}
	}
	b.labels[key] = value
	return b
}

func (b *NamedVolumeBuilder) spec() mount.Named {
	return mount.Named{
		Mode:     b.mode,
		Kind:     b.kind,
		SizeMiB:  b.sizeMiB,
		QuotaMiB: b.quotaMiB,
		Labels:   maps.Clone(b.labels),
	}
}

// mountEntry is one mount in the order the options named it: a key of
// SandboxConfig.Volumes, a builder, or a mount that was built.
type mountEntry struct {
	guest   string
	keyed   bool // Volumes[guest]
	builder *MountBuilder
	mount   *VolumeMount
}

// addMounts merges mounts into c.Volumes and notes their order; within one map
// that is the order of the guest paths.
func (c *SandboxConfig) addMounts(mounts map[string]MountConfig) {
	if c.Volumes == nil {
		c.Volumes = make(map[string]MountConfig, len(mounts))
	}
	for _, guest := range slices.Sorted(maps.Keys(mounts)) {
		c.Volumes[guest] = mounts[guest]
		c.mountBuilders = append(c.mountBuilders, mountEntry{guest: guest, keyed: true})
	}
}

// mountSpecs finalizes the mounts in the caller's order and checks them as a
// whole, without looking at the host. Entries of Volumes that no option named
// come last, by guest path.
func (c *SandboxConfig) mountSpecs() ([]mount.Spec, error) {
	specs := make([]mount.Spec, 0, len(c.Volumes)+len(c.mountBuilders))
	done := map[string]bool{}
	keyed := func(guest string) {
		if m, ok := c.Volumes[guest]; ok && !done[guest] {
			done[guest] = true
			specs = append(specs, m.spec(guest))
		}
	}
	for _, e := range c.mountBuilders {
		switch {
		case e.keyed:
			keyed(e.guest)
		case e.mount != nil:
			specs = append(specs, e.mount.config.spec(e.guest))
		default:
			s := e.builder.spec()
			if e.builder == nil {
				s.Guest = e.guest
			}
			specs = append(specs, s)
		}
	}
	for _, guest := range slices.Sorted(maps.Keys(c.Volumes)) {
		keyed(guest)
	}
	if err := mount.Validate(specs); err != nil {
		return nil, toPublic(err)
	}
	return specs, nil
}
