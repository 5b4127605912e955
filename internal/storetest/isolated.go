// Package storetest holds what tests of the records and the volume store share:
// a mount namespace of their own, small and read-only file systems, and
// children that are killed at a chosen instant.
package storetest

import (
	"cmp"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

const isolatedVar = "MSB_TEST_ISOLATED"

// Isolated runs the calling top-level test again in a child with a mount
// namespace of its own (and a user namespace, for an ordinary user), so that it
// may mount and nothing is left behind. It reports true inside the child; the
// parent gets false when the child has ended, and must return.
func Isolated(t *testing.T) bool {
	t.Helper()
	if os.Getenv(isolatedVar) == t.Name() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatalf("make mounts private: %v", err)
		}
		return true
	}
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	again(t, "a mount namespace", attr, isolatedVar+"="+t.Name())
	return false
}

// Somebody is an ordinary user.
const Somebody = 65534

// AsSomebody runs the calling top-level test again in a child as an ordinary user,
// if this one is root: what root may, shows nothing about permissions. It reports
// true where there is no root; the parent gets false when the child has ended, and
// must return.
func AsSomebody(t *testing.T) bool {
	t.Helper()
	if os.Getuid() != 0 {
		return true
	}
	dir, err := os.MkdirTemp("/tmp", "msb-test-somebody-") // the usual place may be root's alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, Somebody, Somebody); err != nil {
		prereq.Missing(t, "a user but root: %v", err)
	}
	again(t, "a user but root", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: Somebody, Gid: Somebody}}, "TMPDIR="+dir, "HOME="+dir)
	return false
}

// again runs the calling top-level test in a child; need is what that takes.
func again(t *testing.T, need string, attr *syscall.SysProcAttr, env ...string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), env...)
	attr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr, cmd.Dir = attr, "/"
	out, err := cmd.CombinedOutput()
	if errno, ok := isErrno(err); ok {
		prereq.Missing(t, "%s (%v)", need, errno)
		return
	}
	if err != nil {
		t.Errorf("with %s: %v\n%s", need, err, out)
	} else {
		t.Logf("%s", out)
	}
}

func isErrno(err error) (syscall.Errno, bool) {
	pe, ok := err.(*os.PathError)
	if !ok {
		return 0, false
	}
	errno, ok := pe.Err.(syscall.Errno)
	return errno, ok
}

// Tmpfs mounts a tmpfs of a size ("4m") and returns its path. Only inside Isolated.
func Tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=700"); err != nil {
		t.Fatalf("mount tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// Ext4 mounts a new ext4 of 32 MiB, made with more options of mkfs.ext4, and returns
// its path, which everybody can reach. Only inside Isolated.
func Ext4(t *testing.T, options ...string) string {
	t.Helper()
	base := t.TempDir()
	if err := os.Chmod(filepath.Dir(base), 0o755); err != nil {
		t.Fatal(err)
	}
	image, dir := filepath.Join(base, "image"), filepath.Join(base, "mnt")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	args := append(append([]string{"-q"}, options...), image)
	if out, err := exec.Command(prereq.Program(t, "mkfs.ext4", "e2fsprogs"), args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	prereq.LoopMount(t, image, dir, "rw")
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
	return dir
}

// MakeReadonly lets dir be read only, for root too. Only inside Isolated.
func MakeReadonly(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("bind %s: %v", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("remount %s read-only: %v", dir, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

// Fill takes all free space of the file system of dir with one file, and
// returns a function that gives it back.
func Fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	return func() { _ = os.Remove(path) }
}

// Memory returns a temporary directory in memory, for tests that make and kill
// many processes and would otherwise wait for the disk. With
// MSB_TEST_ON_DISK=1, or without a tmpfs at /dev/shm, it is an ordinary one.
// MSB_TEST_MEMORY names another place than /dev/shm.
func Memory(t testing.TB) string {
	t.Helper()
	var fs unix.Statfs_t
	in := cmp.Or(os.Getenv("MSB_TEST_MEMORY"), "/dev/shm")
	if os.Getenv("MSB_TEST_ON_DISK") == "1" || unix.Statfs(in, &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(in, "msb-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
