// Package prereq says what a test needs of the machine it runs on. Where that is
// missing the test is skipped and names it; in CI (CI=true) nothing may be
// missing, and the test fails.
package prereq

import (
	"os"
	"os/exec"
	"testing"
)

// Missing ends the test for want of something.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("required in CI, and missing: "+format, args...)
	}
	t.Skipf("missing: "+format, args...)
}

// Root skips the test for an ordinary user, who cannot do what why says. That is
// so in CI too, which runs as root: tests that run themselves again as somebody
// else come here.
func Root(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("missing: root, to %s", why)
	}
}

// Program demands a program of a Debian package and returns its path. It may be
// in a directory that only root's PATH has.
func Program(t testing.TB, name, pkg string) string {
	t.Helper()
	for _, p := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	Missing(t, "%s (package %s)", name, pkg)
	return ""
}

// LoopMount mounts an image read-only or, with "rw", for writing, through a loop
// device that goes with the mount. Unmounting is the caller's.
func LoopMount(t testing.TB, image, at, mode string) {
	t.Helper()
	Root(t, "mount an image")
	if out, err := exec.Command("mount", "-o", "loop,"+mode, image, at).CombinedOutput(); err != nil {
		Missing(t, "loop mounts: %v: %s", err, out)
	}
}
