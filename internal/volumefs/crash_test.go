package volumefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// childEnv makes this test binary run one function in a process of its own.
const childEnv = "VOLUMEFS_TEST_CHILD"

func TestMain(m *testing.M) {
	if child := os.Getenv(childEnv); child != "" {
		os.Exit(runChild(child))
	}
	os.Exit(m.Run())
}

func runChild(spec string) int {
	if err := failpoint.ArmFromEnv(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	name, arg, _ := strings.Cut(spec, ":")
	children := map[string]func(arg string) error{"write": crashChild, "tmpfs": fullTmpfs, "ext4": fullExt4}
	if err := children[name](arg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// changes are the ways in which a file gets its content. Each makes "new" of
// the file "d/f".
var changes = map[string]func(f *FS) error{
	"write": func(f *FS) error { return f.Write(ctx, "d/f", []byte("new"), WriteOptions{Durable: true}) },
	"stream": func(f *FS) error {
		w, err := f.OpenWrite(ctx, "d/f", WriteOptions{})
		if err != nil {
			return err
		}
		if _, err := w.Write([]byte("new")); err != nil {
			return err
		}
		return w.Close()
	},
	"copy": func(f *FS) error { return f.Copy(ctx, "source", "d/f", WriteOptions{}) },
}

// openPair opens base/vol with base/scratch.
func openPair(base string, o Options) (*FS, func(), error) {
	root, err := os.OpenFile(filepath.Join(base, "vol"), unix.O_PATH, 0)
	if err != nil {
		return nil, nil, err
	}
	if o.Scratch, err = os.Open(filepath.Join(base, "scratch")); err != nil {
		return nil, nil, err
	}
	f, err := New(root, o)
	return f, func() { f.Close(); root.Close(); o.Scratch.Close() }, err
}

func crashChild(arg string) error {
	change, base, _ := strings.Cut(arg, ":")
	f, done, err := openPair(base, Options{})
	if err != nil {
		return err
	}
	defer done()
	return changes[change](f)
}

// child runs spec in a process of its own and returns how it ended.
func child(t *testing.T, spec string, attr *syscall.SysProcAttr, env ...string) (*os.ProcessState, string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), append(env, childEnv+"="+spec)...)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		unavailable(t, fmt.Sprintf("cannot start a process in namespaces of its own: %v", err))
	}
	return cmd.ProcessState, string(out)
}

// unavailable skips, but not in CI, where what is needed has to be there.
func unavailable(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// TestCrash: a writer is killed at every fail point. The file is old or new,
// never anything else; nothing half made has a name in the volume; what has one
// outside is gone after the next opening; and the same change then succeeds.
func TestCrash(t *testing.T) {
	reached := map[string]bool{}
	var points []string
	for _, p := range failpoint.Names() {
		if strings.HasPrefix(p, "volumefs.") {
			points = append(points, p)
		}
	}
	for _, point := range points {
		for change := range changes {
			for _, old := range []string{"", "old"} {
				t.Run(point+"/"+change+"/"+old, func(t *testing.T) {
					if crashOnce(t, point, change, old) {
						reached[point] = true
					}
				})
			}
		}
	}
	for _, p := range points {
		if !reached[p] {
			t.Errorf("%s is never reached", p)
		}
	}
}

func crashOnce(t *testing.T, point, change, old string) (killed bool) {
	base := t.TempDir()
	v := &volume{t: t, dir: filepath.Join(base, "vol")}
	v.mkdir(v.dir)
	v.mkdir(filepath.Join(base, "scratch"))
	v.put("source", "new")
	if old != "" {
		v.put("d/f", old)
	}
	state, out := child(t, "write:"+change+":"+base, nil, failpoint.EnvVar+"="+point+"=kill")
	killed = state.Sys().(syscall.WaitStatus).Signaled()
	if !killed && !state.Success() {
		t.Fatalf("the writer failed: %s", out)
	}
	b, err := os.ReadFile(v.path("d/f"))
	if got := string(b); got != "new" && (got != old || err != nil && old != "") {
		t.Errorf("the file is %q, %v", got, err)
	}
	v.checkLitter()
	f, done, err := openPair(base, Options{ScratchAge: 1})
	noErr(t, err)
	defer done()
	if left := listTree(t, filepath.Join(base, "scratch")); len(left) != 0 {
		t.Errorf("left outside: %q", left)
	}
	noErr(t, changes[change](f))
	if got := v.content("d/f"); got != "new" {
		t.Errorf("after trying again the file is %q", got)
	}
	return killed
}

// TestDiskFull: at 0 bytes free writing fails with ENOSPC and changes nothing;
// reading, listing and removing work; with space again so does writing.
func TestDiskFull(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
			if os.Getuid() != 0 {
				if kind == "ext4" {
					t.Skip("mounting ext4 needs root")
				}
				attr.Cloneflags |= syscall.CLONE_NEWUSER
				attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
				attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
			}
			state, out := child(t, kind+":"+t.TempDir(), attr)
			if strings.Contains(out, "cannot mount") {
				unavailable(t, strings.TrimSpace(out))
			}
			if !state.Success() {
				t.Error(out)
			}
		})
	}
}

func fullTmpfs(dir string) error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot mount: %w", err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		return fmt.Errorf("cannot mount tmpfs: %w", err)
	}
	return fullDisk(dir)
}

func fullExt4(dir string) error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot mount: %w", err)
	}
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	for _, args := range [][]string{
		{"truncate", "-s", "16M", image},
		{"mkfs.ext4", "-q", "-m", "0", image},
		{"mkdir", mnt},
		{"mount", "-o", "loop", image, mnt},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/sbin:/usr/sbin")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("cannot mount ext4: %s: %w: %s", args[0], err, out)
		}
	}
	defer unix.Unmount(mnt, 0)
	return fullDisk(mnt)
}

// fullDisk does the work of TestDiskFull in a small file system.
func fullDisk(dir string) error {
	for _, d := range []string{"vol", "scratch"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	f, done, err := openPair(dir, Options{Volume: "v"})
	if err != nil {
		return err
	}
	defer done()
	old := strings.Repeat("old ", 1000)
	if err := f.Write(ctx, "f", []byte(old), WriteOptions{}); err != nil {
		return err
	}
	filler := filepath.Join(dir, "filler")
	if err := fill(filler); err != nil {
		return err
	}
	before := fmt.Sprint(listNames(dir))
	big := make([]byte, 1<<20)
	attempts := map[string]error{
		"overwrite": f.Write(ctx, "f", big, WriteOptions{}),
		"new":       f.Write(ctx, "new/dir/f", big, WriteOptions{}),
		"copy":      f.Copy(ctx, "f", "copy/of/f", WriteOptions{}),
		"stream": func() error {
			w, err := f.OpenWrite(ctx, "f", WriteOptions{})
			if err != nil {
				return err
			}
			_, _ = w.Write(big)
			return w.Close()
		}(),
	}
	for name, err := range attempts {
		if !errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("%s on a full disk: %v", name, err)
		}
	}
	if after := fmt.Sprint(listNames(dir)); after != before {
		return fmt.Errorf("failed writes left something: %s, before %s", after, before)
	}
	if b, err := f.Read(ctx, "f"); err != nil || string(b) != old {
		return fmt.Errorf("the old file is %d bytes, %v", len(b), err)
	}
	if l, err := f.List(ctx, ""); err != nil || len(l) != 1 {
		return fmt.Errorf("list: %v, %v", l, err)
	}
	if err := f.Rename(ctx, "f", "g", WriteOptions{}); err != nil {
		return err
	}
	if err := f.Remove(ctx, "g"); err != nil {
		return err
	}
	if err := os.Remove(filler); err != nil {
		return err
	}
	return f.Write(ctx, "f", big, WriteOptions{})
}

// fill writes until nothing goes in any more.
func fill(path string) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for b := make([]byte, size); ; {
			_, err := file.Write(b)
			if errors.Is(err, unix.ENOSPC) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	return file.Sync()
}

func listNames(dir string) (names []string) {
	_ = filepath.WalkDir(dir, func(p string, _ os.DirEntry, _ error) error {
		names = append(names, p)
		return nil
	})
	return names
}
