package microsandbox_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// testTimeout bounds whatever one test does with guests.
const testTimeout = 10 * time.Minute

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// boot makes a sandbox of the demo image that is gone at the end of the test.
func boot(ctx context.Context, t testing.TB, name string, opts ...msb.SandboxOption) *msb.Sandbox {
	t.Helper()
	sb, err := msb.CreateSandbox(ctx, name, append([]msb.SandboxOption{msb.WithImage(vmtest.Image)}, opts...)...)
	if err != nil {
		t.Fatalf("create sandbox %s: %v", name, err)
	}
	t.Cleanup(func() { discard(t, name) })
	return sb
}

// discard kills and removes a sandbox, if there is one.
func discard(t testing.TB, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	h, err := msb.GetSandbox(ctx, name)
	if msb.IsKind(err, msb.ErrSandboxNotFound) {
		return
	}
	if err == nil && h.Status() == msb.SandboxStatusRunning {
		err = h.Kill(ctx)
	}
	if err = errors.Join(err, msb.RemoveSandbox(ctx, name)); err != nil {
		t.Errorf("remove sandbox %s: %v", name, err)
	}
}

// sh runs a script in the guest, which must succeed, and returns what it prints
// without the last line end.
func sh(t testing.TB, sb *msb.Sandbox, script string, opts ...msb.ExecOption) string {
	t.Helper()
	out := run(t, sb, script, opts...)
	if !out.Success() {
		t.Fatalf("guest: %s\nexit code %d, stdout %q, stderr %q", script, out.ExitCode(), out.Stdout(), out.Stderr())
	}
	return strings.TrimSuffix(out.Stdout(), "\n")
}

// refuses runs a script in the guest, which must fail with a message.
func refuses(t testing.TB, sb *msb.Sandbox, script, message string, opts ...msb.ExecOption) {
	t.Helper()
	out := run(t, sb, script, opts...)
	if out.Success() || !strings.Contains(out.Stderr(), message) {
		t.Errorf("guest: %s\nexit code %d, stdout %q, stderr %q; want a failure with %q", script, out.ExitCode(), out.Stdout(), out.Stderr(), message)
	}
}

func run(t testing.TB, sb *msb.Sandbox, script string, opts ...msb.ExecOption) *msb.ExecOutput {
	t.Helper()
	out, err := sb.Shell(testContext(t), script, opts...)
	if err != nil {
		t.Fatalf("guest: %s\n%v", script, err)
	}
	return out
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, kind msb.ErrorKind, parts ...string) {
	t.Helper()
	if !msb.IsKind(err, kind) {
		t.Errorf("error = %v, want kind %v", err, kind)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not contain %q", err, p)
		}
	}
}

// noSandboxes fails the test if a record or a directory of a sandbox is left.
func noSandboxes(ctx context.Context, t testing.TB, h home.Dir, but ...string) {
	t.Helper()
	page := must(msb.ListSandboxes(ctx))(t)
	if got := sandboxNames(page); fmt.Sprint(got) != fmt.Sprint(but) {
		t.Errorf("sandboxes = %v, want %v", got, but)
	}
	entries, err := os.ReadDir(filepath.Join(string(h), "sandboxes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if len(entries) != len(but) {
		t.Errorf("directories of sandboxes = %v, want %v", entries, but)
	}
}

func sandboxNames(p *msb.SandboxPage) []string {
	names := []string{}
	for _, h := range p.Sandboxes {
		names = append(names, h.Name())
	}
	return names
}

// need returns the path of a program of the host.
func need(t testing.TB, program string) string {
	t.Helper()
	for _, dir := range []string{"", "/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + program); err == nil {
			return p
		}
	}
	prereq.Missing(t, "%s", program)
	return ""
}

// host runs a program on the host, which must succeed.
func host(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(need(t, program), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// TestSandboxLife follows one sandbox through every change of state, and looks
// at listings.
func TestSandboxLife(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	if page := must(msb.ListSandboxes(ctx))(t); len(page.Sandboxes) != 0 || page.NextCursor != nil {
		t.Errorf("a new home lists %v", sandboxNames(page))
	}
	var steps []string
	sb := boot(ctx, t, "life", msb.WithLabel("team", "ml"), msb.WithLabel("n", "1"), msb.WithHostname("other"),
		msb.WithProgress(func(p msb.LaunchProgress) { steps = append(steps, p.Step) }))
	if len(steps) == 0 || steps[len(steps)-1] != "ready" {
		t.Errorf("steps of the launch: %v", steps)
	}
	l := &life{ctx, h, sb}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"running", l.testRunning},
		{"reached by name", l.testByName},
		{"detached", l.testDetached},
		{"stopped", l.testStopped},
		{"listed, beside an ephemeral one that Close ends", l.testListed},
		{"started again, then killed", l.testKilled},
	} {
		t.Run(test.name, test.run)
	}
}

type life struct {
	ctx context.Context
	h   home.Dir
	sb  *msb.Sandbox
}

func (l *life) handle(t *testing.T) *msb.SandboxHandle {
	t.Helper()
	return must(msb.GetSandbox(l.ctx, "life"))(t)
}

func (l *life) testRunning(t *testing.T) {
	h := l.handle(t)
	if h.Status() != msb.SandboxStatusRunning || h.Name() != "life" || h.Image() != vmtest.Image || h.Cause() != "" || h.BackendKind() != msb.BackendLocal {
		t.Errorf("handle: %s %s %s %q", h.Name(), h.Status(), h.Image(), h.Cause())
	}
	if h.Labels()["team"] != "ml" || len(h.Labels()) != 2 || time.Since(h.CreatedAt()).Abs() > testTimeout || h.UpdatedAt().Before(h.CreatedAt()) {
		t.Errorf("labels %v, created %s, updated %s", h.Labels(), h.CreatedAt(), h.UpdatedAt())
	}
	if !strings.Contains(h.ConfigJSON(), `"other"`) {
		t.Errorf("definition %s", h.ConfigJSON())
	}
	if got := sh(t, l.sb, "hostname; echo kept > /root/kept; sync"); got != "other" {
		t.Errorf("host name %q", got)
	}
	if _, err := l.sb.ExecDefault(l.ctx); err != nil { // python3 without input
		t.Error(err)
	}
	_, err := msb.CreateSandbox(l.ctx, "life", msb.WithImage(vmtest.Image))
	wantKind(t, err, msb.ErrSandboxAlreadyExists, "life")
	_, err = msb.StartSandbox(l.ctx, "life")
	wantKind(t, err, msb.ErrSandboxStillRunning, "life")
	wantKind(t, msb.RemoveSandbox(l.ctx, "life"), msb.ErrSandboxStillRunning, "life")
	wantKind(t, h.Remove(l.ctx), msb.ErrSandboxStillRunning, "life")
}

// testByName: who connects by name may do everything, and leaves it running.
func (l *life) testByName(t *testing.T) {
	other := must(l.handle(t).Connect(l.ctx))(t)
	if owns := other.OwnsLifecycleOrFalse(); owns || !l.sb.OwnsLifecycleOrFalse() {
		t.Errorf("who connects owns the sandbox: %t", owns)
	}
	if got := sh(t, other, "cat /root/kept"); got != "kept" {
		t.Errorf("read %q", got)
	}
	ok(t, other.Close())
	sh(t, l.sb, "true")
	for _, name := range []string{"absent", "../life", ""} {
		_, err := msb.GetSandbox(l.ctx, name)
		wantKind(t, err, msb.ErrSandboxNotFound)
	}
}

func (l *life) testDetached(t *testing.T) {
	ok(t, l.sb.Detach(l.ctx))
	ok(t, l.sb.Detach(l.ctx))
	if owns, err := l.sb.OwnsLifecycle(); owns || err != nil {
		t.Errorf("after Detach: owned %t, %v", owns, err)
	}
	ok(t, l.sb.Close())
	ok(t, l.sb.Close())
	again := must(l.handle(t).Connect(l.ctx))(t)
	sh(t, again, "true")
}

func (l *life) testStopped(t *testing.T) {
	result := make(chan *msb.SandboxStopResult, 1)
	go func() {
		res, err := l.sb.WaitUntilStopped(l.ctx)
		if err != nil {
			t.Error(err)
		}
		result <- res
	}()
	x := must(l.sb.ShellStream(l.ctx, "trap 'echo bye; sync; exit 0' TERM; echo up; while :; do sleep 0.05; done"))(t)
	defer x.Close()
	for must(x.Recv(l.ctx))(t).Kind != msb.ExecEventStdout {
	}
	began := time.Now()
	ok(t, l.sb.Stop(l.ctx))
	t.Logf("stopped in %s", time.Since(began).Round(time.Millisecond))
	if res := <-result; res == nil || res.Name != "life" || res.Status != msb.SandboxStatusStopped || res.Source != nil {
		t.Errorf("result %+v", res)
	}
	if h := l.handle(t); h.Status() != msb.SandboxStatusStopped || h.Cause() != "" {
		t.Errorf("status %s, cause %q", h.Status(), h.Cause())
	}
	if left := vmtest.Processes(string(l.h)); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	var said strings.Builder
	for _, e := range must(l.sb.Logs(l.ctx, msb.LogOptions{}))(t) {
		said.WriteString(e.Text())
	}
	if !strings.Contains(said.String(), "bye\n") {
		t.Errorf("the program was not asked to end: %q", said.String())
	}
	_, err := l.sb.Shell(l.ctx, "true")
	wantKind(t, err, msb.ErrSandboxNotRunning, "life")
	wantKind(t, l.sb.Stop(l.ctx), msb.ErrSandboxNotRunning, "life")
	_, err = l.handle(t).Connect(l.ctx)
	wantKind(t, err, msb.ErrSandboxNotRunning, "life", "stopped")
}

func (l *life) testKilled(t *testing.T) {
	sb := must(msb.StartSandbox(l.ctx, "life"))(t)
	if got := sh(t, sb, "cat /root/kept"); got != "kept" {
		t.Errorf("the writable layer has %q", got)
	}
	x := must(sb.Exec(l.ctx, "sh", []string{"-c", "echo lost > /root/lost"}))(t)
	if !x.Success() {
		t.Error("write failed")
	}
	began := time.Now()
	ok(t, sb.Kill(l.ctx))
	if d := time.Since(began); d > 2*time.Second {
		t.Errorf("Kill took %s", d)
	}
	if h := l.handle(t); h.Status() != msb.SandboxStatusStopped {
		t.Errorf("status %s (%s)", h.Status(), h.Cause())
	}
	if left := vmtest.Processes(string(l.h)); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	ok(t, l.handle(t).Remove(l.ctx))
	noSandboxes(l.ctx, t, l.h)
	wantKind(t, msb.RemoveSandbox(l.ctx, "life"), msb.ErrSandboxNotFound, "life")
	_, err := msb.StartSandbox(l.ctx, "life")
	wantKind(t, err, msb.ErrSandboxNotFound, "life")
}

// testListed has one stopped and one running sandbox to list.
func (l *life) testListed(t *testing.T) {
	sb := boot(l.ctx, t, "brief", msb.WithLabels(map[string]string{"team": "ml", "n": "2"}), msb.WithEphemeral(true))
	if got := sandboxNames(must(msb.ListSandboxes(l.ctx))(t)); fmt.Sprint(got) != "[brief life]" {
		t.Errorf("list = %v, want the newest first", got)
	}
	first := must(msb.ListSandboxesWith(l.ctx, msb.WithListLimit(1)))(t)
	if got := sandboxNames(first); fmt.Sprint(got) != "[brief]" || first.NextCursor == nil {
		t.Fatalf("first page = %v, cursor %v", got, first.NextCursor)
	}
	second := must(msb.ListSandboxesWith(l.ctx, msb.WithListLimit(1), msb.WithListCursor(*first.NextCursor)))(t)
	if got := sandboxNames(second); fmt.Sprint(got) != "[life]" || second.NextCursor != nil {
		t.Errorf("second page = %v, cursor %v", got, second.NextCursor)
	}
	if first.Sandboxes[0].Status() != msb.SandboxStatusRunning || second.Sandboxes[0].Status() != msb.SandboxStatusStopped {
		t.Errorf("statuses %s, %s", first.Sandboxes[0].Status(), second.Sandboxes[0].Status())
	}
	for want, labels := range map[string]map[string]string{
		"[life]": {"n": "1"}, "[brief life]": {"team": "ml"}, "[]": {"n": "1", "team": "other"},
	} {
		if got := sandboxNames(must(msb.ListSandboxesWith(l.ctx, msb.WithListLabels(labels)))(t)); fmt.Sprint(got) != want {
			t.Errorf("labels %v: %v, want %s", labels, got, want)
		}
	}
	ok(t, sb.Close())
	if res := must(sb.WaitUntilStopped(l.ctx))(t); res.Status != msb.SandboxStatusStopped {
		t.Errorf("result %+v", res)
	}
	noSandboxes(l.ctx, t, l.h, "life")
}

// TestSandboxRefused: definitions that cannot work are refused before anything
// is made, each by an error that names what is wrong.
func TestSandboxRefused(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	image := msb.WithImage(vmtest.Image)
	for name, test := range map[string]struct {
		sandbox string
		opts    []msb.SandboxOption
		kind    msb.ErrorKind
		part    string
	}{
		"no name":           {"", []msb.SandboxOption{image}, msb.ErrInvalidConfig, `""`},
		"name with a slash": {"a/b", []msb.SandboxOption{image}, msb.ErrInvalidConfig, "a/b"},
		"long name":         {strings.Repeat("n", 129), []msb.SandboxOption{image}, msb.ErrInvalidConfig, "nnn"},
		"no image":          {"a", nil, msb.ErrInvalidConfig, "image"},
		"absent image":      {"a", []msb.SandboxOption{msb.WithImage("absent"), msb.WithPullPolicy(msb.PullPolicyNever)}, msb.ErrImageNotFound, "absent"},
		"little memory":     {"a", []msb.SandboxOption{image, msb.WithMemory(16)}, msb.ErrInvalidConfig, "16 MiB"},
		"many CPUs":         {"a", []msb.SandboxOption{image, msb.WithCPUs(255)}, msb.ErrInvalidConfig, "255"},
		"relative workdir":  {"a", []msb.SandboxOption{image, msb.WithWorkdir("rel")}, msb.ErrInvalidConfig, "rel"},
		"absent user":       {"a", []msb.SandboxOption{image, msb.WithUser("nobody-of-this-name")}, msb.ErrInvalidConfig, "nobody-of-this-name"},
		"bad variable":      {"a", []msb.SandboxOption{image, msb.WithEnv(map[string]string{"A=B": "x"})}, msb.ErrInvalidConfig, "A=B"},
		"bad host name":     {"a", []msb.SandboxOption{image, msb.WithHostname("a b")}, msb.ErrInvalidConfig, "a b"},
		"bad accelerator":   {"a", []msb.SandboxOption{image, msb.WithAccelerator("magic")}, msb.ErrInvalidConfig, "magic"},
		"bind of the home":  {"a", []msb.SandboxOption{image, msb.WithMounts(map[string]msb.MountConfig{"/h": msb.Mount.Bind(string(h), msb.MountOptions{})})}, msb.ErrInvalidConfig, "/h"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := msb.CreateSandbox(ctx, test.sandbox, test.opts...)
			wantKind(t, err, test.kind, test.part)
			noSandboxes(ctx, t, h)
		})
	}
	t.Run("no msb", func(t *testing.T) {
		t.Setenv("MSB_PATH", "/absent/msb")
		_, err := msb.CreateSandbox(ctx, "a", image)
		wantKind(t, err, msb.ErrLibraryNotLoaded, "/absent/msb")
		if msb.IsInstalled() {
			t.Error("IsInstalled without msb")
		}
		noSandboxes(ctx, t, h)
	})
	t.Run("no guest kernel", func(t *testing.T) {
		ok(t, os.Remove(filepath.Join(string(h), "kernels")))
		_, err := msb.CreateSandbox(ctx, "a", image)
		wantKind(t, err, msb.ErrLibraryNotLoaded, "kernel")
		noSandboxes(ctx, t, h)
	})
}
