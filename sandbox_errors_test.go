package microsandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// leftovers names everything in a home that belongs to a sandbox or volume and
// should not be there, beyond those that the test has made.
func leftovers(t testing.TB, h home.Dir, keep ...string) []string {
	t.Helper()
	var out []string
	page, err := microsandbox.ListSandboxes(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range page.Sandboxes {
		out = append(out, "record of sandbox "+s.Name())
	}
	vols, err := microsandbox.ListVolumes(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range vols {
		out = append(out, "volume "+v.Name())
	}
	for what, dir := range map[string]string{
		"directory of sandbox ": h.Sandboxes(), "run directory ": filepath.Dir(h.Run("x")),
		"staged volume ": h.Staging(), "state of volume ": h.States(),
	} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, what+e.Name())
		}
	}
	for _, p := range vmtest.Processes(string(h)) {
		out = append(out, "process "+p)
	}
	slices.Sort(out)
	return slices.DeleteFunc(out, func(s string) bool {
		return slices.ContainsFunc(keep, func(k string) bool { return strings.HasSuffix(s, k) })
	})
}

// nothingLeft wants no leftovers: at once, but for processes that are ending.
func nothingLeft(t testing.TB, h home.Dir, keep ...string) {
	t.Helper()
	var left []string
	for began := time.Now(); time.Since(began) < freeWithin; time.Sleep(10 * time.Millisecond) {
		if left = leftovers(t, h, keep...); len(left) == 0 {
			return
		}
	}
	t.Errorf("left: %s", strings.Join(left, "; "))
}

// script writes an executable stand-in.
func script(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stand-in")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// badSandbox is one row of TestSandboxBadInput.
type badSandbox struct {
	name string // "": "bad"
	env  map[string]string
	opts []microsandbox.SandboxOption // after the image
	kind microsandbox.ErrorKind
	says string // the value that is named
	hint bool   // there is something to do about it
}

func mounts(guest string, m microsandbox.MountConfig) []microsandbox.SandboxOption {
	return []microsandbox.SandboxOption{microsandbox.WithMounts(map[string]microsandbox.MountConfig{guest: m})}
}

func badSandboxes(t *testing.T, h home.Dir) map[string]badSandbox {
	missing := filepath.Join(t.TempDir(), "missing")
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("no program\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	opt := func(o ...microsandbox.SandboxOption) []microsandbox.SandboxOption { return o }
	created := microsandbox.Mount.NamedWith("made-here", microsandbox.MountOptions{}, microsandbox.NamedVolumeOptions{Mode: microsandbox.NamedVolumeModeCreate})
	return map[string]badSandbox{
		"name with a blank": {name: "a b", kind: microsandbox.ErrInvalidConfig, says: `"a b"`, hint: true},
		"name too long":     {name: strings.Repeat("n", 129), kind: microsandbox.ErrInvalidConfig, says: "nnnn", hint: true},
		"name with a path":  {name: "../x", kind: microsandbox.ErrInvalidConfig, says: `"../x"`, hint: true},
		"no image":          {opts: opt(microsandbox.WithImage("")), kind: microsandbox.ErrInvalidConfig, says: "no image", hint: true},
		"memory":            {opts: opt(microsandbox.WithMemory(64)), kind: microsandbox.ErrInvalidConfig, says: "64 MiB"},
		"CPUs":              {opts: opt(microsandbox.WithCPUs(200)), kind: microsandbox.ErrInvalidConfig, says: "200 CPUs"},
		"working directory": {opts: opt(microsandbox.WithWorkdir("rel")), kind: microsandbox.ErrInvalidConfig, says: `"rel"`},
		"host name":         {opts: opt(microsandbox.WithHostname("a/b")), kind: microsandbox.ErrInvalidConfig, says: `"a/b": it can have`},
		"upper size":        {opts: opt(microsandbox.WithOCIUpperSize(1)), kind: microsandbox.ErrInvalidConfig, says: "upper size) of 1 MiB"},
		"accelerator":       {opts: opt(microsandbox.WithAccelerator("hvf")), kind: microsandbox.ErrInvalidConfig, says: `"hvf"`},
		"boot timeout":      {opts: opt(microsandbox.WithBootTimeout(-time.Second)), kind: microsandbox.ErrInvalidConfig, says: "-1s"},
		"environment":       {opts: opt(microsandbox.WithEnv(map[string]string{"A=B": "c"})), kind: microsandbox.ErrInvalidConfig, says: `"A=B"`},
		"user":              {opts: opt(microsandbox.WithUser("nobody-knows")), kind: microsandbox.ErrInvalidConfig, says: "nobody-knows"},

		"bind of nothing":    {opts: mounts("/x", microsandbox.Mount.Bind(missing, microsandbox.MountOptions{})), kind: microsandbox.ErrInvalidConfig, says: missing},
		"bind of the home":   {opts: mounts("/x", microsandbox.Mount.Bind(string(h), microsandbox.MountOptions{})), kind: microsandbox.ErrInvalidConfig, says: string(h)},
		"bind of its parent": {opts: mounts("/x", microsandbox.Mount.Bind(filepath.Dir(string(h)), microsandbox.MountOptions{})), kind: microsandbox.ErrInvalidConfig, says: filepath.Dir(string(h))},
		"guest path":         {opts: mounts("rel", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{})), kind: microsandbox.ErrInvalidConfig, says: `"rel"`},
		"volume missing":     {opts: mounts("/x", microsandbox.Mount.Named("nosuch", microsandbox.MountOptions{})), kind: microsandbox.ErrVolumeNotFound, says: `"nosuch"`},
		"disk image missing": {opts: mounts("/x", microsandbox.Mount.Disk(missing+".raw", microsandbox.DiskOptions{})), kind: microsandbox.ErrInvalidConfig, says: missing + ".raw"},

		"image missing":      {opts: opt(microsandbox.WithImage("nosuch"), microsandbox.WithPullPolicy(microsandbox.PullPolicyNever)), kind: microsandbox.ErrImageNotFound, says: "nosuch", hint: true},
		"image reference":    {opts: opt(microsandbox.WithImage("UPPER CASE")), kind: microsandbox.ErrInvalidArgument, says: "UPPER CASE"},
		"registry not there": {opts: append(mounts("/x", created), microsandbox.WithImage("127.0.0.1:1/x")), kind: microsandbox.ErrImagePullFailed, says: "127.0.0.1:1/x"},

		"msb missing":        {env: map[string]string{"MSB_PATH": missing}, kind: microsandbox.ErrLibraryNotLoaded, says: missing, hint: true},
		"msb a directory":    {env: map[string]string{"MSB_PATH": t.TempDir()}, kind: microsandbox.ErrLibraryNotLoaded, says: "MSB_PATH", hint: true},
		"msb not executable": {env: map[string]string{"MSB_PATH": plain}, kind: microsandbox.ErrLibraryNotLoaded, says: plain, hint: true},
		"msb no msb":         {env: map[string]string{"MSB_PATH": "/bin/true"}, opts: mounts("/x", created), kind: microsandbox.ErrLibraryNotLoaded, says: "/bin/true", hint: true},
		"msb older":          {env: map[string]string{"MSB_PATH": script(t, `echo '{"version":"0.0.1"}' >&4; exec sleep 2`)}, kind: microsandbox.ErrLibraryNotLoaded, says: "0.0.1", hint: true},
		"msb of no format":   {env: map[string]string{"MSB_PATH": script(t, `echo hello >&4`)}, kind: microsandbox.ErrLibraryNotLoaded, says: "stand-in", hint: true},

		"QEMU missing":     {env: map[string]string{"MSB_QEMU": missing}, opts: mounts("/x", created), kind: microsandbox.ErrLibraryNotLoaded, says: missing, hint: true},
		"QEMU no QEMU":     {env: map[string]string{"MSB_QEMU": "/bin/false"}, opts: mounts("/x", created), kind: microsandbox.ErrInternal, says: "QEMU", hint: true},
		"kernel missing":   {env: map[string]string{"MSB_KERNEL": missing}, opts: mounts("/x", created), kind: microsandbox.ErrInvalidConfig, says: missing, hint: true},
		"kernel no kernel": {env: map[string]string{"MSB_KERNEL": plain}, opts: mounts("/x", created), kind: microsandbox.ErrInvalidConfig, says: plain, hint: true},

		"file server refuses to start": {env: map[string]string{"MSB_FAILPOINT": "supervisor.started-file-server=error"}, opts: mounts("/x", created), kind: microsandbox.ErrInternal, says: "failpoint"},
	}
}

// TestSandboxBadInput gives every wrong thing to CreateSandbox: each is refused
// with a typed error that names it, and leaves nothing.
func TestSandboxBadInput(t *testing.T) {
	h := vmtest.Home(t)
	for name, tt := range badSandboxes(t, h) {
		t.Run(name, func(t *testing.T) {
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			if tt.name == "" {
				tt.name = "bad"
			}
			opts := append([]microsandbox.SandboxOption{microsandbox.WithImage(vmtest.Image)}, tt.opts...)
			ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
			defer cancel()
			sb, err := microsandbox.CreateSandbox(ctx, tt.name, opts...)
			if err == nil {
				_ = sb.Kill(ctx)
				t.Fatal("accepted")
			}
			var e *microsandbox.Error
			if !errors.As(err, &e) || e.Kind != tt.kind || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %q of kind %v, want kind %v and %q", err, kindOf(err), tt.kind, tt.says)
			} else if tt.hint && e.Hint == "" {
				t.Errorf("error %q has no hint", err)
			}
			nothingLeft(t, h)
		})
	}
}

func kindOf(err error) microsandbox.ErrorKind {
	var e *microsandbox.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return -1
}

// TestCreateCancelled: a program at MSB_PATH that hangs is given up with ctx.
func TestCreateCancelled(t *testing.T) {
	h := vmtest.Home(t)
	t.Setenv("MSB_PATH", script(t, "exec sleep 1000"))
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := microsandbox.CreateSandbox(ctx, "bad", microsandbox.WithImage(vmtest.Image))
	if !microsandbox.IsKind(err, microsandbox.ErrCancelled) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v of kind %v", err, kindOf(err))
	}
	nothingLeft(t, h)
}

// TestGuestDoesNotBoot: a guest that dies and one that hangs are told apart, and
// the end of the console is in the error.
func TestGuestDoesNotBoot(t *testing.T) {
	h := vmtest.Home(t)
	tests := map[string]struct {
		point   string
		timeout time.Duration
		says    string
	}{
		"dies":  {"agent.ready=exit", time.Minute, "guest ended while booting: "},
		"hangs": {"agent.ready=sleep", 5 * time.Second, "guest did not boot within 5s"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Setenv(failpoint.EnvVar, tt.point)
			began := time.Now()
			created := microsandbox.Mount.NamedWith("made-here", microsandbox.MountOptions{}, microsandbox.NamedVolumeOptions{Mode: microsandbox.NamedVolumeModeCreate})
			_, err := microsandbox.CreateSandbox(context.Background(), "bad", append(mounts("/x", created), microsandbox.WithImage(vmtest.Image),
				microsandbox.WithMemory(256), microsandbox.WithBootTimeout(tt.timeout))...)
			var e *microsandbox.Error
			if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.says) || e.Hint == "" {
				t.Fatalf("error %v of kind %v, want %q and a hint", err, kindOf(err), tt.says)
			}
			if tt.point == "agent.ready=exit" && !strings.Contains(err.Error(), "end of the console:") {
				t.Errorf("error without the console: %v", err)
			}
			t.Logf("after %s: %v", time.Since(began).Round(time.Millisecond), err)
			nothingLeft(t, h)
		})
	}
}

// TestSandboxConflicts: what is taken, attached or running is refused, naming
// the holder, and programs end msb with their own exit codes.
func TestSandboxConflicts(t *testing.T) {
	h := vmtest.Home(t)
	mustMSB(t, "volume", "create", "-q", "files")
	mustMSB(t, "volume", "create", "-q", "disk", "--kind", "disk", "--size", "64")
	mustMSB(t, "create", "-q", "--name", "holder", "--memory", "256M", "-v", "files:/files", "--mount-named", "disk:/disk:create=existing", vmtest.Image)
	t.Run("taken", func(t *testing.T) { testTaken(t, h) })
	t.Run("exit codes", testExitCodes)
	mustMSB(t, "stop", "-q", "holder")
	ctx := context.Background()
	i, err := microsandbox.GetSandbox(ctx, "holder")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.Connect(ctx); !microsandbox.IsKind(err, microsandbox.ErrSandboxNotRunning) || !strings.Contains(err.Error(), "holder") {
		t.Errorf("connect to a stopped sandbox: %v", err)
	}
	mustMSB(t, "rm", "-q", "holder")
	mustMSB(t, "volume", "rm", "-q", "files", "disk")
	nothingLeft(t, h)
}

func testTaken(t *testing.T, h home.Dir) {
	ctx := context.Background()
	image := microsandbox.WithImage(vmtest.Image)
	fresh := microsandbox.Mount.NamedWith("fresh", microsandbox.MountOptions{}, microsandbox.NamedVolumeOptions{Mode: microsandbox.NamedVolumeModeCreate})
	withDisk := microsandbox.WithMounts(map[string]microsandbox.MountConfig{
		"/disk": microsandbox.Mount.Named("disk", microsandbox.MountOptions{}), "/fresh": fresh,
	})
	tests := map[string]struct {
		do    func() error
		kind  microsandbox.ErrorKind
		inUse bool
	}{
		"name":                  {func() error { _, err := microsandbox.CreateSandbox(ctx, "holder", image); return err }, microsandbox.ErrSandboxAlreadyExists, false},
		"disk in two sandboxes": {func() error { _, err := microsandbox.CreateSandbox(ctx, "second", image, withDisk); return err }, microsandbox.ErrInvalidConfig, true},
		"disk taken for a directory": {func() error {
			_, err := microsandbox.CreateSandbox(ctx, "second", append(mounts("/x", microsandbox.Mount.NamedWith("disk", microsandbox.MountOptions{}, microsandbox.NamedVolumeOptions{Mode: microsandbox.NamedVolumeModeEnsureExists})), image)...)
			return err
		}, microsandbox.ErrInvalidConfig, false},
		"remove attached volume": {func() error { return microsandbox.RemoveVolume(ctx, "files") }, microsandbox.ErrInvalidConfig, true},
		"remove attached disk":   {func() error { return microsandbox.RemoveVolume(ctx, "disk") }, microsandbox.ErrInvalidConfig, true},
		"remove running sandbox": {func() error { return microsandbox.RemoveSandbox(ctx, "holder") }, microsandbox.ErrSandboxStillRunning, false},
		"start running sandbox":  {func() error { _, err := microsandbox.StartSandbox(ctx, "holder"); return err }, microsandbox.ErrSandboxStillRunning, false},
		"volume made a second time": {func() error {
			_, err := microsandbox.CreateSandbox(ctx, "second", append(mounts("/x", microsandbox.Mount.NamedWith("files", microsandbox.MountOptions{}, microsandbox.NamedVolumeOptions{Mode: microsandbox.NamedVolumeModeCreate})), image)...)
			return err
		}, microsandbox.ErrVolumeAlreadyExists, false},
	}
	before := leftovers(t, h)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := tt.do()
			var e *microsandbox.Error
			if !errors.As(err, &e) || e.Kind != tt.kind || e.Hint == "" {
				t.Errorf("error %v of kind %v, want kind %v and a hint", err, kindOf(err), tt.kind)
			}
			if tt.inUse && (!errors.Is(err, microsandbox.ErrVolumeInUse) || !strings.Contains(err.Error(), "holder")) {
				t.Errorf("error %v does not say who uses the volume", err)
			}
			if after := leftovers(t, h); !slices.Equal(before, after) {
				t.Errorf("left:\n%s\nbefore:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
			}
		})
	}
}

func testExitCodes(t *testing.T) {
	tests := map[string]struct {
		args   []string
		code   int
		stderr string
	}{
		"success":                {[]string{"exec", "holder", "--", "true"}, 0, ""},
		"own code":               {[]string{"exec", "holder", "--", "sh", "-c", "exit 7"}, 7, ""},
		"killed":                 {[]string{"exec", "holder", "--", "sh", "-c", "kill -9 $$"}, 137, ""},
		"program not found":      {[]string{"exec", "holder", "--", "nosuch"}, 127, "msb: error: cannot run nosuch: "},
		"empty name":             {[]string{"exec", "holder", "--", ""}, 127, "msb: error: cannot run "},
		"path not found":         {[]string{"exec", "holder", "--", "/no/such"}, 127, "msb: error: cannot run /no/such: "},
		"not executable":         {[]string{"exec", "holder", "--", "/etc/passwd"}, 126, "msb: error: cannot run /etc/passwd: "},
		"a directory":            {[]string{"exec", "holder", "--", "/etc"}, 126, "msb: error: cannot run /etc: "},
		"no working directory":   {[]string{"exec", "-w", "/no/such", "holder", "--", "true"}, 1, "/no/such"},
		"no such user":           {[]string{"exec", "-u", "nosuch", "holder", "--", "true"}, 1, "nosuch"},
		"timeout":                {[]string{"exec", "--timeout", "100ms", "holder", "--", "sleep", "100"}, 1, "100ms"},
		"no such sandbox":        {[]string{"exec", "nosuch", "--", "true"}, 1, `"nosuch"`},
		"run in an existing one": {[]string{"run", "--name", "holder", "--", "sh", "-c", "exit 5"}, 5, "flags that describe a sandbox are ignored"},
		"no name":                {[]string{"exec"}, 2, "msb: error: "},
		"no dashes":              {[]string{"exec", "holder", "true"}, 2, "a command goes after --"},
		"terminal":               {[]string{"exec", "-t", "holder", "--", "true"}, 1, "not supported yet"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out, errOut, code := runMSB(t, nil, tt.args...)
			if code != tt.code || !strings.Contains(errOut, tt.stderr) || tt.stderr == "" && errOut != "" || out != "" {
				t.Errorf("exit code %d, stdout %q, stderr %q, want %d and %q", code, out, errOut, tt.code, tt.stderr)
			}
		})
	}
}

// TestRunInterrupted presses Ctrl-C at three moments of msb run.
func TestRunInterrupted(t *testing.T) {
	h := vmtest.Home(t)
	tests := map[string]struct {
		wait func(t *testing.T, b *background)
		keep []string // the volume, once the sandbox was there
	}{
		"as soon as something was made": {func(t *testing.T, _ *background) {
			vmtest.Eventually(t, 30*time.Second, "directory", func() bool {
				entries, _ := os.ReadDir(h.Sandboxes())
				return len(entries) > 0
			})
		}, nil},
		"during the boot": {func(t *testing.T, _ *background) {
			vmtest.Eventually(t, 30*time.Second, "QEMU", func() bool {
				return slices.ContainsFunc(vmtest.Processes(string(h)), func(p string) bool { return strings.Contains(p, "-name msb-") })
			})
		}, nil},
		"during the program": {func(t *testing.T, b *background) { b.expect(t, "up") }, []string{"volume new"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := startMSB(t, nil, "run", "-q", "--memory", "256M", "-v", "new:/new", vmtest.Image, "--", "sh", "-c", "echo up; exec sleep 1000")
			tt.wait(t, b)
			kill(t, b.cmd.Process.Pid, syscall.SIGINT)
			if code := b.end(t); code != 130 {
				t.Errorf("exit code %d, stderr %q", code, b.stderr.String())
			}
			if tt.keep != nil {
				mustMSB(t, "volume", "rm", "new")
			}
			nothingLeft(t, h)
		})
	}
}

// TestRunKilledAnywhere kills msb run, or its supervisor, at every instant that
// has a name. The next command that changes something cleans up.
func TestRunKilledAnywhere(t *testing.T) {
	h := vmtest.Home(t)
	for _, point := range failpoint.Names() {
		where, _, _ := strings.Cut(point, ".")
		if !slices.Contains([]string{"sandbox", "mount", "supervisor"}, where) {
			continue
		}
		t.Run(point, func(t *testing.T) {
			_, errOut, code := runMSB(t, []string{failpoint.EnvVar + "=" + point + "=kill"},
				"run", "-q", "--memory", "256M", "-v", "new:/new", vmtest.Image, "--", "true")
			creator := code == -1
			if !creator && (code != 1 || errOut == "") || creator && where == "supervisor" {
				t.Errorf("exit code %d, stderr %q", code, errOut)
			}
			mustMSB(t, "volume", "create", "-q", "other")
			mustMSB(t, "volume", "rm", "-q", "other")
			// commands about volumes leave sandboxes alone, and what is listed can be removed
			if left := strings.Fields(mustMSB(t, "ls", "-q")); len(left) > 0 {
				mustMSB(t, append([]string{"rm", "-q"}, left...)...)
			} else if creator {
				_, _, _ = runMSB(t, nil, "rm", "-q", "nosuch")
			}
			nothingLeft(t, h)
		})
	}
}
