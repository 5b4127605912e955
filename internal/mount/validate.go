package mount

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Limits of path texts in bytes: PATH_MAX with its NUL, NAME_MAX.
const (
	maxPath = 4095
	maxName = 255
)

// separators cannot stand in host and guest paths: they end fields in mount
// flags and in stored and wire forms of other implementations.
const separators = ",:;"

// Validate checks mounts as a whole without looking at the host. The error is
// that of the first wrong mount in the caller's order; it names the mount's
// guest path, its kind and the option.
//
// Errors: [errdefs.InvalidConfig]; [errdefs.InvalidArgument] for words that are
// no mode, volume kind or policy at all.
func Validate(specs []Spec) error {
	v := validator{guests: map[string]bool{}, volumes: map[string]bool{}, alone: map[string]bool{}}
	for i := range specs {
		if err := v.add(&specs[i]); err != nil {
			return err
		}
	}
	return nil
}

// validator remembers the mounts accepted so far.
type validator struct {
	guests  map[string]bool // cleaned guest paths
	volumes map[string]bool // names of named mounts; true: as a disk volume
	alone   map[string]bool // of those, the ones with CacheAlways
	devices int
}

func (v *validator) add(s *Spec) error {
	if s.Problem != "" {
		return invalid(s, "%s", s.Problem)
	}
	for _, check := range []func(*Spec) error{
		checkGuest, checkKind, checkSource, checkWords, checkOptions, checkNamed, checkValues,
	} {
		if err := check(s); err != nil {
			return err
		}
	}
	return v.checkTogether(s)
}

// checkTogether checks s against the mounts before it.
func (v *validator) checkTogether(s *Spec) error {
	guest := CleanGuest(s.Guest)
	if v.guests[guest] {
		return invalid(s, "another mount has the same guest path")
	}
	v.guests[guest] = true
	if s.Kind == KindNamed {
		disk := normalVolumeKind(s.Named.Kind) == VolumeDisk
		before, seen := v.volumes[s.Source]
		if seen && (disk || before) {
			return diskTwice(s)
		}
		if seen && (s.Cache == CacheAlways || v.alone[s.Source]) {
			return alwaysTwice(s)
		}
		v.volumes[s.Source], v.alone[s.Source] = disk || before, s.Cache == CacheAlways
	}
	if s.Kind != KindTmpfs {
		v.devices++
	}
	if v.devices > MaxDevices {
		return invalid(s, "too many mounts: a sandbox has room for %d bind, named and disk mounts", MaxDevices).
			WithHint("tmpfs mounts are not counted; put several directories into one volume")
	}
	return nil
}

// invalid returns the error of a mount. The mount is named by kind and guest
// path, whatever else is wrong with it.
func invalid(s *Spec, format string, args ...any) *errdefs.Error {
	return errdefs.New(errdefs.InvalidConfig, "%s: %s", s, fmt.Sprintf(format, args...))
}

// String names the mount in messages: `bind mount at "/data"`.
func (s *Spec) String() string {
	if s.Kind == "" {
		return fmt.Sprintf("mount at %q", s.Guest)
	}
	return fmt.Sprintf("%s mount at %q", s.Kind, s.Guest)
}

// checkGuest applies the rules of guest paths.
func checkGuest(s *Spec) error {
	g := s.Guest
	switch {
	case g == "":
		return invalid(s, "the guest path is empty")
	case !strings.HasPrefix(g, "/"):
		return invalid(s, "the guest path must be absolute")
	case !utf8.ValidString(g) || strings.ContainsRune(g, 0):
		return invalid(s, "the guest path must be valid UTF-8 without NUL")
	case strings.ContainsAny(g, separators):
		return invalid(s, `the guest path must not contain "," ":" or ";"`)
	case slices.Contains(strings.Split(g, "/"), ".."):
		return invalid(s, `the guest path must not contain ".."`)
	case CleanGuest(g) == "/":
		return invalid(s, "the guest path must not be the root directory")
	case tooLong(CleanGuest(g)):
		return invalid(s, "the guest path is too long: %d bytes in all and %d in a name are possible", maxPath, maxName)
	}
	return checkReserved(s)
}

func tooLong(p string) bool {
	return len(p) > maxPath || slices.ContainsFunc(strings.Split(p, "/"), func(n string) bool { return len(n) > maxName })
}

// reserved are the guest's kernel file systems. A mount over them, or in them,
// would hide what every program and the agent itself rely on.
var reserved = []string{"/proc", "/sys", "/dev"}

// shared memory is an ordinary tmpfs that happens to lie below /dev.
const shmDir = "/dev/shm"

func checkReserved(s *Spec) error {
	g := CleanGuest(s.Guest)
	if within(g, shmDir) {
		return nil
	}
	for _, dir := range reserved {
		if within(g, dir) {
			return invalid(s, "%s belongs to the guest's kernel", dir).
				WithHint("choose a guest path outside of /proc, /sys and /dev (%s is allowed)", shmDir)
		}
	}
	return nil
}

// within reports whether clean absolute path p is dir or lies below it.
func within(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

// checkKind demands exactly one kind.
func checkKind(s *Spec) error {
	const hint = "set exactly one of bind, named, tmpfs and disk"
	if len(s.Kinds) > 1 {
		return invalid(s, "more than one kind is set: %s", strings.Join(s.Kinds, ", ")).WithHint(hint)
	}
	switch s.Kind {
	case KindBind, KindNamed, KindTmpfs, KindDisk:
		return nil
	case "":
		return invalid(s, "no kind is set").WithHint(hint)
	}
	return invalid(s, "unknown kind %q", s.Kind).WithHint(hint)
}

// checkSource checks the text of the host path or volume name.
func checkSource(s *Spec) error {
	switch s.Kind {
	case KindTmpfs:
		if s.Source != "" {
			return invalid(s, "a tmpfs has no source, got %q", s.Source)
		}
		return nil
	case KindNamed:
		return checkVolumeName(s)
	}
	switch p := s.Source; {
	case p == "":
		return invalid(s, "the host path is empty")
	case !utf8.ValidString(p) || strings.ContainsRune(p, 0):
		return invalid(s, "host path %q must be valid UTF-8 without NUL", p)
	case strings.ContainsAny(p, separators):
		return invalid(s, `host path %q must not contain "," ":" or ";"`, p)
	case tooLong(path.Clean(p)):
		return invalid(s, "the host path is too long: %d bytes in all and %d in a name are possible", maxPath, maxName)
	}
	return nil
}

// words are the options whose value is one of a fixed list.
var words = []struct {
	name    string
	value   func(*Spec) string
	allowed []string
	kind    errdefs.Kind
}{
	{"stat virtualization", func(s *Spec) string { return s.StatVirt }, []string{StatStrict, StatRelaxed, StatOff}, errdefs.InvalidArgument},
	{"host permissions", func(s *Spec) string { return s.HostPerms }, []string{PermsPrivate, PermsMirror}, errdefs.InvalidArgument},
	{"cache mode", func(s *Spec) string { return s.Cache }, []string{CacheAuto, CacheNone, CacheAlways}, errdefs.InvalidArgument},
	{"named volume mode", func(s *Spec) string { return s.Named.Mode }, []string{ModeExisting, ModeCreate, ModeEnsureExists, "ensure_exists"}, errdefs.InvalidArgument},
	{"volume kind", func(s *Spec) string { return s.Named.Kind }, []string{VolumeDir, "directory", VolumeDisk}, errdefs.InvalidArgument},
	{"disk image format", func(s *Spec) string { return s.Format }, []string{FormatRaw, FormatQcow2, FormatVmdk}, errdefs.InvalidConfig},
}

func checkWords(s *Spec) error {
	for _, w := range words {
		if got := w.value(s); got != "" && !slices.Contains(w.allowed, got) {
			e := invalid(s, "unknown %s %q", w.name, got).WithHint("%s is one of %s", w.name, strings.Join(w.allowed, ", "))
			e.Kind = w.kind
			return e
		}
	}
	return nil
}

// column is a set of columns of the table of options: a mount's kind, where
// named mounts differ by the kind of their volume.
type column uint8

const (
	onBind column = 1 << iota
	onNamedDir
	onNamedDisk
	onTmpfs
	onImage
)

// options is the table: which option is valid where. The four flags are valid
// everywhere and not listed.
var options = []struct {
	name  string
	isSet func(*Spec) bool
	valid column
	where string
}{
	{"size", func(s *Spec) bool { return s.SizeMiB != 0 }, onTmpfs, "tmpfs mounts"},
	{"quota", func(s *Spec) bool { return s.QuotaMiB != 0 }, onBind, "bind mounts and, as creation metadata, directory volumes"},
	{"format", func(s *Spec) bool { return s.Format != "" || s.FormatSet }, onImage, "disk image mounts"},
	{"fstype", func(s *Spec) bool { return s.Fstype != "" || s.FstypeSet }, onImage, "disk image mounts"},
	{"stat virtualization", func(s *Spec) bool { return s.StatVirt != "" }, onBind | onNamedDir, "mounts of directories: bind and directory volumes"},
	{"host permissions", func(s *Spec) bool { return s.HostPerms != "" }, onBind | onNamedDir, "mounts of directories: bind and directory volumes"},
	{"cache", func(s *Spec) bool { return s.Cache != "" }, onBind | onNamedDir, "mounts of directories: bind and directory volumes"},
	{"mode", func(s *Spec) bool { return s.Named.Mode != "" }, onNamedDir | onNamedDisk, "named mounts"},
	{"volume kind", func(s *Spec) bool { return s.Named.Kind != "" }, onNamedDir | onNamedDisk, "named mounts"},
	{"volume size", func(s *Spec) bool { return s.Named.SizeMiB != 0 }, onNamedDir | onNamedDisk, "named mounts of disk volumes"},
	{"volume quota", func(s *Spec) bool { return s.Named.QuotaMiB != 0 }, onNamedDir | onNamedDisk, "named mounts of directory volumes"},
	{"label", func(s *Spec) bool { return len(s.Named.Labels) != 0 }, onNamedDir | onNamedDisk, "named mounts"},
}

// columnOf returns the column of a mount whose volume, if it names one, is of
// volumeKind.
func columnOf(s *Spec, volumeKind string) column {
	switch s.Kind {
	case KindBind:
		return onBind
	case KindTmpfs:
		return onTmpfs
	case KindDisk:
		return onImage
	}
	if volumeKind == VolumeDisk {
		return onNamedDisk
	}
	return onNamedDir
}

func checkOptions(s *Spec) error { return checkOptionsFor(s, s.Named.Kind) }

// checkOptionsFor applies the table for a known kind of volume; Provision does
// it again when it has seen the volume of an existing name.
func checkOptionsFor(s *Spec, volumeKind string) error {
	col := columnOf(s, volumeKind)
	for _, o := range options {
		if o.isSet(s) && o.valid&col == 0 {
			return invalid(s, "option %s is not valid on %s", o.name, columnName(col)).
				WithHint("%s is an option of %s", o.name, o.where)
		}
	}
	return nil
}

func columnName(c column) string {
	switch c {
	case onBind:
		return "a bind mount"
	case onNamedDir:
		return "a mount of a directory volume"
	case onNamedDisk:
		return "a mount of a disk volume"
	case onTmpfs:
		return "a tmpfs mount"
	}
	return "a disk image mount"
}

// checkNamed checks the creation metadata of a named mount.
func checkNamed(s *Spec) error {
	if s.Kind != KindNamed {
		return nil
	}
	n := s.Named
	if !s.creates() {
		if what := creationMetadata(n); what != "" {
			return invalid(s, "%s is set, but the volume must exist already", what).
				WithHint("creation metadata needs mode create or ensure-exists")
		}
		return nil
	}
	switch normalVolumeKind(n.Kind) {
	case VolumeDir:
		if n.SizeMiB != 0 {
			return invalid(s, "a directory volume has no size").WithHint("limit it with a quota, or make it a disk volume")
		}
	case VolumeDisk:
		if n.QuotaMiB != 0 {
			return invalid(s, "a disk volume has no quota").WithHint("its size is its limit")
		}
		if n.SizeMiB == 0 && normalMode(n.Mode) == ModeCreate {
			return invalid(s, "a disk volume needs a size").WithHint("set the size in MiB")
		}
	}
	return checkVolumeSpec(s)
}

// creationMetadata names the first field that only makes sense for a volume
// that is made here, "" if there is none.
func creationMetadata(n Named) string {
	switch {
	case normalVolumeKind(n.Kind) != VolumeDir:
		return "volume kind " + n.Kind
	case n.SizeMiB != 0:
		return "a volume size"
	case n.QuotaMiB != 0:
		return "a volume quota"
	case len(n.Labels) != 0:
		return fmt.Sprintf("label %q", slices.Min(slices.Collect(maps.Keys(n.Labels))))
	}
	return ""
}

// checkValues checks values whose option is valid on the mount.
func checkValues(s *Spec) error {
	switch {
	case s.StatVirt == StatOff && s.HostPerms == PermsMirror:
		return invalid(s, "stat virtualization off and host permissions mirror contradict each other").
			WithHint("with stat virtualization off a guest's chmod reaches the host anyway: leave host permissions out")
	case s.FormatSet && s.Format == "":
		return invalid(s, "the format is empty")
	case s.FstypeSet && s.Fstype == "":
		return invalid(s, "the fstype is empty").WithHint("leave it out to have the guest probe the image")
	case s.Fstype != "" && !validFstype(s.Fstype):
		return invalid(s, `fstype %q must not contain "," ";" ":" "=", space or control characters`, s.Fstype)
	}
	return nil
}

// validFstype refuses separators of mount option texts and what no file system
// is called.
func validFstype(t string) bool {
	if len(t) > 64 || !utf8.ValidString(t) {
		return false
	}
	return !strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(",;:=", r) })
}

// alwaysTwice refuses a second mount of a volume of which one mount never looks
// again at what it has seen: the guest's kernel keeps a cache for each.
func alwaysTwice(s *Spec) error {
	return invalid(s, "volume %q is mounted twice in one sandbox, with cache=always", s.Source).
		WithHint("cache=always is for a volume with one mount; use cache=auto or cache=none for both")
}

// diskTwice refuses a second mount of one disk volume.
func diskTwice(s *Spec) error {
	return invalid(s, "disk volume %q is mounted twice in one sandbox", s.Source).
		WithHint("an ext4 image has one mount at a time; use a directory volume to mount it twice")
}
