package powercut

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/powercut/writelog"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// plant is a bug: one sync that a build leaves out.
type plant struct {
	file      string // of the module
	old, with string
}

// overlay writes the file of go build's -overlay with the bug in it. The text
// to be replaced must be there once.
func (p plant) overlay(t *testing.T, dir string) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, p.file)
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(source, []byte(p.old)); n != 1 {
		t.Fatalf("%s has %q %d times: choose again what to leave out", p.file, p.old, n)
	}
	changed := filepath.Join(dir, "planted.go")
	writeFile(t, changed, bytes.Replace(source, []byte(p.old), []byte(p.with), 1))
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{path: changed}})
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(dir, "overlay.json")
	writeFile(t, overlay, list)
	return overlay
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// buildInit builds this test binary for the guest, static, with a bug if there
// is one.
func buildInit(t *testing.T, bug *plant) []byte {
	t.Helper()
	dir := t.TempDir()
	args := []string{"test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(dir, "init")}
	if bug != nil {
		args = append(args, "-overlay", bug.overlay(t, dir))
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's program: %v\n%s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "init"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// recording is what a guest did to its disk.
type recording struct {
	dir    string // holds base.img and disk.log
	base   []byte
	log    []writelog.Entry
	acked  []int // see acknowledged
	report string
}

// guestConfig says what a guest is to do.
type guestConfig struct {
	fs    string // see fileSystems
	seed  uint64
	steps int
	bug   *plant
}

// record boots a guest that carries out a plan and returns what it wrote.
func record(t *testing.T, c guestConfig) *recording {
	t.Helper()
	needLoop(t)
	vmtest.Seed(t)
	needFileSystem(t, fileSystems[c.fs].kind)
	dir := scratch(t)
	base, disk, log := filepath.Join(dir, "base.img"), filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.log")
	makeDisk(t, base, fileSystems[c.fs])
	r := &recording{dir: dir}
	var err error
	if r.base, err = os.ReadFile(base); err != nil {
		t.Fatal(err)
	}
	writeFile(t, disk, r.base)
	writeFile(t, log, nil)
	boot(t, dir, c)
	console, _ := os.ReadFile(filepath.Join(dir, "console"))
	if r.report = string(console); !strings.Contains(r.report, doneLine) {
		t.Fatalf("the guest did not finish:\n%s", r.report)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	if r.log, err = writelog.Parse(b, diskBytes); err != nil {
		t.Fatal(err)
	}
	if r.acked, err = acknowledged(r.log); err != nil {
		t.Fatal(err)
	}
	if last := r.acked[len(r.log)]; last != c.steps {
		t.Fatalf("the log has %d acknowledgements, want %d", last, c.steps)
	}
	if err := os.Remove(disk); err != nil {
		t.Fatal(err)
	}
	return r
}

// needLoop skips where disk images cannot be mounted.
func needLoop(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		prereq.Missing(t, "root, to mount disk images")
	}
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		prereq.Missing(t, "loop devices: %v", err)
	}
	f.Close()
}

// needFileSystem skips where this host cannot make or mount a file system. Only
// ext4 is required, as for the tests of disk volumes.
func needFileSystem(t *testing.T, kind string) {
	t.Helper()
	if kind == "ext4" {
		return
	}
	if _, err := exec.LookPath("mkfs." + kind); err != nil {
		t.Skipf("missing: %v", err)
	}
	if known, err := os.ReadFile("/proc/filesystems"); err != nil || !bytes.Contains(known, []byte("\t"+kind+"\n")) {
		t.Skipf("missing: %s in this kernel (%v)", kind, err)
	}
}

// scratch returns a directory in memory, or an ordinary one where there is too
// little: a container has 64 MiB.
func scratch(t *testing.T) string {
	t.Helper()
	var fs unix.Statfs_t
	if unix.Statfs("/dev/shm", &fs) != nil || fs.Bavail*uint64(fs.Bsize) < 2<<30 {
		return t.TempDir()
	}
	return storetest.Memory(t)
}

// makeDisk makes the disk a guest begins with: an empty file system whose
// kernel has nothing left to initialize.
func makeDisk(t *testing.T, path string, f fileSystem) {
	t.Helper()
	writeFile(t, path, nil)
	if err := os.Truncate(path, diskBytes); err != nil {
		t.Fatal(err)
	}
	args := []string{"-q", "-F", "-b", "4096", "-J", "size=4", "-m", "0",
		"-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", path, fmt.Sprint(fsBytes>>10) + "k"}
	if f.kind == "btrfs" {
		args = []string{"-q", "-M", "-K", "-b", fmt.Sprint(fsBytes), path}
	}
	if out, err := exec.Command(tool(t, "mkfs."+f.kind), args...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.%s: %v: %s", f.kind, err, out)
	}
}

// tool finds a program that makes or checks file systems.
func tool(t *testing.T, name string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if found, err := exec.LookPath(p); err == nil {
			return found
		}
	}
	prereq.Missing(t, "%s", name)
	return ""
}

// bootTime bounds one guest.
const bootTime = 10 * time.Minute

// boot runs a guest to its end. Its disk's writes go to disk.log.
func boot(t *testing.T, dir string, c guestConfig) {
	t.Helper()
	binary, _, err := qemu.Find()
	if err != nil {
		prereq.Missing(t, "%v", err)
	}
	image, initrd := guestKernel(t, dir, buildInit(t, c.bug), c.bug == nil)
	for _, name := range fileSystems[c.fs].modules {
		if _, err := os.Stat(filepath.Join(filepath.Dir(image), name+".ko")); err != nil {
			t.Skipf("missing: %v: a guest kernel with %s", err, c.fs) // in CI too: only ext4 is required
		}
	}
	khz, err := qemu.TSCKHz(dir)
	if err != nil {
		t.Fatal(err)
	}
	words := fmt.Sprintf("console=ttyS0 quiet reboot=t panic=-1 pci=off rcupdate.rcu_expedited=1 noreplace-smp %s%d %s%d %s%s",
		seedWord, c.seed, stepsWord, c.steps, fsWord, c.fs)
	if khz > 0 {
		words += fmt.Sprintf(" tsc_early_khz=%d tsc=reliable", khz)
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "-name", "powercut", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-M", "microvm,x-option-roms=off,isa-serial=on", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "512",
		"-global", "virtio-mmio.force-legacy=false", "-kernel", image, "-initrd", initrd, "-append", words,
		"-serial", "file:console", "-monitor", "none",
		"-blockdev", "driver=blklogwrites,node-name=d0,cache.no-flush=off,"+
			"file.driver=file,file.filename=disk.img,file.cache.no-flush=on,log.driver=file,log.filename=disk.log,log.cache.no-flush=on",
		"-device", "virtio-blk-device,drive=d0,discard=off,write-zeroes=off")
	cmd.Dir = dir
	if out, err := runBound(cmd); err != nil {
		console, _ := os.ReadFile(filepath.Join(dir, "console"))
		t.Fatalf("qemu: %v\n%s\n%s", errors.Join(err, ctx.Err()), out, console)
	}
}

// runBound runs a program that dies with this one: the death signal follows the
// thread that started it.
func runBound(cmd *exec.Cmd) ([]byte, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return cmd.CombinedOutput()
}

// guestKernel returns the kernel of the seed home with an initramfs of our own:
// the program, mkfs.ext4 and, if wanted, msb.
func guestKernel(t *testing.T, dir string, init []byte, withMSB bool) (image, initrd string) {
	t.Helper()
	h := home.Dir(filepath.Join(dir, "kernel"))
	if err := os.MkdirAll(h.Kernels(), 0o700); err != nil {
		t.Fatal(err)
	}
	seeds, err := filepath.Glob(filepath.Join(vmtest.Seed(t).Kernels(), "[0-9a-f]*", "kernel.json"))
	if err != nil || len(seeds) == 0 {
		prereq.Missing(t, "a guest kernel (%v)", err)
	}
	for _, p := range seeds {
		copyTree(t, filepath.Dir(p), filepath.Join(h.Kernels(), filepath.Base(filepath.Dir(p))))
	}
	k, err := kernel.Find(h, init)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(k.Initrd, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := &archive{w: f, made: map[string]bool{}}
	a.programWithLibraries(t, tool(t, "mkfs.ext4"))
	if withMSB {
		a.file(guestMSB, vmtest.MSB(t))
	}
	a.entry("TRAILER!!!", 0, nil)
	if a.err != nil {
		t.Fatal(a.err)
	}
	return k.Image, k.Initrd
}

// copyTree makes links of a kernel's files.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Mkdir(to, 0o700); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.Symlink(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// archive appends a newc archive to an initramfs (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	w    io.Writer
	made map[string]bool
	err  error
}

func (a *archive) entry(name string, mode int, data []byte) {
	b := []byte("070701")
	for _, v := range []int{len(a.made) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0} {
		b = fmt.Appendf(b, "%08x", v)
	}
	b = append(append(b, name...), 0)
	b = append(b, make([]byte, -len(b)&3)...)
	b = append(b, data...)
	b = append(b, make([]byte, -len(data)&3)...)
	if _, err := a.w.Write(b); a.err == nil {
		a.err = err
	}
	a.made[name] = true
}

// file adds an executable file of this host and the directories it lies in.
func (a *archive) file(at, source string) {
	data, err := os.ReadFile(source)
	if a.err == nil {
		a.err = err
	}
	parts := strings.Split(strings.TrimPrefix(at, "/"), "/")
	for i := 1; i < len(parts); i++ {
		if dir := strings.Join(parts[:i], "/"); !a.made[dir] {
			a.entry(dir, 0o040755, nil)
		}
	}
	a.entry(strings.Join(parts, "/"), 0o100755, data)
}

var libraryLine = regexp.MustCompile(`(?m)(/\S+) \(0x`)

// programWithLibraries adds a program with what ldd says it needs.
func (a *archive) programWithLibraries(t *testing.T, path string) {
	t.Helper()
	out, err := exec.Command("ldd", path).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "not a dynamic executable") {
		t.Fatalf("ldd %s: %v: %s", path, err, out)
	}
	for _, m := range libraryLine.FindAllStringSubmatch(string(out), -1) {
		a.file(m[1], m[1])
	}
	a.file("/usr/sbin/"+filepath.Base(path), path)
}
