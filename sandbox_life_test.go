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
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// testTimeout bounds whatever one test does with guests.
const testTimeout = 2 * time.Minute

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
	vmtest.Missing(t, "%s", program)
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
