package confine

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// EnvUIDRange overrides the uids that programs started by root run under, as
// BASE:COUNT.
const EnvUIDRange = "MSB_UID_RANGE"

// IDRange is a range of numbers that are uids and gids of nobody else.
type IDRange struct{ Base, Count uint32 }

// defaultRanges are tried in order; the first that exists in our user
// namespace is used. The first lies above what systemd gives to containers,
// the second in a gap of its allocation that a container of 65536 ids has too.
var defaultRanges = []IDRange{{1_900_000_000, 65536}, {60578, 600}}

// uidLockDir holds the lock file of the ids in use. It belongs to the machine,
// not to a home: two homes must not take the same id.
const uidLockDir = "/run/microsandbox"

// ParseIDRange reads BASE:COUNT.
func ParseIDRange(s string) (IDRange, error) {
	base, count, ok := strings.Cut(s, ":")
	b, err1 := strconv.ParseUint(base, 10, 32)
	n, err2 := strconv.ParseUint(count, 10, 32)
	if !ok || err1 != nil || err2 != nil || b == 0 || n == 0 || b+n > 1<<32-1 {
		return IDRange{}, errdefs.New(errdefs.InvalidConfig, "uid range %q is not BASE:COUNT", s).
			WithHint("for instance %s=1900000000:65536", EnvUIDRange)
	}
	return IDRange{uint32(b), uint32(n)}, nil
}

// AcquireUID takes an id of the range that no other program holds. It is held
// as long as the returned file, or a copy inherited by a child, is open.
func AcquireUID(dir string, r IDRange) (uint32, *os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, nil, errdefs.Wrap(errdefs.IO, err, "uid locks")
	}
	f, err := os.OpenFile(filepath.Join(dir, "uids.lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, nil, errdefs.Wrap(errdefs.IO, err, "uid locks")
	}
	first := rand.Uint32N(r.Count)
	for i := range r.Count {
		uid := r.Base + (first+i)%r.Count
		lock := unix.Flock_t{Type: unix.F_WRLCK, Start: int64(uid), Len: 1}
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock)
		if err == nil {
			return uid, f, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return 0, nil, errdefs.Wrap(errdefs.IO, errors.Join(err, f.Close()), "lock uid %d", uid)
		}
	}
	_ = f.Close()
	return 0, nil, errdefs.New(errdefs.IO, "all %d uids from %d are in use", r.Count, r.Base).
		WithHint("set %s=BASE:COUNT to a larger unused range", EnvUIDRange)
}

// uidRange returns the range that the environment names, else the first
// default one that is mapped in our user namespace.
func uidRange() (IDRange, error) {
	if s := os.Getenv(EnvUIDRange); s != "" {
		return ParseIDRange(s)
	}
	for _, r := range defaultRanges {
		if mapped("/proc/self/uid_map", r) && mapped("/proc/self/gid_map", r) {
			return r, nil
		}
	}
	return IDRange{}, errdefs.New(errdefs.UnsupportedOperation, "this user namespace has no uids to spare").
		WithHint("set %s=BASE:COUNT to uids that nobody uses", EnvUIDRange)
}

// mapped tells whether all of r lies in one line of an id map.
func mapped(file string, r IDRange) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		var inside, outside, count uint64
		if _, err := fmt.Sscan(sc.Text(), &inside, &outside, &count); err != nil {
			continue
		}
		if inside <= uint64(r.Base) && uint64(r.Base)+uint64(r.Count) <= inside+count {
			return true
		}
	}
	return false
}
