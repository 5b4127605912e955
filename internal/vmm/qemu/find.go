package qemu

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"runtime"

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

var versionText = regexp.MustCompile(`version (\d+\.\d+(\.\d+)?)`)

// Version asks a QEMU program for its version, "7.2.22".
func Version(path string) (string, error) {
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		return "", err
	}
	m := versionText.FindSubmatch(out)
	if m == nil {
		return "", errors.New("no version in " + path + " --version")
	}
	return string(m[1]), nil
}
