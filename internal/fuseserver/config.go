package fuseserver

import (
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Config says what a Server serves and how. Empty strings mean the first value
// listed.
type Config struct {
	// Root is an O_PATH|O_DIRECTORY descriptor of the share, ProcSelfFd one of
	// /proc/self/fd, opened before confinement took /proc away. New
	// duplicates both.
	Root, ProcSelfFd int

	Readonly  bool
	StatVirt  string // "strict", "relaxed" or "off"
	HostPerms string // "private" or "mirror"; without meaning when StatVirt is "off"
	Cache     string // "auto", "none" or "always"

	// GuestUID and GuestGID own, in the guest's eyes, the files without an
	// overlay that belong to the server's user. All others belong to 65534.
	GuestUID, GuestGID uint32

	// FDBudget bounds the descriptors held for nodes and handles. 0 means
	// three quarters of the soft RLIMIT_NOFILE, at most 65536.
	FDBudget int
	// FDs counts the descriptors held. Servers of one process that share a
	// budget are given the same count; nil is a count of its own.
	FDs *atomic.Int64 `json:"-"`

	// Ledger, if set, is the file that what the guest changes is charged to; it
	// must be nobody else's. New takes it over. A read-only share has none.
	Ledger *os.File `json:"-"`

	// AsRoot says that the server has CAP_CHOWN and CAP_FOWNER: with StatVirt
	// "off" owners and modes are then set on the host as the guest sets them.
	AsRoot bool

	// Logf, if set, receives rare one-line notes about a misbehaving guest.
	Logf func(format string, args ...any) `json:"-"`
}

// statVirt, cacheMode are the parsed forms of the Config strings.
type statVirt uint8

const (
	virtStrict statVirt = iota
	virtRelaxed
	virtOff
)

type cacheMode uint8

const (
	cacheAuto cacheMode = iota
	cacheNone
	cacheAlways
)

// validity is how long the guest may keep names and attributes without asking
// again.
type validity struct {
	sec  uint64
	nsec uint32
}

// validities of the modes. That of auto leaves a tenth of the promised second to
// the request, the reply and the guest's clock, which counts in ticks.
var validities = [...]validity{cacheAuto: {0, 900e6}, cacheNone: {}, cacheAlways: {86400, 0}}

var (
	statVirts  = map[string]statVirt{"": virtStrict, "strict": virtStrict, "relaxed": virtRelaxed, "off": virtOff}
	hostPerms  = map[string]bool{"": false, "private": false, "mirror": true}
	cacheModes = map[string]cacheMode{"": cacheAuto, "auto": cacheAuto, "none": cacheNone, "always": cacheAlways}
)

// Validate reports the first bad value, as kind InvalidConfig.
func (c Config) Validate() error {
	if _, ok := statVirts[c.StatVirt]; !ok {
		return errdefs.New(errdefs.InvalidConfig, "unknown stat virtualization %q", c.StatVirt).
			WithHint("use strict, relaxed or off")
	}
	if _, ok := hostPerms[c.HostPerms]; !ok {
		return errdefs.New(errdefs.InvalidConfig, "unknown host permissions %q", c.HostPerms).
			WithHint("use private or mirror")
	}
	if _, ok := cacheModes[c.Cache]; !ok {
		return errdefs.New(errdefs.InvalidConfig, "unknown cache mode %q", c.Cache).
			WithHint("use auto, none or always")
	}
	if c.FDBudget != 0 && c.FDBudget < minBudget {
		return errdefs.New(errdefs.InvalidConfig, "descriptor budget %d is below %d", c.FDBudget, minBudget)
	}
	return nil
}

const (
	minBudget = 16
	maxBudget = 65536
)

// budget returns FDBudget or its default.
func (c Config) budget() (int, error) {
	if c.FDBudget != 0 {
		return c.FDBudget, nil
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return int(max(minBudget, min(maxBudget, lim.Cur/4*3))), nil
}

// probeName is a key of the reserved prefix that means nothing.
const probeName = overlayPrefix + "_probe"

// Probe reports whether the share at rootFd can be served with the given stat
// virtualization. Only "strict" needs anything: extended attributes of the
// user namespace on the root directory, writable unless readonly is set. On a
// read-only share nothing is written.
//
// Errors: kind UnsupportedOperation if the file system has no such attributes,
// InvalidConfig if they may not be written; both have a hint.
func Probe(rootFd int, statVirt string, readonly bool) error {
	if v, ok := statVirts[statVirt]; !ok || v != virtStrict {
		return Config{StatVirt: statVirt}.Validate()
	}
	dot := [2]byte{'.'}
	fd, err := openat(rootFd, &dot[0], unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != 0 {
		return probeError(err)
	}
	defer closeFd(fd)
	name := append([]byte(probeName), 0)
	if readonly {
		_, err = fgetxattr(fd, &name[0], make([]byte, 8))
		if err == unix.ENODATA || err == unix.ERANGE {
			err = 0
		}
	} else if err = fsetxattr(fd, &name[0], []byte{1}, 0); err == 0 {
		err = fremovexattr(fd, &name[0])
		if err == unix.ENODATA { // another server's probe removed it
			err = 0
		}
	}
	if err != 0 {
		return probeError(err)
	}
	return nil
}

func probeError(err errno) error {
	kind := errdefs.InvalidConfig
	why := fmt.Sprintf("the share's root does not take user extended attributes (%v)", err)
	switch err {
	case unix.EOPNOTSUPP:
		kind = errdefs.UnsupportedOperation
		why = "the share's file system has no user extended attributes"
	case unix.EROFS:
		return errdefs.Wrap(kind, err, "stat virtualization strict: the share is on a read-only file system").
			WithHint("mount it read-only")
	}
	return errdefs.Wrap(kind, err, "stat virtualization strict: %s", why).
		WithHint("use stat-virt=relaxed or stat-virt=off for this mount")
}
