package confine

import (
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Tool returns the profile of a program of the distribution that reads bytes a
// guest wrote: it sees its own libraries and the given files, no network, no
// other process and no /proc, and keeps no capability. Who is root stays uid 0
// to own the files, and so needs the private root; an ordinary user gets it
// where user namespaces are allowed, otherwise Landlock.
//
// Resource limits are for the caller to add. Errors: IO when the binary cannot
// be read.
func Tool(name, binary string, files ...Bind) (Profile, error) {
	resolved, err := filepath.EvalSymlinks(binary)
	if err != nil {
		return Profile{}, errdefs.Wrap(errdefs.IO, err, "%s", name)
	}
	p := Profile{
		Name:     name,
		Program:  resolved,
		Filter:   FilterVMM,
		Required: []Measure{NoNewPrivs, Rlimits, Descriptors, ParentDeath},
		Binds:    []Bind{{Source: resolved, Exec: true}, {Source: "/etc/ld.so.cache", Optional: true}},
		Env:      []string{"PATH=/usr/bin:/bin", "LC_ALL=C"},
		Rlimits:  []Rlimit{{Resource: unix.RLIMIT_CORE}},
		Devices:  usableDevices("/dev/null", "/dev/urandom"),
	}
	if unix.Getuid() == 0 {
		p.Required = append(p.Required, PrivateRoot, Capabilities)
	}
	p.addLibraries(resolved)
	if err := p.addInterpreter(resolved); err != nil {
		return Profile{}, errdefs.Wrap(errdefs.IO, err, "%s %s", name, resolved)
	}
	for _, b := range files {
		p.bindOnce(b)
	}
	return p, nil
}
