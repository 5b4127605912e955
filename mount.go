package microsandbox

import (
	"encoding/json"
	"maps"

	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// StatVirtualization says what a guest sees of and does to owners, modes and
// types of files in a mounted directory.
type StatVirtualization string

// Stat virtualization policies.
const (
	// StatVirtualizationDefault is StatVirtualizationStrict.
	StatVirtualizationDefault StatVirtualization = ""
	// StatVirtualizationStrict keeps the guest's owners, modes and special
	// files in an extended attribute. A host directory that cannot hold one
	// fails the launch.
	StatVirtualizationStrict StatVirtualization = "strict"
	// StatVirtualizationRelaxed does the same where it can and shows the
	// host's metadata where it cannot.
	StatVirtualizationRelaxed StatVirtualization = "relaxed"
	// StatVirtualizationOff shows the host's metadata and changes it.
	StatVirtualizationOff StatVirtualization = "off"
)

// HostPermissions says whether a guest's chmod reaches the host's files.
type HostPermissions string

// Host permission policies.
const (
	// HostPermissionsDefault is HostPermissionsPrivate.
	HostPermissionsDefault HostPermissions = ""
	// HostPermissionsPrivate keeps a guest's chmod from the host.
	HostPermissionsPrivate HostPermissions = "private"
	// HostPermissionsMirror gives the host's files and directories the
	// guest's rwx bits too. It excludes StatVirtualizationOff.
	HostPermissionsMirror HostPermissions = "mirror"
)

// CacheMode says what a guest may keep of a mounted directory instead of asking
// the host again, and so when it sees what somebody else writes there. What the
// guest itself writes is with the host when the call returns, in every mode.
type CacheMode string

// Cache modes.
const (
	// CacheModeDefault is CacheModeAuto.
	CacheModeDefault CacheMode = ""
	// CacheModeAuto shows names, attributes and data of other writers within
	// one second. It is for everything but locks around shared data.
	CacheModeAuto CacheMode = "auto"
	// CacheModeNone keeps nothing: every read and every stat asks the host
	// and sees what is there at that moment. Shared memory mappings fail
	// with ENODEV.
	CacheModeNone CacheMode = "none"
	// CacheModeAlways keeps everything for good. It is for a volume that one
	// sandbox uses and nobody else writes to: a second sandbox is refused,
	// and so is this mode while another sandbox has the volume. On a bind
	// mount nobody checks that.
	CacheModeAlways CacheMode = "always"
)

// DiskImageFormat is the format of a disk image file. The constants are untyped
// so that they fit both this type and [DiskOptions].
type DiskImageFormat string

// Disk image formats.
const (
	DiskImageFormatQcow2 = "qcow2" // QEMU copy-on-write, version 2 and 3
	DiskImageFormatRaw   = "raw"   // the bytes of the disk
	DiskImageFormatVmdk  = "vmdk"  // VMware, FLAT and ZERO extents without a parent
)

// NamedVolumeMode says what to do about a named mount's volume when a sandbox
// is created. The constants are untyped so that they fit both this type and
// [NamedVolumeOptions].
type NamedVolumeMode string

// Named volume modes.
const (
	NamedVolumeModeExisting     = "existing"      // it must exist; the default
	NamedVolumeModeCreate       = "create"        // it must not exist and is made
	NamedVolumeModeEnsureExists = "ensure-exists" // a compatible one is used, else it is made
)

// MountKind is the kind of a mount. The zero value means that none, or more
// than one, is set.
type MountKind uint8

// Mount kinds.
const (
	MountKindBind MountKind = iota + 1
	MountKindNamed
	MountKindTmpfs
	MountKindDisk
)

// String returns "bind", "named", "tmpfs" or "disk"; "" for no kind.
func (k MountKind) String() string {
	switch k {
	case MountKindBind:
		return mount.KindBind
	case MountKindNamed:
		return mount.KindNamed
	case MountKindTmpfs:
		return mount.KindTmpfs
	case MountKindDisk:
		return mount.KindDisk
	}
	return ""
}

// MountConfig is one mount of a sandbox: what is mounted and how. Exactly one
// of Bind, Named, Tmpfs and Disk is set; the [Mount] factory does that, and a
// struct literal works as well. Which other field goes with which kind is
// checked when the sandbox is created, not here. Values can be compared.
//
// Sizes are mebibytes, 0 means not set.
type MountConfig struct {
	Bind      string // host directory
	Named     string // volume name
	NamedMode string // NamedVolumeModeExisting ... ; "" is existing
	NamedKind string // "dir" or "disk", of a volume that is made; "" is dir
	// QuotaMiB is the quota of a directory volume that is made or, on a bind
	// mount, how much the guest may add.
	QuotaMiB uint32

	Tmpfs  bool
	Disk   string // host path of a disk image
	Format string // of the disk image; "" takes the one of the file's extension
	Fstype string // of the disk image; "" lets the guest probe it

	Readonly bool // writes fail, in the guest and at the host
	Noexec   bool // no file is executed directly
	Nosuid   bool // setuid and setgid bits have no effect
	Nodev    bool // device files have no effect

	// SizeMiB limits a tmpfs; with Named it is the capacity of a disk volume
	// that is made.
	SizeMiB uint32

	StatVirtualization StatVirtualization // of bind mounts and directory volumes
	HostPermissions    HostPermissions    // of bind mounts and directory volumes
	Cache              CacheMode          // of bind mounts and directory volumes

	// labels of a volume that is made, as canonical JSON: a map would make
	// the struct incomparable.
	labels string
	// mountQuotaMiB is MountOptions.QuotaMiB of a named mount, kept only to
	// be refused.
	mountQuotaMiB uint32
}

// Kind returns which kind is set, 0 if it is not exactly one.
func (m MountConfig) Kind() MountKind {
	if kinds := m.kinds(); len(kinds) == 1 {
		return kinds[0]
	}
	return 0
}

func (m MountConfig) kinds() []MountKind {
	var kinds []MountKind
	if m.Bind != "" {
		kinds = append(kinds, MountKindBind)
	}
	if m.Named != "" {
		kinds = append(kinds, MountKindNamed)
	}
	if m.Tmpfs {
		kinds = append(kinds, MountKindTmpfs)
	}
	if m.Disk != "" {
		kinds = append(kinds, MountKindDisk)
	}
	return kinds
}

// NamedLabels returns the labels of a volume that is made, nil if there are
// none.
func (m MountConfig) NamedLabels() map[string]string {
	if m.labels == "" {
		return nil
	}
	var labels map[string]string
	if err := json.Unmarshal([]byte(m.labels), &labels); err != nil {
		panic("microsandbox: labels of a mount are not what encodeLabels wrote: " + err.Error())
	}
	return labels
}

// encodeLabels returns labels in a comparable form; json sorts the keys.
func encodeLabels(labels map[string]string) string {
	if len(labels) == 0 {
		return ""
	}
	b, err := json.Marshal(labels)
	if err != nil {
		panic("microsandbox: a map of strings cannot be written: " + err.Error())
	}
	return string(b)
}

// spec returns the mount in the form the rest of the module works on. It keeps
// every mistake for Validate to find.
func (m MountConfig) spec(guest string) mount.Spec {
	s := mount.Spec{
		Guest:     guest,
		Readonly:  m.Readonly,
		Noexec:    m.Noexec,
		Nosuid:    m.Nosuid,
		Nodev:     m.Nodev,
		StatVirt:  string(m.StatVirtualization),
		HostPerms: string(m.HostPermissions),
		Cache:     string(m.Cache),
		Format:    m.Format,
		Fstype:    m.Fstype,
		SizeMiB:   m.SizeMiB,
		QuotaMiB:  m.QuotaMiB,
		Named:     mount.Named{Mode: m.NamedMode, Kind: m.NamedKind, Labels: m.NamedLabels()},
	}
	setKinds(&s, m.kinds())
	switch s.Kind {
	case mount.KindBind:
		s.Source = m.Bind
	case mount.KindNamed:
		s.Source = m.Named
		s.SizeMiB, s.Named.SizeMiB = 0, m.SizeMiB
		s.QuotaMiB, s.Named.QuotaMiB = m.mountQuotaMiB, m.QuotaMiB
	case mount.KindDisk:
		s.Source = m.Disk
	}
	return s
}

// setKinds sets the kind if it is exactly one, and otherwise what there is.
func setKinds(s *mount.Spec, kinds []MountKind) {
	if len(kinds) == 1 {
		s.Kind = kinds[0].String()
		return
	}
	for _, k := range kinds {
		s.Kinds = append(s.Kinds, k.String())
	}
}

// MountOptions are the options of bind and named mounts. The zero value mounts
// read-write, with programs, setuid bits and devices in effect.
type MountOptions struct {
	Readonly bool
	Noexec   bool
	Nosuid   bool
	Nodev    bool

	StatVirtualization StatVirtualization
	HostPermissions    HostPermissions
	Cache              CacheMode

	// QuotaMiB limits what the guest may add to a bind mount, in MiB; 0 means
	// no limit. On a named mount it is an error: the quota belongs to the
	// volume.
	QuotaMiB uint32
}

// NamedVolumeOptions say what to do about the volume of a named mount when the
// sandbox is created. Everything but Mode describes a volume that is made, or
// with ensure-exists the one that has to be there.
type NamedVolumeOptions struct {
	Mode     string // NamedVolumeModeExisting ...; "" is existing
	Kind     string // "dir" or "disk"; "" is dir
	SizeMiB  uint32 // capacity of a disk volume
	QuotaMiB uint32 // limit of a directory volume; 0 means none
	Labels   map[string]string
}

// TmpfsOptions are the options of tmpfs mounts.
type TmpfsOptions struct {
	SizeMiB  uint32 // limit; 0 leaves it to the guest's kernel: half of its memory
	Readonly bool
	Noexec   bool
	Nosuid   bool
	Nodev    bool
}

// DiskOptions are the options of disk image mounts.
type DiskOptions struct {
	Format   string // DiskImageFormatRaw ...; "" takes the one of the file's extension
	Fstype   string // "ext4" for instance; "" lets the guest probe the image
	Readonly bool
	Noexec   bool
	Nosuid   bool
	Nodev    bool
}

// Mount makes mounts, one method for each kind.
var Mount mountFactory

type mountFactory struct{}

// Bind mounts a directory of the host. Changes are seen on both sides. A
// relative path and symbolic links are resolved when the sandbox is created.
func (mountFactory) Bind(hostPath string, opts MountOptions) MountConfig {
	m := MountConfig{Bind: hostPath, QuotaMiB: opts.QuotaMiB}
	opts.apply(&m)
	return m
}

// Named mounts a volume that exists.
func (mountFactory) Named(name string, opts MountOptions) MountConfig {
	return Mount.NamedWith(name, opts, NamedVolumeOptions{})
}

// NamedWith mounts a volume that exists, is made, or is made if needed.
func (mountFactory) NamedWith(name string, opts MountOptions, namedOpts NamedVolumeOptions) MountConfig {
	m := MountConfig{
		Named:         name,
		NamedMode:     namedOpts.Mode,
		NamedKind:     namedOpts.Kind,
		SizeMiB:       namedOpts.SizeMiB,
		QuotaMiB:      namedOpts.QuotaMiB,
		labels:        encodeLabels(namedOpts.Labels),
		mountQuotaMiB: opts.QuotaMiB,
	}
	opts.apply(&m)
	return m
}

// Tmpfs mounts memory of the guest; its files are gone when the sandbox stops.
func (mountFactory) Tmpfs(opts TmpfsOptions) MountConfig {
	return MountConfig{
		Tmpfs:    true,
		SizeMiB:  opts.SizeMiB,
		Readonly: opts.Readonly,
		Noexec:   opts.Noexec,
		Nosuid:   opts.Nosuid,
		Nodev:    opts.Nodev,
	}
}

// Disk mounts the file system in a disk image file of the host.
func (mountFactory) Disk(hostPath string, opts DiskOptions) MountConfig {
	return MountConfig{
		Disk:     hostPath,
		Format:   opts.Format,
		Fstype:   opts.Fstype,
		Readonly: opts.Readonly,
		Noexec:   opts.Noexec,
		Nosuid:   opts.Nosuid,
		Nodev:    opts.Nodev,
	}
}

func (o MountOptions) apply(m *MountConfig) {
	m.Readonly, m.Noexec, m.Nosuid, m.Nodev = o.Readonly, o.Noexec, o.Nosuid, o.Nodev
	m.StatVirtualization, m.HostPermissions, m.Cache = o.StatVirtualization, o.HostPermissions, o.Cache
}

// VolumeMount is one checked mount with its place in the guest, made by
// [MountBuilder.Build] and added to a sandbox with [WithVolumeMounts].
type VolumeMount struct {
	guest  string
	config MountConfig
}

// Guest returns the guest path, normalized.
func (v VolumeMount) Guest() string { return v.guest }

// Config returns what is mounted there.
func (v VolumeMount) Config() MountConfig { return v.config }

// WithMounts adds mounts by guest path; for a path that was added before the
// later mount wins. Nothing is checked here: CreateSandbox does that before it
// pulls, makes or starts anything.
func WithMounts(mounts map[string]MountConfig) SandboxOption {
	mounts = maps.Clone(mounts)
	return func(c *SandboxConfig) { c.addMounts(mounts) }
}

// WithVolume adds one mount, described by a function that is called at once
// with a fresh builder. Mistakes are reported by CreateSandbox.
func WithVolume(guest string, f func(*MountBuilder) *MountBuilder) SandboxOption {
	return func(c *SandboxConfig) {
		b := NewMountBuilder(guest)
		if f != nil {
			b = f(b)
		}
		c.mountBuilders = append(c.mountBuilders, mountEntry{guest: guest, builder: b})
	}
}

// WithVolumeMounts adds mounts made by [MountBuilder.Build].
func WithVolumeMounts(mounts ...VolumeMount) SandboxOption {
	return func(c *SandboxConfig) {
		for _, m := range mounts {
			c.mountBuilders = append(c.mountBuilders, mountEntry{guest: m.guest, mount: &m})
		}
	}
}
