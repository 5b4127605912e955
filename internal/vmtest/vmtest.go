// Package vmtest gives tests a home with a guest kernel and the demo image, so
// that they can boot real sandboxes. "make test" builds both once and says where
// they are; without them a test is skipped, in CI it fails.
package vmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// Variables that say where "make test" has put what tests need.
const (
	SeedEnv = "MSB_TEST_SEED" // a home with kernels/ and images/
	MSBEnv  = "MSB_TEST_MSB"  // the built msb
)

// Image is the reference of the demo image.
const Image = "demo"

// MSB returns the path of the built msb.
func MSB(t testing.TB) string {
	t.Helper()
	p := os.Getenv(MSBEnv)
	if p == "" {
		prereq.Missing(t, "%s, the built msb", MSBEnv)
	}
	if _, err := os.Stat(p); err != nil {
		prereq.Missing(t, "%v", err)
	}
	return p
}

// Seed returns the home that holds kernel and image.
func Seed(t testing.TB) home.Dir {
	t.Helper()
	p := os.Getenv(SeedEnv)
	if p == "" {
		prereq.Missing(t, "%s, a home with a guest kernel and the demo image", SeedEnv)
	}
	for _, dir := range []string{"kernels", "images"} {
		if _, err := os.Stat(filepath.Join(p, dir)); err != nil {
			prereq.Missing(t, "%v", err)
		}
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		prereq.Missing(t, "qemu-system-x86_64")
	}
	return home.Dir(p)
}

// Home makes a home for one test, sharing kernel and image with the seed, and
// points MSB_HOME and MSB_PATH at it. At the end no process of it may be left;
// one that deletes a removed volume is waited for.
func Home(t testing.TB) home.Dir {
	t.Helper()
	msb, seed := MSB(t), Seed(t)
	// sun_path is short; t.TempDir() is not.
	dir, err := os.MkdirTemp("", "h")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left := Processes(dir)
		for end := time.Now().Add(10 * time.Second); slices.ContainsFunc(left, deletes) && time.Now().Before(end); left = Processes(dir) {
			time.Sleep(5 * time.Millisecond)
		}
		if len(left) > 0 {
			t.Errorf("processes left: %s", strings.Join(left, "; "))
			KillAll(dir)
		}
		os.RemoveAll(dir)
	})
	for _, name := range []string{"kernels", "images"} {
		if err := os.Symlink(filepath.Join(string(seed), name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	setenv(t, home.EnvVar, dir)
	setenv(t, "MSB_PATH", msb)
	return home.Dir(dir)
}

func setenv(t testing.TB, k, v string) {
	t.Helper()
	old, had := os.LookupEnv(k)
	if err := os.Setenv(k, v); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if had {
			os.Setenv(k, old)
		} else {
			os.Unsetenv(k)
		}
	})
}

// Processes lists the living processes that have dir in their arguments or
// environment, or hold a file below it, other than this one and its parents.
func Processes(dir string) []string {
	var out []string
	for pid := range pids(dir) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if len(b) == 0 {
			continue // it has ended meanwhile
		}
		out = append(out, fmt.Sprintf("%d %s", pid, strings.ReplaceAll(string(b), "\x00", " ")))
	}
	return out
}

// deletes tells a process that a command has left behind to empty the trash.
func deletes(process string) bool { return strings.Contains(process, " reap-trash ") }

// KillAll ends the processes that Processes lists.
func KillAll(dir string) {
	for pid := range pids(dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

func pids(dir string) map[int]bool {
	found := map[int]bool{}
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range entries {
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(p), "%d", &pid); err != nil || pid == os.Getpid() || pid == os.Getppid() {
			continue
		}
		if state(p) != 'Z' && uses(p, dir) {
			found[pid] = true
		}
	}
	return found
}

// uses reports whether a process was started with dir or has files of it open.
func uses(proc, dir string) bool {
	b, _ := os.ReadFile(proc + "/cmdline")
	if strings.Contains(string(b), dir) {
		return true
	}
	fds, _ := filepath.Glob(proc + "/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, dir+"/") {
			return true
		}
	}
	return false
}

// state is the process state letter of proc(5), 0 if it has gone.
func state(proc string) byte {
	b, err := os.ReadFile(proc + "/stat")
	if err != nil {
		return 'Z'
	}
	if i := strings.LastIndexByte(string(b), ')'); i >= 0 && i+2 < len(b) {
		return b[i+2]
	}
	return 0
}

// Eventually waits for a condition that a promise gives a deadline to. It looks
// every few milliseconds, and fails the test when a look that began after the
// deadline finds the condition false; how long a look takes does not count.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		late := time.Since(began) > within
		if ok() {
			return time.Since(began)
		}
		if late {
			t.Fatalf("not within %s: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
