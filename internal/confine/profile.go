package confine

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Measure names one thing that is taken away from a program.
type Measure string

// The measures, in the order in which they are applied.
const (
	Namespaces   Measure = "namespaces"    // own IPC, UTS and network namespace
	PIDNamespace Measure = "pid-namespace" // no other process can be seen or signalled
	PrivateRoot  Measure = "private-root"  // a file system with nothing but the binds
	OwnUser      Measure = "own-user"      // a uid that owns nothing on the host
	Capabilities Measure = "capabilities"  // reduced to a list in all five sets
	NoNewPrivs   Measure = "no-new-privs"  // no execve gives anything back
	Landlock     Measure = "landlock"      // file access by path, in the kernel's LSM
	Seccomp      Measure = "seccomp"       // system calls by number
	Rlimits      Measure = "rlimits"
	Descriptors  Measure = "descriptors"  // nothing open but what was listed
	ParentDeath  Measure = "parent-death" // SIGKILL when the starting thread ends
)

// MountCalls is no measure: in Profile.Without it forces the private root to be
// made as on kernels before 5.12, with the same result.
const MountCalls Measure = "mount-calls"

// Bind is one host file or directory that is visible under the private root.
// Mounts below a directory come along. nosuid and nodev are always set.
type Bind struct {
	Source string `json:"source"`           // absolute host path; links in it are followed
	Target string `json:"target,omitempty"` // absolute path in the private root; "" means Source
	// Dev and Ino, unless both are 0, are what Source must be: a link or
	// directory swapped under the path since the caller looked is refused.
	Dev      uint64 `json:"dev,omitempty"`
	Ino      uint64 `json:"ino,omitempty"`
	Writable bool   `json:"writable,omitempty"`
	Exec     bool   `json:"exec,omitempty"`
	Optional bool   `json:"optional,omitempty"` // a missing Source is left out
}

func (b Bind) target() string {
	if b.Target == "" {
		return b.Source
	}
	return b.Target
}

// Link is a symbolic link in the private root.
type Link struct {
	Path string `json:"path"`
	To   string `json:"to"`
}

// User is whom the program runs as.
type User struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
}

// Rlimit is one resource limit. Limits are lowered, never raised beyond the
// hard limit found.
type Rlimit struct {
	Resource int    `json:"resource"`          // RLIMIT_*
	Max      uint64 `json:"max,omitempty"`     // soft and hard limit, in the unit of setrlimit(2)
	ToHard   bool   `json:"to_hard,omitempty"` // instead: the soft limit becomes the hard one
}

// Filter names a system call filter of this package.
type Filter string

// The filters.
const (
	// FilterFileServer allows what the Go runtime and a file server need and
	// answers ENOSYS to the rest.
	FilterFileServer Filter = "fileserver"
	// FilterFileServerOwners also allows changing the thread's ids, as a file
	// server does that creates files for other owners.
	FilterFileServerOwners Filter = "fileserver-owners"
	// FilterVMM allows everything but what a VMM has no business with:
	// namespaces, mounts, tracing, keys, BPF, modules, clocks.
	FilterVMM Filter = "vmm"
)

// Profile says how a program is confined. It is data: it travels as JSON from
// the process that wants the program to the process that becomes it.
type Profile struct {
	Name string `json:"name"` // of the program, for messages: "file server"

	// Required measures end the launch when they cannot be applied; the others
	// are left out with a Finding.
	Required []Measure `json:"required,omitempty"`
	// Without are measures that are not applied though they could be, so that
	// tests and operators can force the weaker path.
	Without []Measure `json:"without,omitempty"`

	Binds   []Bind   `json:"binds,omitempty"`
	Links   []Link   `json:"links,omitempty"`
	Devices []string `json:"devices,omitempty"` // "/dev/null" and the like, readable and writable
	User    *User    `json:"user,omitempty"`    // nil: stay who we are
	// Keep are the capabilities kept, as "CAP_CHOWN".
	Keep    []string `json:"keep,omitempty"`
	Filter  Filter   `json:"filter,omitempty"` // "": none
	Rlimits []Rlimit `json:"rlimits,omitempty"`

	// Program is the path of the executable as seen in the private root; ""
	// means msb itself, which then need not be visible there.
	Program string   `json:"program,omitempty"`
	Env     []string `json:"env,omitempty"` // the whole environment of the program
	// ProcSelfFd leaves a descriptor of the program's own /proc/self/fd open,
	// from which nothing else of /proc can be reached. Its number is the first
	// after those of the files; see Launch.ProcSelfFd.
	ProcSelfFd  bool `json:"proc_self_fd,omitempty"`
	HostNetwork bool `json:"host_network,omitempty"` // no own network namespace
}

func (p *Profile) requires(m Measure) bool { return slices.Contains(p.Required, m) }

// Validate reports the first thing in p that makes no sense.
func (p *Profile) Validate() error {
	for _, b := range p.Binds {
		if !filepath.IsAbs(b.Source) || !cleanTarget(b.target()) {
			return fmt.Errorf("%s: bind of %q at %q: not absolute and clean", p.Name, b.Source, b.target())
		}
	}
	for _, l := range p.Links {
		if !cleanTarget(l.Path) || l.To == "" {
			return fmt.Errorf("%s: link %q to %q makes no sense", p.Name, l.Path, l.To)
		}
	}
	for _, d := range p.Devices {
		if !cleanTarget(d) {
			return fmt.Errorf("%s: device %q: not an absolute and clean path", p.Name, d)
		}
	}
	for _, c := range p.Keep {
		if _, ok := capabilityNumber(c); !ok {
			return fmt.Errorf("%s: unknown capability %q", p.Name, c)
		}
	}
	if p.Filter != "" && filterFor(p.Filter) == nil {
		return fmt.Errorf("%s: unknown filter %q", p.Name, p.Filter)
	}
	return nil
}

func cleanTarget(path string) bool {
	return filepath.IsAbs(path) && path != "/" && filepath.Clean(path) == path && !strings.Contains(path, "\x00")
}

// Status says how far a measure went.
type Status string

// What a Finding says of its measure.
const (
	Applied Status = "ok"
	Weaker  Status = "weaker"  // applied in part
	Missing Status = "missing" // not applied
)

// Finding is what became of one measure. Detail says what happened and what
// that costs, Hint what would mend it.
type Finding struct {
	Measure Measure `json:"measure"`
	Status  Status  `json:"status"`
	Detail  string  `json:"detail,omitempty"`
	Hint    string  `json:"hint,omitempty"`
}

func (f Finding) String() string {
	s := fmt.Sprintf("%s: %s", f.Measure, f.Status)
	if f.Detail != "" {
		s += ": " + f.Detail
	}
	return s
}

// refuse is the error of a required measure that cannot be had.
func refuse(name string, f Finding) error {
	e := errdefs.New(errdefs.UnsupportedOperation, "%s cannot be confined: %s", name, f)
	e.Hint = f.Hint
	return e
}
