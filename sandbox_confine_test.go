package microsandbox_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/confine/confinetest"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// openFile is one entry of /proc/PID/fd.
type openFile struct {
	fd       int
	target   string // a socket or pipe without its number
	writable bool
}

// openFiles lists the descriptors of a process but those the kernel makes for
// waiting (eventfd, epoll, signalfd), which lead nowhere.
func openFiles(t *testing.T, pid int) []openFile {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var out []openFile
	for _, e := range entries {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		if err != nil || slices.Contains([]string{"anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[signalfd]"}, to) {
			continue
		}
		info := confinetest.Status(t, fmt.Sprintf("/proc/%d/fdinfo/%s", pid, e.Name()))
		flags, err := strconv.ParseUint(info["flags"], 8, 32)
		if err != nil {
			t.Fatal(err)
		}
		kind, _, numbered := strings.Cut(to, ":[")
		if numbered {
			to = kind
		}
		fd, _ := strconv.Atoi(e.Name())
		out = append(out, openFile{fd, to, flags&syscall.O_ACCMODE != syscall.O_RDONLY})
	}
	return out
}

// may is what a process may have open: so many descriptors of a target.
type may struct {
	target   string
	most     int
	writable bool
}

// checkFiles wants the process to have open what the list says, all of it and
// nothing beside it.
func checkFiles(t *testing.T, who string, pid int, list []may) {
	t.Helper()
	count := map[string]int{}
	for _, f := range openFiles(t, pid) {
		i := slices.IndexFunc(list, func(m may) bool { return m.target == f.target })
		if i < 0 {
			t.Errorf("%s has descriptor %d open: %s", who, f.fd, f.target)
			continue
		}
		if f.writable && !list[i].writable {
			t.Errorf("%s can write descriptor %d: %s", who, f.fd, f.target)
		}
		count[f.target]++
	}
	for _, m := range list {
		if n := count[m.target]; n == 0 || n > m.most {
			t.Errorf("%s has %s open %d times, want 1 to %d", who, m.target, n, m.most)
		}
	}
}

// TestConfinedProcesses looks at the processes a guest can talk to, from outside.
func TestConfinedProcesses(t *testing.T) {
	h := vmtest.Home(t)
	ctx := context.Background()
	for name, opts := range map[string][]microsandbox.VolumeOption{
		"files": nil, "seed": nil, "disk": {microsandbox.WithVolumeKind(microsandbox.VolumeKindDisk), microsandbox.WithVolumeSize(64)},
	} {
		if _, err := microsandbox.CreateVolume(ctx, name, opts...); err != nil {
			t.Fatal(err)
		}
	}
	sb, err := microsandbox.CreateSandbox(ctx, "c", microsandbox.WithImage(vmtest.Image), microsandbox.WithMemory(256),
		microsandbox.WithMounts(map[string]microsandbox.MountConfig{
			"/files": microsandbox.Mount.Named("files", microsandbox.MountOptions{}),
			"/seed":  microsandbox.Mount.Named("seed", microsandbox.MountOptions{Readonly: true}),
			"/disk":  microsandbox.Mount.Named("disk", microsandbox.MountOptions{}),
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := sb.Kill(ctx); err != nil {
			t.Error(err)
		}
	}()
	l := live(t, h, "c")
	t.Run("VMM", func(t *testing.T) { checkVMM(t, h, l) })
	t.Run("file server", func(t *testing.T) { checkFileServer(t, h, l) })
	t.Run("main job", func(t *testing.T) {
		if err := os.WriteFile(filepath.Join(h.Volume("seed"), "in"), []byte("seed\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := sb.Shell(ctx, "id -u && cat /seed/in > /files/out && cp /seed/in /disk/ && sync && ! touch /seed/no 2>/dev/null")
		if err != nil || !out.Success() || out.Stdout() != "0\n" {
			t.Fatalf("%v, %+v", err, out)
		}
		if b, err := os.ReadFile(filepath.Join(h.Volume("files"), "out")); err != nil || string(b) != "seed\n" {
			t.Errorf("result on the host: %q, %v", b, err)
		}
	})
}

func checkVMM(t *testing.T, h home.Dir, l *supervisor.Live) {
	dir := h.Sandbox("c")
	list := []may{
		{os.DevNull, 1, true},
		{"pipe", 2, true},   // what it prints, read by the supervisor
		{"socket", 5, true}, // console, QMP, agent, two virtiofs devices
		{resolved(t, rootFS(t, h)), 2, false},
		{filepath.Join(dir, supervisor.UpperFile), 2, true},
		{filepath.Join(h.Volume("disk"), home.DiskFile), 2, true},
		{filepath.Join(dir, "lock"), 1, true},
		{attachLock(t, h, "disk"), 1, true},
		{"/memfd:memory-backend-memfd (deleted)", 1, true},
	}
	if os.Geteuid() == 0 {
		list = append(list, may{"/run/microsandbox/uids.lock", 1, true})
	}
	checkFiles(t, "QEMU", l.VMMPID, list)
	confinetest.Threads(t, l.VMMPID, nil)
	confinetest.Namespaces(t, l.VMMPID)
	uid := confinetest.UID(t, l.VMMPID)
	if os.Geteuid() == 0 && uid < 1<<16 {
		t.Errorf("QEMU runs as uid %d, want one that owns nothing", uid)
	} else if os.Geteuid() != 0 && uid != os.Geteuid() {
		t.Errorf("QEMU runs as uid %d, want ours, %d", uid, os.Geteuid())
	}
	checkRoot(t, l.VMMPID, h)
}

func checkFileServer(t *testing.T, h home.Dir, l *supervisor.Live) {
	log := filepath.Join(h.Sandbox("c"), "logs", supervisor.SupervisorLog)
	checkFiles(t, "the file server", l.FileServerPID, []may{
		{os.DevNull, 2, true},
		{log, 2, true},
		{"socket", 2, true},
		{"/", 3, false}, // /proc/self/fd, on a mount of its own, and one for each share
		{"/share/0", 2, false},
		{"/share/1", 2, false},
		{attachLock(t, h, "files"), 1, true},
		{attachLock(t, h, "seed"), 1, true},
		{filepath.Join(filepath.Dir(attachLock(t, h, "files")), "ledger"), 1, true}, // not that of a volume it only reads
	})
	var keep []string
	if os.Geteuid() == 0 {
		keep = []string{"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER"}
	}
	confinetest.Threads(t, l.FileServerPID, keep)
	confinetest.Namespaces(t, l.FileServerPID)
	confinetest.Root(t, l.FileServerPID, "msb", "share")
	if uid := confinetest.UID(t, l.FileServerPID); uid != os.Geteuid() {
		t.Errorf("the file server runs as uid %d, want ours, %d", uid, os.Geteuid())
	}
	checkRoot(t, l.FileServerPID, h)
}

// checkRoot wants nothing of the host behind a process's root: no /proc, no
// other program, and of the home the files of the guest's kernel at most.
func checkRoot(t *testing.T, pid int, h home.Dir) {
	t.Helper()
	root := fmt.Sprintf("/proc/%d/root", pid)
	if entries, err := os.ReadDir(root + string(h)); err == nil {
		for _, e := range entries {
			if e.Name() != filepath.Base(h.Kernels()) {
				t.Errorf("process %d sees %s of the home", pid, e.Name())
			}
		}
	}
	for _, path := range []string{h.DB(), h.Sandboxes(), h.Volumes(), "/proc/self", "/sys/kernel", "/etc/passwd", "/bin/sh", "/usr/bin/env", "/root", "/home", "/run"} {
		if _, err := os.Lstat(root + path); err == nil {
			t.Errorf("process %d sees %s", pid, path)
		}
	}
	ours, err := os.Stat("/")
	if err != nil {
		t.Fatal(err)
	}
	its, err := os.Stat(root + "/")
	if err != nil || os.SameFile(ours, its) {
		t.Errorf("process %d has our root: %v", pid, err)
	}
}

// rootFS is the read-only root image of the one image in the home.
func rootFS(t *testing.T, h home.Dir) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(h.Images(), "rootfs", "*.ext4"))
	if err != nil || len(found) != 1 {
		t.Fatalf("root images: %v %v", found, err)
	}
	return found[0]
}

func attachLock(t *testing.T, h home.Dir, volume string) string {
	t.Helper()
	vols := volstore.New(h)
	defer vols.Close()
	v, err := vols.Get(context.Background(), volume)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(h.State(v.ID), "attach")
}

func resolved(t *testing.T, path string) string {
	t.Helper()
	p, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestConfinedProcessesAsOrdinaryUser is TestConfinedProcesses, and the main
// job, by a user without any privilege and with a home of its own.
func TestConfinedProcessesAsOrdinaryUser(t *testing.T) {
	seed, msb := vmtest.Seed(t), vmtest.MSB(t)
	if os.Geteuid() != 0 {
		t.Skip("not root: every test runs as an ordinary user")
	}
	dir, err := os.MkdirTemp("", "seed")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, args := range [][]string{
		{"cp", "-rL", "--sparse=always", filepath.Join(string(seed), "kernels"), filepath.Join(string(seed), "images"), dir},
		{"cp", msb, filepath.Join(dir, "msb")},
		{"chmod", "-R", "u+rwX,go-rwx", dir},
		{"chown", "-R", fmt.Sprintf("%d:%d", confinetest.Nobody, confinetest.Nobody), dir},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	t.Setenv(vmtest.SeedEnv, dir)
	t.Setenv(vmtest.MSBEnv, filepath.Join(dir, "msb"))
	confinetest.AsOrdinaryUser(t, "^TestConfinedProcesses$")
}
