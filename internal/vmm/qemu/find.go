package qemu

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// BinaryEnv names the QEMU program to use.
const BinaryEnv = "MSB_QEMU"

// program is the name of QEMU for this host's architecture.
func program() string {
	if runtime.GOARCH == "arm64" {
		return "qemu-system-aarch64"
	}
	return "qemu-system-x86_64"
}

// Find returns the path of QEMU. Errors: LibraryNotLoaded with the package's name.
func Find() (path, version string, err error) {
	if p := os.Getenv(BinaryEnv); p != "" {
		if _, err := exec.LookPath(p); err != nil {
			return "", "", errdefs.Wrap(errdefs.LibraryNotLoaded, err, "%s=%s", BinaryEnv, p).
				WithHint("set %s to a QEMU program, or unset it", BinaryEnv)
		}
		return p, "", nil
	}
	for _, p := range []string{program(), "/usr/bin/" + program(), "/usr/libexec/qemu-kvm"} {
		if found, err := exec.LookPath(p); err == nil {
			return found, "", nil
		}
	}
	return "", "", errdefs.New(errdefs.LibraryNotLoaded, "%s not found: sandboxes run in QEMU", program()).
		WithHint("install it: apt-get install --no-install-recommends qemu-system-x86 (Debian), qemu-system-x86-core (Fedora), or set %s", BinaryEnv)
}

var versionText = regexp.MustCompile(`version ((\d+)\.(\d+)(\.\d+)?)`)

// oldest is the first QEMU this project is tested with: Debian 12's.
var oldest = [2]int{7, 2}

// Version asks a QEMU program for its version, "7.2.22". One that does not
// answer or is older than 7.2 is an error.
func Version(path string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), greetTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", errdefs.Wrap(errdefs.LibraryNotLoaded, err, "%s --version", path)
	}
	m := versionText.FindSubmatch(out)
	if m == nil {
		return "", errdefs.New(errdefs.LibraryNotLoaded, "%s does not say which QEMU it is", path)
	}
	major, _ := strconv.Atoi(string(m[2]))
	minor, _ := strconv.Atoi(string(m[3]))
	if major < oldest[0] || major == oldest[0] && minor < oldest[1] {
		return "", errdefs.New(errdefs.LibraryNotLoaded, "%s is QEMU %s, but %d.%d is the oldest that works", path, m[1], oldest[0], oldest[1])
	}
	return string(m[1]), nil
}
