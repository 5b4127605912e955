// Package confinetest looks at a confined process from outside, as the kernel
// shows it under /proc, and helps tests to start such processes.
package confinetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/capability"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// Nobody is the uid of the second run of AsOrdinaryUser.
const Nobody = 65534

// Need demands something of the host.
func Need(t testing.TB, there bool, what string) {
	t.Helper()
	if !there {
		prereq.Missing(t, "%s", what)
	}
}

// Limit returns the soft and hard limit of a line of /proc/PID/limits.
func Limit(t testing.TB, pid int, name string) (soft, hard string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			if f := strings.Fields(rest); len(f) >= 2 {
				return f[0], f[1]
			}
		}
	}
	t.Fatalf("process %d has no limit %q", pid, name)
	return "", ""
}

// Status returns the fields of a /proc/PID/status file.
func Status(t testing.TB, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			m[k] = strings.TrimSpace(v)
		}
	}
	return m
}

// Threads wants every thread of the process to have exactly the capabilities
// keep, no_new_privs, and a system call filter.
func Threads(t testing.TB, pid int, keep []string) {
	t.Helper()
	caps := fmt.Sprintf("%016x", mask(t, keep))
	want := map[string]string{
		"CapInh": "0000000000000000", "CapPrm": caps, "CapEff": caps, "CapBnd": caps, "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2",
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	for _, file := range tasks {
		got := Status(t, file)
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s: %s is %s, want %s", file, k, got[k], v)
			}
		}
	}
}

func mask(t testing.TB, keep []string) (m uint64) {
	t.Helper()
	for _, c := range capability.ListKnown() {
		if slices.Contains(keep, "CAP_"+strings.ToUpper(c.String())) {
			m |= 1 << c
		}
	}
	return m
}

// UID returns the one uid that every thread of the process has as its real,
// effective, saved and file system uid.
func UID(t testing.TB, pid int) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads: %v", err)
	}
	var ids []string
	for _, file := range tasks {
		ids = append(ids, strings.Fields(Status(t, file)["Uid"])...)
	}
	slices.Sort(ids)
	if ids = slices.Compact(ids); len(ids) != 1 {
		t.Fatalf("process %d has uids %v", pid, ids)
	}
	uid, err := strconv.Atoi(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// Root wants the process's root directory to have exactly these entries.
// Library directories are overlooked: a test binary built with cgo needs them.
func Root(t testing.TB, pid int, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root/", pid))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if !slices.Contains([]string{"lib", "lib64", "usr"}, e.Name()) {
			got = append(got, e.Name())
		}
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("root of %d has %q, want %q", pid, got, want)
	}
}

// Files wants every open descriptor of the process, beyond the standard
// streams and what the Go runtime opens, to lead to something that starts with
// one of allowed. It returns what they lead to.
func Files(t testing.TB, pid int, allowed ...string) map[int]string {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	allowed = append([]string{"anon_inode:[eventpoll]", "anon_inode:[eventfd]"}, allowed...)
	files := map[int]string{}
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
		if err != nil {
			continue // closed meanwhile
		}
		files[fd] = to
		if fd > 2 && !slices.ContainsFunc(allowed, func(p string) bool { return strings.HasPrefix(to, p) }) {
			t.Errorf("process %d has descriptor %d open: %s", pid, fd, to)
		}
	}
	return files
}

// Namespaces wants none of the process's namespaces to be ours.
func Namespaces(t testing.TB, pid int) {
	t.Helper()
	for _, ns := range []string{"mnt", "pid", "net", "ipc", "uts"} {
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err != nil {
			t.Fatal(err)
		}
		if ours == its {
			t.Errorf("process %d has our %s namespace", pid, ns)
		}
	}
}

// KeptThread returns a function that starts commands from one thread which
// stays until the test's end: the parent-death signal follows the thread.
func KeptThread(t testing.TB) func(*exec.Cmd) error {
	t.Helper()
	cmds, errs := make(chan *exec.Cmd), make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		for cmd := range cmds {
			errs <- cmd.Start()
		}
	}()
	t.Cleanup(func() { close(cmds) })
	return func(cmd *exec.Cmd) error {
		cmds <- cmd
		return <-errs
	}
}

// AsOrdinaryUser runs the tests of the running test binary that match pattern
// again, as Nobody. It skips if this is not root.
func AsOrdinaryUser(t *testing.T, pattern string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: every test runs as an ordinary user")
	}
	dir, err := os.MkdirTemp("", "ordinary-user")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, Nobody, Nobody); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, filepath.Base(exe)) // the original's directory is root's alone
	if err := os.WriteFile(copied, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied, "-test.v", "-test.run", pattern)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: Nobody, Gid: Nobody}}
	out, err := cmd.CombinedOutput()
	t.Logf("as uid %d:\n%s", Nobody, out)
	if err != nil {
		t.Error(err)
	}
}
