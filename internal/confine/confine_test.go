package confine

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine/confinetest"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestMain makes the test binary the programs it needs: stage 1, and a program
// that says what it can still do.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "confine-exec" {
		os.Exit(Main(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "captive" {
		captive()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// attempts are what a captive tries. Each returns nil if it worked.
var attempts = map[string]func() error{
	"open /etc/passwd":    func() error { return tryOpen("/etc/passwd") },
	"open /proc/1/root":   func() error { return tryOpen("/proc/1/root") },
	"read the share":      func() error { _, err := os.ReadFile("/share/seed"); return err },
	"write the share":     func() error { return os.WriteFile("/share/new", []byte("x"), 0o600) },
	"write read-only":     func() error { return os.WriteFile("/readonly/new", []byte("x"), 0o600) },
	"write the root":      func() error { return os.WriteFile("/new", []byte("x"), 0o600) },
	"rename across":       func() error { return os.Rename("/share/a/f", "/share/b/f") },
	"device in the share": func() error { return tryOpen("/share/null") },
	"signal the parent":   func() error { return unix.Kill(os.Getppid(), 0) },
	"signal pid 1":        func() error { return signalOther() },
	"socket":              func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); return err },
	"mount":               func() error { return unix.Mount("x", "/share", "tmpfs", 0, "") },
	"user namespace":      func() error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"fork":                func() error { return exec.Command("/msb", "nothing").Run() },
	"core dump":           coreDump,
	"climb to /proc/sys":  func() error { return unix.Fstatat(climbFrom, "../../sys", new(unix.Stat_t), 0) },
}

// climbFrom is where /proc/self/fd is open in a captive that has one file.
const climbFrom = 4

func tryOpen(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// signalOther probes a process that is not this one: in a PID namespace of its
// own a program is pid 1 and sees no other.
func signalOther() error {
	if os.Getpid() == 1 {
		return unix.Kill(2, 0)
	}
	return unix.Kill(1, 0)
}

func coreDump() error {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &r); err != nil {
		return err
	}
	if r.Max == 0 {
		return errors.New("limit is 0")
	}
	return nil
}

// captive prints what worked, as JSON, and stays until its input ends.
func captive() {
	worked := map[string]string{}
	for name, try := range attempts {
		worked[name] = "ok"
		if err := try(); err != nil {
			worked[name] = err.Error()
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(worked)
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// prisoner is a running captive.
type prisoner struct {
	cmd     *exec.Cmd
	outcome []Finding
	did     map[string]string
}

// imprison starts a captive under p, waits for its report and ends it with the test.
func imprison(t *testing.T, p Profile, files ...*os.File) *prisoner {
	t.Helper()
	l, err := Prepare(testMSB(t), p, []string{"captive", "captive"}, files)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stdin, err := l.Cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := l.Cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.Cmd.Stderr = os.Stderr
	if err := confinetest.KeptThread(t)(l.Cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = l.Cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		_, why := l.Outcome()
		t.Fatalf("captive said nothing: %v; %v", err, why)
	}
	pr := &prisoner{cmd: l.Cmd}
	if err := json.Unmarshal(line, &pr.did); err != nil {
		t.Fatal(err)
	}
	if pr.outcome, err = l.Outcome(); err != nil {
		t.Fatal(err)
	}
	return pr
}

// testMSB is the test binary: it runs Main for confine-exec.
func testMSB(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// shares makes a directory to be shared and one to be shared read-only.
func shares(t *testing.T) (writable, readonly string) {
	t.Helper()
	writable, readonly = t.TempDir(), t.TempDir()
	for _, dir := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(writable, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"seed", "a/f"} {
		if err := os.WriteFile(filepath.Join(writable, f), []byte("seed"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if os.Geteuid() == 0 {
		if err := unix.Mknod(filepath.Join(writable, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
	}
	return writable, readonly
}

func captiveProfile(t *testing.T) Profile {
	writable, readonly := shares(t)
	return Profile{
		Name: "captive",
		Binds: []Bind{
			{Source: writable, Target: "/share", Writable: true},
			{Source: readonly, Target: "/readonly"},
		},
		Filter:  FilterFileServer,
		Rlimits: []Rlimit{{Resource: unix.RLIMIT_CORE}, {Resource: unix.RLIMIT_NOFILE, ToHard: true}},
	}
}

func requireNamespaces(t *testing.T) {
	t.Helper()
	confinetest.Need(t, Inspect().PrivateRoot(), "mount namespaces")
}

func requireLandlock(t *testing.T) {
	t.Helper()
	confinetest.Need(t, Inspect().LandlockABI >= landlockMinABI, "Landlock")
}

// TestCaptive makes the private root both ways and tries it from inside.
func TestCaptive(t *testing.T) {
	for name, without := range map[string][]Measure{"mount calls": nil, "mount(2)": {MountCalls}} {
		t.Run(name, func(t *testing.T) { testCaptive(t, without) })
	}
}

func testCaptive(t *testing.T, without []Measure) {
	requireNamespaces(t)
	p := captiveProfile(t)
	p.Without = without
	if os.Geteuid() == 0 {
		p.Keep = []string{"CAP_DAC_OVERRIDE", "CAP_FOWNER"}
	}
	pr := imprison(t, p)
	may := []string{"read the share", "write the share", "rename across"}
	for name, result := range pr.did {
		if want := slices.Contains(may, name); want != (result == "ok") {
			t.Errorf("%s: %s", name, result)
		}
	}
	for _, f := range pr.outcome {
		t.Logf("finding: %s", f)
	}
	confinetest.Threads(t, pr.cmd.Process.Pid, p.Keep)
	confinetest.Root(t, pr.cmd.Process.Pid, "msb", "readonly", "share")
	confinetest.Files(t, pr.cmd.Process.Pid)
	if soft, hard := confinetest.Limit(t, pr.cmd.Process.Pid, "Max core file size"); soft != "0" || hard != "0" {
		t.Errorf("core limit %s, %s", soft, hard)
	}
	if soft, hard := confinetest.Limit(t, pr.cmd.Process.Pid, "Max open files"); soft != hard {
		t.Errorf("open files limit %s of %s", soft, hard)
	}
	confinetest.Namespaces(t, pr.cmd.Process.Pid)
}

// TestWithoutRoot forces what hosts without namespaces get: Landlock alone
// keeps the file system.
func TestWithoutRoot(t *testing.T) {
	requireLandlock(t)
	p := captiveProfile(t)
	p.Without = []Measure{Namespaces, PIDNamespace, PrivateRoot}
	p.Binds[0].Target, p.Binds[1].Target = "", ""
	pr := imprison(t, p)
	for _, name := range []string{"open /etc/passwd", "write the root", "socket", "mount", "user namespace", "fork"} {
		if pr.did[name] == "ok" {
			t.Errorf("%s: allowed", name)
		}
	}
	var measures []Measure
	for _, f := range pr.outcome {
		measures = append(measures, f.Measure)
	}
	for _, m := range []Measure{Namespaces, PIDNamespace, PrivateRoot} {
		if !slices.Contains(measures, m) {
			t.Errorf("no finding says that %s is missing: %v", m, pr.outcome)
		}
	}
}

func TestRequired(t *testing.T) {
	p := captiveProfile(t)
	p.Without, p.Required = []Measure{PrivateRoot}, []Measure{PrivateRoot}
	_, err := Prepare(testMSB(t), p, []string{"captive", "captive"}, nil)
	if err == nil || !strings.Contains(err.Error(), "captive cannot be confined: private-root: missing") {
		t.Errorf("Prepare = %v, want a refusal", err)
	}
}

// TestSwappedBind: a link put where a directory was is refused, in both paths.
func TestSwappedBind(t *testing.T) {
	for name, without := range map[string][]Measure{"private root": nil, "host root": {Namespaces, PIDNamespace, PrivateRoot}} {
		t.Run(name, func(t *testing.T) {
			p := captiveProfile(t)
			p.Without = without
			var st unix.Stat_t
			if err := unix.Stat(p.Binds[0].Source, &st); err != nil {
				t.Fatal(err)
			}
			p.Binds[0].Dev, p.Binds[0].Ino = uint64(st.Dev), st.Ino
			if err := os.Rename(p.Binds[0].Source, p.Binds[0].Source+".moved"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/etc", p.Binds[0].Source); err != nil {
				t.Fatal(err)
			}
			l, err := Prepare(testMSB(t), p, []string{"captive", "captive"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			err = l.Cmd.Run()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != exitConfine {
				t.Errorf("stage 1 ended with %v, want status %d", err, exitConfine)
			}
			if _, err := l.Outcome(); err == nil || !strings.Contains(err.Error(), "is not what it was") {
				t.Errorf("Outcome = %v", err)
			}
		})
	}
}

// TestInheritedFiles: the program has the files it was given and no others.
func TestInheritedFiles(t *testing.T) {
	requireNamespaces(t)
	keep, err := os.CreateTemp(t.TempDir(), "keep")
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	stray, err := os.CreateTemp(t.TempDir(), "stray")
	if err != nil {
		t.Fatal(err)
	}
	defer stray.Close()
	// Not close-on-exec, as a careless library may leave one.
	if _, err := unix.FcntlInt(stray.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	p := captiveProfile(t)
	p.ProcSelfFd = true
	for _, p.Without = range [][]Measure{nil, {MountCalls}} {
		testInherited(t, p, keep)
	}
}

func testInherited(t *testing.T, p Profile, keep *os.File) {
	pr := imprison(t, p, keep)
	if pr.did["climb to /proc/sys"] == "ok" {
		t.Error("/proc/sys can be reached from the descriptor of /proc/self/fd")
	}
	got := confinetest.Files(t, pr.cmd.Process.Pid, keep.Name(), "/")
	if got[3] != keep.Name() || got[4] != "/" || len(got) > 7 { // 2 of the Go runtime
		t.Errorf("descriptors %v", got)
	}
}

// TestParentGone: a stage 1 whose parent ended before it could ask for a
// signal does not go on.
func TestParentGone(t *testing.T) {
	child := exec.Command("/bin/true")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(child.Process.Pid, 0)
	if err != nil {
		prereq.Missing(t, "pidfd_open (Linux 5.3): %v", err)
	}
	defer unix.Close(fd)
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	s := &stage{order: order{Parent: child.Process.Pid, ParentPidfd: fd}}
	if err := s.watchParent(); err == nil {
		t.Error("a dead parent was not noticed")
	}
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0)
}

// TestAsOrdinaryUser runs the tests of this package again as uid 65534.
func TestAsOrdinaryUser(t *testing.T) {
	confinetest.AsOrdinaryUser(t, "Captive|WithoutRoot|Swapped|Inherited|Required|QEMU")
}

func TestValidate(t *testing.T) {
	tests := map[string]struct {
		p  Profile
		ok bool
	}{
		"empty":              {Profile{}, true},
		"bind":               {Profile{Binds: []Bind{{Source: "/a", Target: "/b"}}}, true},
		"relative bind":      {Profile{Binds: []Bind{{Source: "a", Target: "/b"}}}, false},
		"target climbs":      {Profile{Binds: []Bind{{Source: "/a", Target: "/../b"}}}, false},
		"target is the root": {Profile{Binds: []Bind{{Source: "/a", Target: "/"}}}, false},
		"source as target":   {Profile{Binds: []Bind{{Source: "/a/../b"}}}, false},
		"link":               {Profile{Links: []Link{{"/lib", "usr/lib"}}}, true},
		"link to nothing":    {Profile{Links: []Link{{"/lib", ""}}}, false},
		"relative device":    {Profile{Devices: []string{"null"}}, false},
		"capability":         {Profile{Keep: []string{"CAP_CHOWN"}}, true},
		"no capability":      {Profile{Keep: []string{"chown"}}, false},
		"no filter":          {Profile{Filter: "everything"}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if err := tt.p.Validate(); (err == nil) != tt.ok {
				t.Errorf("Validate = %v", err)
			}
		})
	}
}
