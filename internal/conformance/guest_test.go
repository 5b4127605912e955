package conformance_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/conformance"
	"github.com/microsandbox-go/microsandbox/internal/conformance/guesttest"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// patience bounds one program in the guest, which is slow without KVM.
const patience = 4 * time.Minute

// kit is a directory with what programs in the guest need, mounted at /kit.
type kit struct {
	dir           string
	root, strict  []*conformance.Entry // of plain.tar and devices.tar
	plainBaseline map[string]string    // results of the tests on a plain directory
}

// kitEnv names a kit that another process has made.
const kitEnv = "MSB_CONFORMANCE_KIT"

// makeKit compiles the guest's binary and writes the inputs.
func makeKit(t *testing.T) *kit {
	t.Helper()
	k := &kit{dir: os.Getenv(kitEnv)}
	var repo, plain, devices bytes.Buffer
	err := conformance.WriteRepository(&repo)
	if err == nil {
		k.root, err = conformance.WriteArchive(&plain, false)
	}
	if err == nil {
		k.strict, err = conformance.WriteArchive(&devices, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	if k.dir != "" {
		return k
	}
	k.dir = openDir(t)
	build := exec.Command("go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", k.path("guest.test"), "./guesttest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build.Args, err, out)
	}
	script, err := os.ReadFile("testdata/sqlite.py")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"repository": repo.Bytes(), "plain.tar": plain.Bytes(), "devices.tar": devices.Bytes(), "sqlite.py": script,
	} {
		if err := os.WriteFile(k.path(name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return k
}

// openDir makes a temporary directory that every user may enter, unlike
// t.TempDir.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "conformance")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (k *kit) path(name string) string { return filepath.Join(k.dir, name) }

// unpack puts the kit into a sandbox, at /kit. A mount would cost descriptors
// of the file server, which its shares divide.
func (k *kit) unpack(t *testing.T, sb *microsandbox.Sandbox) {
	t.Helper()
	ctx := context.Background()
	if err := sb.FS().Mkdir(ctx, "/kit"); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(k.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := sb.FS().CopyFromHost(ctx, k.path(f.Name()), "/kit/"+f.Name()); err != nil {
			t.Fatal(err)
		}
	}
}

// place is where a program works: a mounted volume and a user of the guest.
type place struct {
	t      *testing.T
	sb     *microsandbox.Sandbox
	volume string
	policy microsandbox.StatVirtualization
	uid    int // and gid

	options []microsandbox.VolumeOption
}

func (p *place) dir() string { return "/" + p.volume }

// on returns the place with another test.
func (p place) on(t *testing.T) *place { p.t = t; return &p }

// tries runs a script as the place's user in its directory and returns what it
// printed, on standard output and on standard error, and its exit code.
func (p *place) tries(script string) (string, string, int) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience+30*time.Second)
	defer cancel()
	out, err := p.sb.Exec(ctx, "/bin/sh", []string{"-euc", script},
		microsandbox.WithExecUser(fmt.Sprintf("%d:%d", p.uid, p.uid)), microsandbox.WithExecCwd(p.dir()),
		microsandbox.WithExecEnv(map[string]string{
			"HOME": "/nonexistent", guesttest.DirEnv: p.dir(), "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C.UTF-8",
		}),
		microsandbox.WithExecTimeout(patience))
	if err != nil {
		p.t.Fatalf("%s: %v", script, err)
	}
	return out.Stdout(), out.Stderr(), out.ExitCode()
}

// runs is tries for a script that must succeed.
func (p *place) runs(script string) string {
	p.t.Helper()
	out, talk, code := p.tries(script)
	if code != 0 {
		p.t.Fatalf("exit code %d of:%s\n%s%s", code, script, tail(out), tail(talk))
	}
	return out
}

func tail(s string) string {
	if len(s) > 4000 {
		return "..." + s[len(s)-4000:]
	}
	return s
}

// boot starts a sandbox with a volume for each place, which are made, and the
// kit. Each place's user owns its directory. The sandbox is removed at the end.
func boot(t *testing.T, k *kit, name string, places ...*place) {
	t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	mounts := map[string]microsandbox.MountConfig{}
	for _, p := range places {
		if _, err := microsandbox.CreateVolume(ctx, p.volume, p.options...); err != nil {
			t.Fatal(err)
		}
		mounts[p.dir()] = microsandbox.Mount.Named(p.volume, microsandbox.MountOptions{StatVirtualization: p.policy})
	}
	sb, err := microsandbox.CreateSandbox(ctx, name, microsandbox.WithImage(vmtest.Image), microsandbox.WithMounts(mounts),
		microsandbox.WithUser("0:0"), microsandbox.WithBootTimeout(100*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, name) })
	k.unpack(t, sb)
	for _, p := range places {
		p.sb = sb
		if !p.fixedOwner() {
			root := &place{t: t, sb: sb, volume: p.volume}
			root.runs(fmt.Sprintf("chown %d:%d . && chmod 755 .", p.uid, p.uid))
		}
	}
	took(t, "boot", began)
}

// fixedOwner reports whether all files belong to one user: without stat
// virtualization the guest sees what the host has, and there an ordinary user
// cannot give files away.
func (p *place) fixedOwner() bool { return p.policy == off && os.Geteuid() != 0 }

func remove(t *testing.T, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	h, err := microsandbox.GetSandbox(ctx, name)
	if err == nil {
		err = h.Kill(ctx)
	}
	if err == nil {
		err = h.Remove(ctx)
	}
	if err != nil {
		t.Error(err)
	}
}

// took logs how long a part of a test took, as a figure to choose sizes by.
func took(t *testing.T, what string, since time.Time) {
	t.Helper()
	t.Logf("%s: %.1f s", what, time.Since(since).Seconds())
}

// lines splits output into its lines.
func lines(s string) []string { return strings.Split(strings.TrimSuffix(s, "\n"), "\n") }

// sameLines reports the first differences of two digest lists.
func sameLines(t *testing.T, got, want []string) {
	t.Helper()
	have, expected := map[string]bool{}, map[string]bool{}
	for _, l := range got {
		have[l] = true
	}
	bad := 0
	for _, l := range want {
		expected[l] = true
		if !have[l] {
			if bad++; bad <= 10 {
				t.Errorf("missing: %.300s", l)
			}
		}
	}
	for _, l := range got {
		if !expected[l] {
			if bad++; bad <= 20 {
				t.Errorf("instead: %.300s", l)
			}
		}
	}
	if bad > 0 || len(got) != len(want) {
		t.Fatalf("%d lines of %d and %d differ", bad, len(got), len(want))
	}
}
