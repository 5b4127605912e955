package volstore

import (
	"unicode/utf8"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Volume kinds.
const (
	KindDir  = "dir"
	KindDisk = "disk"
)

const mib = 1 << 20

// MaxName is the longest volume name in bytes. It is what fits the peer's
// temporary names too, so every volume can be moved between both.
const MaxName = 247

// Spec says what volume to create. The zero value of Kind means KindDir;
// QuotaMiB 0 means unlimited and SizeMiB 0 that no size was given.
type Spec struct {
	Name, Kind        string
	QuotaMiB, SizeMiB uint32 // MiB = 1<<20 bytes
	Labels            map[string]string
	// Inodes limits the files of a directory volume; 0 means the default, which
	// goes with the quota: see ledger.DefaultInodes.
	Inodes int64

	// ID is that of the new volume, a ULID of a caller that has written down
	// what it is about to make; "" means a new one.
	ID string
}

// ValidateName checks a volume name: ASCII letters, digits, '.', '-' and '_',
// the first a letter or digit, at most MaxName bytes. Errors: InvalidConfig.
func ValidateName(name string) error {
	if name == "" {
		return errdefs.New(errdefs.InvalidConfig, "volume name must not be empty")
	}
	if len(name) > MaxName {
		return errdefs.New(errdefs.InvalidConfig, "volume name has %d bytes, at most %d are allowed", len(name), MaxName)
	}
	for i := range len(name) {
		if !nameByte(name[i], i == 0) {
			return errdefs.New(errdefs.InvalidConfig, "volume name %q must start with an ASCII letter or digit and hold only letters, digits, '.', '-' and '_'", name)
		}
	}
	return nil
}

func nameByte(c byte, first bool) bool {
	switch {
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		return true
	}
	return !first && (c == '.' || c == '-' || c == '_')
}

// Validate checks everything that can be checked without looking at the home.
// Errors: InvalidConfig.
func (sp Spec) Validate() error {
	if err := ValidateName(sp.Name); err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return errdefs.New(errdefs.InvalidConfig, "volume %q: "+format, append([]any{sp.Name}, args...)...)
	}
	switch sp.Kind {
	case KindDir, "":
		if sp.SizeMiB != 0 {
			return bad("a directory volume has no size; limit it with a quota")
		}
	case KindDisk:
		if sp.QuotaMiB != 0 {
			return bad("a disk volume has no quota; its size is its limit")
		}
		if sp.Inodes != 0 {
			return bad("a disk volume has no limit of files (inodes); its file system is made for its size")
		}
		if sp.SizeMiB == 0 {
			return bad("a disk volume needs a size")
		}
		if sp.SizeMiB < diskimg.MinSizeMiB {
			return bad("a disk of %d MiB is too small for a file system: the smallest has %d MiB", sp.SizeMiB, diskimg.MinSizeMiB)
		}
	default:
		return bad("unknown kind %q, want %q or %q", sp.Kind, KindDir, KindDisk)
	}
	if err := validateInodes(sp.Name, sp.Inodes); err != nil {
		return err
	}
	return validateLabels(sp.Name, sp.Labels)
}

func validateLabels(name string, labels map[string]string) error {
	for k, v := range labels {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return errdefs.New(errdefs.InvalidConfig, "volume %q: label %q=%q is not UTF-8", name, k, v)
		}
	}
	return nil
}
