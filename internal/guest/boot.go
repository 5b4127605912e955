package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// boot puts the sandbox together as the supervisor says. Errors are *stepError.
func (a *agent) boot(b *agentproto.Boot) error {
	setClock(b.TimeNS)
	addEntropy(b.Entropy)
	a.root = &rootFS{initramfs: -1}
	steps := []struct {
		name string
		do   func() error
	}{
		{"root", func() error { return a.root.enter(b.Root, a.modules) }},
		{"system mounts", systemMounts},
		{"hostname", func() error { return setHostname(b.Hostname) }},
		{"network files", func() error { return writeNetworkFiles(b.Hostname) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return &stepError{s.name, err}
		}
	}
	if err := a.mountAll(b.Mounts); err != nil {
		return err
	}
	publicDirs()
	var err error
	if a.devNull, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return &stepError{"/dev/null", err}
	}
	a.modules.release()
	a.env, a.workdir, a.user = b.Env, b.Workdir, b.User
	return nil
}

// setClock sets the guest's clock if it is off by more than a second: the
// kernel has read the machine's clock at boot, but a restored guest has not.
func setClock(ns int64) {
	if ns == 0 {
		return
	}
	if off := time.Until(time.Unix(0, ns)); off.Abs() < time.Second {
		return
	}
	ts := unix.NsecToTimespec(ns)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		logf("agent: clock: %v", err)
	}
}

// systemMounts mounts what programs expect beside the image's own files.
func systemMounts() error {
	for _, m := range []struct {
		target, fstype string
		flags          uintptr
		data           string
		must           bool
	}{
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755", true},
		{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5", true},
		{"/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", true},
		{"/dev/mqueue", "mqueue", hardened, "", false},
		{"/proc", "proc", hardened, "", true},
		{"/sys", "sysfs", hardened, "", true},
		{"/sys/fs/cgroup", "cgroup2", hardened, "", false},
		{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755", true},
	} {
		err := mountSystem(m.target, m.fstype, m.flags, m.data)
		if err != nil && m.must {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
		"/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
	} {
		if name == "/dev/ptmx" {
			_ = os.Remove(name)
		}
		if err := os.Symlink(target, name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// mountSystem mounts one of them. In a bare sandbox the initramfs is the root
// and some are there already.
func mountSystem(target, fstype string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil && !mounted(target) {
		return err
	}
	err := unix.Mount(fstype, target, fstype, flags, data)
	if err == unix.EBUSY {
		return nil
	}
	return err
}

// mounted reports whether path is the root of a mount.
func mounted(path string) bool {
	var a, b unix.Stat_t
	return unix.Stat(path, &a) == nil && unix.Stat(filepath.Dir(path), &b) == nil && a.Dev != b.Dev
}

func setHostname(name string) error {
	if name == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	return writeIfUseless("/etc/hostname", name+"\n", func(string) bool { return false })
}

// writeNetworkFiles makes /etc/hosts and /etc/resolv.conf usable. What an image
// brings is kept unless it says nothing: builders often leave empty files.
func writeNetworkFiles(hostname string) error {
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	if hostname != "" && hostname != "localhost" {
		hosts += "127.0.1.1\t" + hostname + "\n"
	}
	names := func(text string) bool { return strings.Contains(text, "localhost") }
	if err := writeIfUseless("/etc/hosts", hosts, names); err != nil {
		return err
	}
	resolv := "# This sandbox has no network.\n"
	return writeIfUseless("/etc/resolv.conf", resolv, func(text string) bool { return strings.Contains(text, "nameserver") })
}

// writeIfUseless writes an /etc file unless it has useful contents. A read-only
// root is left as it is.
func writeIfUseless(path, text string, useful func(string) bool) error {
	if old, err := readSmall(path); err == nil && (useful(string(old)) || string(old) == text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return ignoreReadOnly(err)
	}
	if fi, err := os.Lstat(path); err == nil && !fi.Mode().IsRegular() {
		_ = os.Remove(path) // a link to a file of an init system that does not run here
	}
	return ignoreReadOnly(os.WriteFile(path, []byte(text), 0o644))
}

func ignoreReadOnly(err error) error {
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// publicDirs makes /tmp and /var/tmp usable for everybody, whatever was mounted
// there. A mount that does not let itself be changed is used as it is.
func publicDirs() {
	for _, dir := range []string{"/tmp", "/var/tmp"} {
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = unix.Chmod(dir, 0o1777)
		}
		if err = ignoreReadOnly(err); err != nil {
			logf("agent: %s: %v", dir, err)
		}
	}
}

// readSmall reads a regular file of at most 1 MiB. Programs may have put
// anything in its place; opening never blocks.
func readSmall(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	const limit = 1 << 20
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > limit {
		return nil, fmt.Errorf("%s is not a regular file of at most 1 MiB", path)
	}
	b := make([]byte, st.Size)
	n, err := unix.Read(fd, b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}
