package volumefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestDiskFull: at 0 bytes free writing fails with ENOSPC and changes nothing;
// reading, listing and removing work; while somebody takes what becomes free
// files are old or new; with space again writing works. Root does it, and
// somebody else.
func TestDiskFull(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4", "tmpfs as somebody", "ext4 as somebody"} {
		t.Run(kind, func(t *testing.T) {
			attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
			kind, somebody := strings.CutSuffix(kind, " as somebody")
			if os.Getuid() != 0 {
				if kind == "ext4" || somebody {
					prereq.Root(t, "mount ext4, and be somebody else")
				}
				attr.Cloneflags |= syscall.CLONE_NEWUSER
				attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
				attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
			}
			dir := t.TempDir()
			env := []string{}
			if somebody {
				noErr(t, errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o755)))
				env = append(env, "VOLUMEFS_TEST_UID=65534")
			}
			state, out := child(t, kind+":"+dir, attr, env...)
			if strings.Contains(out, "cannot mount") {
				prereq.Missing(t, "%s", strings.TrimSpace(out))
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

// become makes this process and a directory somebody else's if it is asked for.
func become(dir string) error {
	uid, err := strconv.Atoi(os.Getenv("VOLUMEFS_TEST_UID"))
	if err != nil {
		return nil
	}
	return errors.Join(os.Chown(dir, uid, uid), syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid))
}

// fullDisk does the work of TestDiskFull in a small file system.
func fullDisk(dir string) error {
	if err := become(dir); err != nil {
		return err
	}
	for _, d := range []string{"vol", "scratch"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	f, done, err := openPair(dir, Options{Volume: "v", CloseLater: true})
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
	if err := mustNotFit(f, dir); err != nil {
		return err
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
	if err := f.Write(ctx, "f", make([]byte, 1<<20), WriteOptions{}); err != nil {
		return err
	}
	if err := justEnough(f, filler); err != nil {
		return err
	}
	if err := openStream(f, filler); err != nil {
		return err
	}
	if err := twoWriters(f, filler); err != nil {
		return err
	}
	return underPressure(f, filler)
}

// justEnough replaces a file again and again where there is room for one more of
// its size: what a replaced file gives back while its writer goes on is there for
// the next.
func justEnough(f *FS, filler string) error {
	const size = 512 << 10
	data := make([]byte, size)
	if err := f.Write(ctx, "f", data, WriteOptions{}); err != nil {
		return err
	}
	if err := fillBut(filler, size+size/2); err != nil {
		return err
	}
	ways := []func() error{
		func() error { return f.Write(ctx, "f", data, WriteOptions{}) },
		func() error { return f.Write(ctx, "f", data, WriteOptions{}) },
		func() error { return f.Copy(ctx, "f", "f2", WriteOptions{}) },
		func() error { return f.Remove(ctx, "f2") },
		func() error {
			w, err := f.OpenWrite(ctx, "f", WriteOptions{})
			if err == nil {
				_, err = w.Write(data)
				err = errors.Join(err, w.Close())
			}
			return err
		},
	}
	for i := range 200 {
		if err := ways[i%len(ways)](); err != nil {
			return fmt.Errorf("step %d with room for one more: %w", i, err)
		}
	}
	return os.Remove(filler)
}

// fillBut leaves so many bytes free.
func fillBut(filler string, free int64) error {
	if err := fill(filler); err != nil {
		return err
	}
	fi, err := os.Stat(filler)
	if err != nil {
		return err
	}
	return os.Truncate(filler, fi.Size()-free)
}

// openStream writes to a stream that was open when a file gave its space back.
func openStream(f *FS, filler string) error {
	data := make([]byte, 512<<10)
	if err := f.Write(ctx, "f", data, WriteOptions{}); err != nil {
		return err
	}
	if err := fillBut(filler, 128<<10); err != nil {
		return err
	}
	w, err := f.OpenWrite(ctx, "stream", WriteOptions{})
	if err != nil {
		return err
	}
	err = f.Write(ctx, "f", []byte("small"), WriteOptions{})
	if err == nil {
		_, err = w.Write(data)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("an open stream: %w", err)
	}
	return errors.Join(f.Remove(ctx, "stream"), os.Remove(filler))
}

// twoWriters has two replace files at the same time where there is room for one
// more of each: what one gives back is there for the other.
func twoWriters(f *FS, filler string) error {
	const size = 256 << 10
	data := make([]byte, size)
	names := []string{"a", "b"}
	for _, name := range names {
		if err := f.Write(ctx, name, data, WriteOptions{}); err != nil {
			return err
		}
	}
	if err := fillBut(filler, 2*size+size/2); err != nil {
		return err
	}
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			for n := 0; n < 300 && errs[i] == nil; n++ {
				if err := f.Write(ctx, name, data, WriteOptions{}); err != nil {
					errs[i] = fmt.Errorf("two writers: write %d: %w", n, err)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errors.Join(errs...), f.Remove(ctx, "a"), f.Remove(ctx, "b"), os.Remove(filler))
}

// mustNotFit writes in every way to a full disk: nothing fits, nothing changes.
func mustNotFit(f *FS, dir string) error {
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
	return nil
}

// underPressure replaces a file while somebody takes what becomes free: it is
// what was written last, whole.
func underPressure(f *FS, filler string) error {
	eater := exec.Command("/bin/sh", "-c", `: >"$1"; echo; while :; do head -c 65536 /dev/zero >>"$1"; done 2>/dev/null`, "eater", filler)
	eater.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, err := eater.StdoutPipe()
	if err != nil {
		return err
	}
	if err := eater.Start(); err != nil {
		return err
	}
	defer func() { _ = eater.Process.Kill(); _ = eater.Wait() }()
	if _, err := started.Read(make([]byte, 1)); err != nil {
		return err
	}
	last, err := f.Read(ctx, "f")
	if err != nil {
		return err
	}
	refused, free := 0, 0
	for i := 0; refused < 50; i++ {
		next := bytes.Repeat([]byte{byte('a' + i%26)}, 1<<20-i%7*100_000)
		switch err := f.Write(ctx, "f", next, WriteOptions{}); {
		case err == nil:
			last = next
			free++
		case errors.Is(err, unix.ENOSPC):
			refused++
		default:
			return fmt.Errorf("write under pressure: %w", err)
		}
		if b, err := f.Read(ctx, "f"); err != nil || !bytes.Equal(b, last) {
			return fmt.Errorf("after %d writes and %d refusals the file has %d bytes, want %d, or others: %v", free, refused, len(b), len(last), err)
		}
	}
	return nil
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
