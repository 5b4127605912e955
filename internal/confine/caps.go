package confine

import (
	"fmt"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

// capabilityNumber returns the number of a capability named as "CAP_CHOWN".
func capabilityNumber(name string) (capability.Cap, bool) {
	for _, c := range capability.ListKnown() {
		if "CAP_"+strings.ToUpper(c.String()) == name {
			return c, true
		}
	}
	return 0, false
}

// reduceCapabilities leaves the calling thread exactly the capabilities keep,
// in the permitted, effective and bounding set, and none in the inheritable
// and ambient sets. An execve as uid 0 gives the thread its
// bounding set again, which is the same; for others it leaves nothing.
//
// A thread without CAP_SETPCAP cannot reduce its bounding set; bounded is false
// then. With no_new_privs that set gives nobody anything.
func reduceCapabilities(keep []string) (bounded bool, err error) {
	want := make([]capability.Cap, 0, len(keep))
	for _, name := range keep {
		c, ok := capabilityNumber(name)
		if !ok {
			return false, fmt.Errorf("unknown capability %q", name)
		}
		want = append(want, c)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return false, fmt.Errorf("ambient set: %w", err)
	}
	bounded, err = reduceBounding(want)
	if err != nil {
		return false, err
	}
	return bounded, setCapabilities(want)
}

// reduceBounding must come before setCapabilities, which gives CAP_SETPCAP up.
func reduceBounding(want []capability.Cap) (bool, error) {
	keep := map[capability.Cap]bool{}
	for _, c := range want {
		keep[c] = true
	}
	for c := capability.Cap(0); c < 64; c++ {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if err != nil {
			return true, nil // beyond the last capability of this kernel
		}
		if has == 0 || keep[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err == unix.EPERM {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("bounding set: %w", err)
		}
	}
	return true, nil
}

func setCapabilities(want []capability.Cap) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for _, c := range want {
		data[c/32].Permitted |= 1 << (c % 32)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

// hasCapability tells whether the calling thread has c in effect.
func hasCapability(c int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// restoreEffective makes the permitted capabilities effective again, after a
// switch from uid 0 that kept them.
func restoreEffective() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i := range data {
		data[i].Effective = data[i].Permitted
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}
