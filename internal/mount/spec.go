package mount

import (
	"path"
	"slices"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
)

// Kinds of a mount.
const (
	KindBind  = "bind"  // a host directory
	KindNamed = "named" // a named volume of either kind
	KindTmpfs = "tmpfs" // guest memory
	KindDisk  = "disk"  // a disk image file of the host
)

// Modes of a named mount: what to do about the volume when a sandbox is
// created. "" is ModeExisting.
const (
	ModeExisting     = "existing"
	ModeCreate       = "create"
	ModeEnsureExists = "ensure-exists"
)

// Kinds of a named volume. "" is VolumeDir where a volume is made.
const (
	VolumeDir  = "dir"
	VolumeDisk = "disk"
)

// Stat virtualization and host permission policies; "" is the first of each.
const (
	StatStrict  = "strict"
	StatRelaxed = "relaxed"
	StatOff     = "off"

	PermsPrivate = "private"
	PermsMirror  = "mirror"
)

// Cache modes of a directory: what the guest's kernel may keep, and for how
// long. "" is CacheAuto.
const (
	CacheAuto   = "auto"   // one second
	CacheNone   = "none"   // nothing
	CacheAlways = "always" // for good: nobody else writes
)

// Disk image formats; "" takes the one the file name's extension says.
const (
	FormatRaw   = "raw"
	FormatQcow2 = "qcow2"
	FormatVmdk  = "vmdk"
)

// Spec is one mount as it was asked for and, after Provision, as it was
// resolved. It is data: it is stored as JSON with the sandbox and compared in
// tests. The zero value of a field means "not set".
type Spec struct {
	Guest  string `json:"guest"`            // path in the guest
	Kind   string `json:"kind"`             // KindBind ... KindDisk
	Source string `json:"source,omitempty"` // host path or volume name; "" for tmpfs

	Readonly bool `json:"readonly,omitempty"`
	Noexec   bool `json:"noexec,omitempty"`
	Nosuid   bool `json:"nosuid,omitempty"`
	Nodev    bool `json:"nodev,omitempty"`

	StatVirt  string `json:"stat_virtualization,omitempty"`
	HostPerms string `json:"host_permissions,omitempty"`
	Cache     string `json:"cache,omitempty"`

	SizeMiB  uint32 `json:"size_mib,omitempty"`  // tmpfs: limit; 0 = the kernel's default
	QuotaMiB uint32 `json:"quota_mib,omitempty"` // bind: what the guest may add; 0 = no limit
	Format   string `json:"format,omitempty"`    // disk
	Fstype   string `json:"fstype,omitempty"`    // disk; "" = the agent probes

	Named Named `json:"named,omitzero"`

	// Resolved is filled by Provision.
	Resolved Resolved `json:"resolved,omitzero"`

	// The rest only serves Validate, which has to refuse what the caller did
	// even where the value that was set equals "not set".

	// Kinds lists the kinds that were set when that was not exactly one.
	Kinds []string `json:"-"`
	// FormatSet and FstypeSet say that a value was given, be it empty.
	FormatSet, FstypeSet bool `json:"-"`
	// Problem is a mistake seen while the spec was put together: one lower-case
	// clause, reported as this mount's error.
	Problem string `json:"-"`
}

// Named says what to do about the volume of a named mount when the sandbox is
// created. It plays no part when the sandbox is started again.
type Named struct {
	Mode     string            `json:"mode,omitempty"`
	Kind     string            `json:"kind,omitempty"`      // of a volume that is made
	SizeMiB  uint32            `json:"size_mib,omitempty"`  // disk: capacity
	QuotaMiB uint32            `json:"quota_mib,omitempty"` // dir: limit; 0 = none
	Labels   map[string]string `json:"labels,omitempty"`
}

// Resolved is what Provision found on the host. Open demands the same objects.
type Resolved struct {
	VolumeID   string `json:"volume_id,omitempty"`   // named
	VolumeKind string `json:"volume_kind,omitempty"` // named: VolumeDir or VolumeDisk
	Made       bool   `json:"made,omitempty"`        // named: the volume was made for this sandbox
	MadeNS     int64  `json:"made_ns,omitempty"`     // made disk volume: modification time of the new image
	// Dev and Ino identify the directory or image behind a host path.
	Dev uint64 `json:"dev,omitempty"`
	Ino uint64 `json:"ino,omitempty"`
}

// CleanGuest normalizes a guest path: "." components, doubled and trailing
// slashes are removed. It is meant for paths that Validate accepts.
func CleanGuest(guest string) string { return path.Clean(guest) }

// FormatOf returns the format in force: the one given, else the one of the file
// name's extension. The extension's case matters: "A.QCOW2" is a raw image.
func (s *Spec) FormatOf() string {
	if s.Format != "" {
		return s.Format
	}
	return diskimg.FormatOf(s.Source)
}

// normalized spells every value the one way that later steps read: cleaned
// guest path, explicit mode, kind and policies.
func (s Spec) normalized() Spec {
	s.Guest = CleanGuest(s.Guest)
	switch s.Kind {
	case KindNamed:
		s.Named.Mode = normalMode(s.Named.Mode)
		s.Named.Kind = normalVolumeKind(s.Named.Kind)
	case KindDisk:
		s.Format = s.FormatOf()
	}
	return s
}

// normalMode also takes the spelling with an underscore.
func normalMode(mode string) string {
	switch mode {
	case "":
		return ModeExisting
	case "ensure_exists":
		return ModeEnsureExists
	}
	return mode
}

func normalVolumeKind(kind string) string {
	if kind == "" || kind == "directory" {
		return VolumeDir
	}
	return kind
}

// creates reports whether the mount may make its volume.
func (s *Spec) creates() bool {
	return s.Kind == KindNamed && normalMode(s.Named.Mode) != ModeExisting
}

// servesDirectory reports whether a resolved mount is a host directory, served
// by the file server.
func (s *Spec) servesDirectory() bool {
	return s.Kind == KindBind || s.Kind == KindNamed && s.Resolved.VolumeKind == VolumeDir
}

// parentsFirst sorts mounts so that each follows all mounts that contain its
// guest path: by depth, then by path.
func parentsFirst(specs []Spec) []Spec {
	out := slices.Clone(specs)
	slices.SortStableFunc(out, func(a, b Spec) int {
		da, db := strings.Count(a.Guest, "/"), strings.Count(b.Guest, "/")
		if da != db {
			return da - db
		}
		return strings.Compare(a.Guest, b.Guest)
	})
	return out
}
