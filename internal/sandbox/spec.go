package sandbox

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// Defaults of a definition.
const (
	DefaultCPUs      = 1
	DefaultMemoryMiB = 512
	DefaultUpperMiB  = 4096
	DefaultShell     = "/bin/sh"
	DefaultPath      = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	minMemoryMiB     = 128
	maxCPUs          = 16 // NR_CPUS of our kernel
	maxNameLen       = 128
	maxHostname      = 64 // HOST_NAME_MAX (Linux)
)

// Spec is what a caller wants; the zero value of a field is its default.
type Spec struct {
	Name        string
	Image       string
	PullPolicy  string
	Insecure    bool
	Auth        *fetch.Auth
	CPUs        int
	MemoryMiB   int
	UpperMiB    int64
	Workdir     string
	Shell       string
	Hostname    string
	User        string
	Env         map[string]string
	Entrypoint  []string
	Cmd         []string
	Labels      map[string]string
	Mounts      []mount.Spec
	Detached    bool
	Ephemeral   bool
	Accel       string
	BootTimeout time.Duration
	Progress    func(Progress)
}

// Progress is one step of a launch.
type Progress struct {
	Step    string // pull, rootfs, volumes, boot, ready
	Message string
	Done    int64
	Total   int64
}

func (s *Spec) report(step, message string) {
	if s.Progress != nil {
		s.Progress(Progress{Step: step, Message: message})
	}
}

// Validate checks everything that needs no storage. Errors are of kind
// InvalidConfig and name the field and value.
func (s *Spec) Validate() error {
	if err := ValidateName(s.Name); err != nil {
		return err
	}
	bad := func(format string, args ...any) error {
		return errdefs.New(errdefs.InvalidConfig, "sandbox %q: %s", s.Name, fmt.Sprintf(format, args...))
	}
	switch {
	case s.Image == "":
		return bad("no image given").(*errdefs.Error).WithHint("name an OCI image, for example WithImage(\"python\") or msb run python")
	case s.CPUs < 0 || s.CPUs > maxCPUs:
		return bad("%d CPUs: 1 to %d can be given", s.CPUs, maxCPUs)
	case s.MemoryMiB != 0 && s.MemoryMiB < minMemoryMiB:
		return bad("%d MiB of memory: at least %d MiB are needed", s.MemoryMiB, minMemoryMiB)
	case s.UpperMiB != 0 && s.UpperMiB < diskimg.MinSizeMiB:
		return bad("a writable layer (OCI upper size) of %d MiB is too small for a file system: the smallest has %d MiB", s.UpperMiB, diskimg.MinSizeMiB)
	case len(s.Hostname) > maxHostname || strings.ContainsAny(s.Hostname, " \t\n/"):
		return bad("host name %q: it can have %d bytes and neither blanks nor slashes", s.Hostname, maxHostname)
	case s.Workdir != "" && !strings.HasPrefix(s.Workdir, "/"):
		return bad("working directory %q is not absolute", s.Workdir)
	case !slices.Contains([]string{"", "auto", "kvm", "tcg"}, s.Accel):
		return bad("accelerator %q is not auto, kvm or tcg", s.Accel)
	case s.BootTimeout < 0:
		return bad("boot timeout %s is negative", s.BootTimeout)
	}
	for k := range s.Env {
		if k == "" || strings.ContainsAny(k, "=\x00") {
			return bad("environment variable name %q", k)
		}
	}
	return mount.Validate(s.Mounts)
}

// ValidateName checks a sandbox name: the letters of volume names, 128 bytes.
func ValidateName(name string) error {
	ok := name != "" && len(name) <= maxNameLen && isAlnum(name[0])
	for i := 0; ok && i < len(name); i++ {
		ok = isAlnum(name[i]) || strings.IndexByte("._-", name[i]) >= 0
	}
	if !ok {
		return errdefs.New(errdefs.InvalidConfig, "invalid sandbox name %q", name).
			WithHint("a name begins with a letter or digit, goes on with letters, digits, '.', '-', '_', and has at most %d bytes", maxNameLen)
	}
	return nil
}

func isAlnum(b byte) bool {
	return b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z'
}

// Store makes and finds the sandboxes of one home.
type Store struct{ h home.Dir }

// New returns the sandboxes of a home. It does no I/O.
func New(h home.Dir) *Store { return &Store{h} }
