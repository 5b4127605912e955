package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Launch is a confined program about to be started.
type Launch struct {
	// Cmd is what to start. Its Stdin, Stdout and Stderr are free to be set;
	// its environment, ExtraFiles and SysProcAttr are not.
	Cmd *exec.Cmd
	// PrivateRoot tells whether the program will see the targets of the binds
	// (true) or the host's paths (false).
	PrivateRoot bool
	// ProcSelfFd is the descriptor number of /proc/self/fd in the program, if
	// the profile asked for it.
	ProcSelfFd int

	name     string
	findings []Finding  // known before the start
	report   *os.File   // what stage 1 has to say
	own      []*os.File // of this process
}

// Prepare makes the command that starts argv confined as p says. msb is the
// path of a program that runs Main for "confine-exec"; files become
// descriptors 3 and up of the program, and nothing else is open in it but the
// standard streams. The caller starts Cmd from a thread that lives as long as
// the program may: the program dies with it.
//
// Errors: a required measure that this host cannot apply is
// UnsupportedOperation with a hint. What fails later, in the child, ends it
// with status 125; Outcome then says why.
func Prepare(msb string, p Profile, argv []string, files []*os.File) (*Launch, error) {
	if err := p.Validate(); err != nil {
		return nil, errdefs.Wrap(errdefs.Internal, err, "confine")
	}
	if p.Program == "" {
		p.Binds = slices.Clone(p.Binds)
		if err := p.addOwnLibraries(msb); err != nil {
			return nil, errdefs.Wrap(errdefs.IO, err, "%s", msb)
		}
	}
	host := Inspect().Less(p.Without...)
	findings, err := host.gaps(&p)
	if err != nil {
		return nil, err
	}
	o := order{
		Profile:     p,
		Argv:        argv,
		PrivateRoot: host.PrivateRoot(),
		Mounter:     mounter(host.Mounts),
		MakeNodes:   host.Privileged,
		LandlockABI: host.LandlockABI,
		Files:       len(files),
	}
	l := &Launch{name: p.Name, findings: findings, PrivateRoot: o.PrivateRoot, ProcSelfFd: 3 + len(files)}
	if err := l.build(msb, &o, host, files); err != nil {
		l.Close()
		return nil, errdefs.Wrap(errdefs.IO, err, "start %s", p.Name)
	}
	return l, nil
}

// build makes the descriptors and the command.
func (l *Launch) build(msb string, o *order, host Host, files []*os.File) error {
	extra := append([]*os.File{}, files...)
	add := func(f *os.File, err error) (int, error) {
		if err != nil {
			return -1, err
		}
		l.own = append(l.own, f)
		extra = append(extra, f)
		return 2 + len(extra), nil
	}
	if o.Profile.ProcSelfFd { // keeps the number free; stage 1 puts its own descriptor there
		if _, err := add(os.Open(os.DevNull)); err != nil {
			return err
		}
	}
	var err error
	if o.Report, err = add(memfd("msb-confine-report")); err != nil {
		return err
	}
	l.report = l.own[len(l.own)-1]
	o.Parent, o.ParentPidfd = os.Getpid(), -1
	if fd, err := unix.PidfdOpen(os.Getpid(), 0); err == nil {
		o.ParentPidfd, _ = add(os.NewFile(uintptr(fd), "pidfd"), nil)
	}
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	orders, err := memfd("msb-confine-orders")
	fd, err := add(orders, err)
	if err != nil {
		return err
	}
	if _, err := orders.Write(b); err != nil {
		return err
	}
	l.Cmd = exec.Command(msb, "confine-exec", strconv.Itoa(fd))
	l.Cmd.ExtraFiles = extra
	l.Cmd.Env = o.Profile.Env
	if l.Cmd.Env == nil {
		l.Cmd.Env = []string{} // nil would be ours
	}
	flags := host.Clone
	if o.Profile.HostNetwork {
		flags &^= unix.CLONE_NEWNET
	}
	l.Cmd.SysProcAttr = cloneAttr(flags)
	l.Cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL // until stage 1 has set its own
	l.Cmd.SysProcAttr.Setpgid = true              // a terminal's Ctrl-C is for its starter
	return nil
}

func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Outcome returns what could not be applied. It is meaningful once the program
// is known to run, or has ended; the error is that of a stage 1 that gave up.
func (l *Launch) Outcome() ([]Finding, error) {
	var r report
	b := make([]byte, 64<<10)
	n, err := l.report.ReadAt(b, 0)
	if n == 0 {
		return l.findings, errdefs.Wrap(errdefs.Internal, err, "%s ended before it was confined", l.name)
	}
	if err := json.Unmarshal(b[:n], &r); err != nil {
		return l.findings, errdefs.Wrap(errdefs.Internal, err, "report about %s", l.name)
	}
	all := append(append([]Finding{}, l.findings...), r.Findings...)
	if r.Error != "" {
		return all, errdefs.Wrap(errdefs.IO, errors.New(r.Error), "%s could not be confined", l.name)
	}
	return all, nil
}

// Own gives files to the launch: Close closes them too.
func (l *Launch) Own(files ...*os.File) { l.own = append(l.own, files...) }

// Close frees what belongs to the launch in this process. The program is not
// affected; Outcome cannot be asked any more.
func (l *Launch) Close() {
	for _, f := range l.own {
		_ = f.Close()
	}
	l.own = nil
}

// Less returns h without what the measures need, so that weaker paths can be
// forced.
func (h Host) Less(without ...Measure) Host {
	for _, m := range without {
		switch m {
		case Namespaces:
			h.Clone &^= otherSpaces
		case PIDNamespace:
			h.Clone &^= unix.CLONE_NEWPID
		case PrivateRoot:
			h.Clone &^= unix.CLONE_NEWNS
		case MountCalls:
			h.Mounts = false
		case OwnUser:
			h.Privileged = false
		case Landlock:
			h.LandlockABI = 0
		case Seccomp:
			h.Seccomp = false
		}
	}
	if h.Clone&(mountAndPID|otherSpaces) == 0 {
		h.Clone = 0
	}
	return h
}

// gaps lists what p wants and h cannot give, drops it from p, and refuses if it
// was required.
func (h Host) gaps(p *Profile) ([]Finding, error) {
	if !h.Seccomp {
		p.Filter = ""
	}
	wanted := []Measure{Namespaces, PIDNamespace, PrivateRoot, Landlock, Seccomp}
	if p.User != nil {
		wanted = append(wanted, OwnUser)
		if !h.Privileged {
			p.User = nil
		}
	}
	var findings []Finding
	for _, m := range wanted {
		f := h.finding(m)
		if p.HostNetwork && m == Namespaces && h.Clone&unix.CLONE_NEWIPC != 0 {
			continue
		}
		if f.Status == Applied {
			continue
		}
		if p.requires(m) {
			return nil, refuse(p.Name, f)
		}
		findings = append(findings, f)
	}
	return findings, nil
}
