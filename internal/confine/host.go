package confine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Host is what this process may do on this host. It does not change while the
// process lives.
type Host struct {
	// Privileged: namespaces, mounts and ids need no user namespace, as for a
	// process started by root.
	Privileged bool
	// Clone are the CLONE_NEW* flags that a child may be started with; with
	// CLONE_NEWUSER among them its ids are mapped to our own.
	Clone uintptr
	// Mounts: the kernel has open_tree and mount_setattr (Linux 5.12). Without
	// them the private root is put together by mount(2).
	Mounts bool
	// LandlockABI is 0 without Landlock.
	LandlockABI int
	Seccomp     bool

	refused error // why namespaces cannot be had
}

// PrivateRoot tells whether a program can get a root of its own.
func (h Host) PrivateRoot() bool { return h.Clone&unix.CLONE_NEWNS != 0 }

// InUserNamespace tells whether confined programs run in a user namespace.
func (h Host) InUserNamespace() bool { return h.Clone&unix.CLONE_NEWUSER != 0 }

// Inspect finds out what this process may do. The first call forks a few
// children that end at once; later calls return the same answer.
func Inspect() Host { return inspect() }

var inspect = sync.OnceValue(func() Host {
	h := Host{Mounts: mountsSupported(), Seccomp: seccompSupported()}
	if abi, err := ll.LandlockGetABIVersion(); err == nil {
		h.LandlockABI = abi
	}
	h.Clone, h.refused = probeNamespaces()
	h.Privileged = h.Clone&unix.CLONE_NEWUSER == 0 && hasCapability(unix.CAP_SETUID) &&
		hasCapability(unix.CAP_SETGID) && hasCapability(unix.CAP_SETPCAP)
	return h
})

const (
	mountAndPID = unix.CLONE_NEWNS | unix.CLONE_NEWPID
	otherSpaces = unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
)

// probeNamespaces returns the largest set of namespaces that a child can be
// started in, without a user namespace if that works. 0 comes with the reason.
func probeNamespaces() (uintptr, error) {
	var first error
	for _, user := range []uintptr{0, unix.CLONE_NEWUSER} {
		for _, set := range []uintptr{mountAndPID | otherSpaces, mountAndPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS, mountAndPID, unix.CLONE_NEWNS} {
			err := tryClone(user | set)
			if err == nil {
				return user | set, nil
			}
			first = err
		}
	}
	return 0, first
}

// tryClone starts a child in the namespaces and lets it mount in them, which
// is where a host that hands out powerless user namespaces says no. The child
// then executes a file that does not exist: ENOENT is success.
func tryClone(flags uintptr) error {
	attr := &syscall.ProcAttr{Sys: cloneAttr(flags)}
	attr.Sys.Unshareflags = unix.CLONE_NEWNS // makes the child remount / as private
	pid, err := syscall.ForkExec(noSuchFile, []string{noSuchFile}, attr)
	if err == nil {
		var status syscall.WaitStatus
		_, err = syscall.Wait4(pid, &status, 0, nil)
		return errors.Join(fmt.Errorf("%s was executed", noSuchFile), err)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

const noSuchFile = "/proc/self/msb-namespace-probe"

// stageCaps are what stage 1 needs in a user namespace: to mount, and to
// reduce its bounding set. Any id but 0 would lose them in execve otherwise.
var stageCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SETPCAP}

// cloneAttr returns how a child is started in the namespaces of flags.
func cloneAttr(flags uintptr) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Cloneflags: flags}
	if flags&unix.CLONE_NEWUSER != 0 {
		uid, gid := os.Geteuid(), os.Getegid()
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		attr.AmbientCaps = stageCaps
	}
	return attr
}

// mountsSupported asks for the calls by giving them a bad descriptor.
func mountsSupported() bool {
	_, err := unix.OpenTree(-1, "x", unix.OPEN_TREE_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return false
	}
	err = unix.MountSetattr(-1, "x", 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return !errors.Is(err, unix.ENOSYS)
}

// Report says, for each measure, whether this host allows it, what it costs if
// not, and how to mend it.
func Report() []Finding {
	h := Inspect()
	var fs []Finding
	for _, m := range []Measure{Namespaces, PIDNamespace, PrivateRoot, OwnUser, Capabilities, NoNewPrivs, Landlock, Seccomp} {
		fs = append(fs, h.finding(m))
	}
	return fs
}

// finding says how far measure m can go on this host.
func (h Host) finding(m Measure) Finding {
	f := Finding{Measure: m, Status: Applied}
	missing := func(detail, hint string) {
		f.Status, f.Detail, f.Hint = Missing, detail, hint
	}
	switch m {
	case Namespaces:
		if h.Clone&otherSpaces == 0 {
			missing(fmt.Sprintf("IPC, UTS and network namespaces: %v", h.reason()), userNamespaceHint())
		} else if h.Clone&otherSpaces != otherSpaces {
			f.Status, f.Detail = Weaker, "no network namespace: a QEMU or file server taken over can open connections"
		}
	case PIDNamespace:
		if h.Clone&unix.CLONE_NEWPID == 0 {
			missing(fmt.Sprintf("%v: a QEMU or file server taken over can signal your other processes", h.reason()), userNamespaceHint())
		}
	case PrivateRoot:
		if !h.PrivateRoot() {
			missing(fmt.Sprintf("%v: file access is bounded by Landlock alone", h.reason()), userNamespaceHint())
		}
	case OwnUser:
		if !h.Privileged {
			f.Status, f.Detail = Weaker, "not started by root: QEMU runs under your own uid"
		} else if _, err := uidRange(); err != nil {
			missing(err.Error(), "set "+EnvUIDRange+"=BASE:COUNT to uids that nobody uses")
		}
	case Landlock:
		switch {
		case h.LandlockABI == 0:
			missing("the kernel lacks Landlock or it is not enabled", "boot with lsm=landlock,... on Linux 5.19 or later")
		case h.LandlockABI < landlockMinABI:
			missing(fmt.Sprintf("Landlock ABI %d forbids every rename between directories", h.LandlockABI), "Linux 5.19 or later")
		}
	case Seccomp:
		if !h.Seccomp {
			missing("the kernel lacks seccomp filters", "a kernel with CONFIG_SECCOMP_FILTER")
		}
	}
	return f
}

func (h Host) reason() error {
	if h.refused != nil {
		return h.refused
	}
	return errors.New("not allowed here")
}

// userNamespaceHint names the switch that forbids user namespaces here.
func userNamespaceHint() string {
	for _, s := range []struct{ file, bad, fix string }{
		{"kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for msb that allows userns"},
		{"user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"},
	} {
		b, err := os.ReadFile(filepath.Join("/proc/sys", s.file))
		if err == nil && len(b) > 0 && string(b[:1]) == s.bad && len(b) <= 2 {
			return s.fix
		}
	}
	return "run as root, or allow user namespaces (in a container: its seccomp profile)"
}
