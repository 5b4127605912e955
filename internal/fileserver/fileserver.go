package fileserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
)

// Share is one host directory served under a tag.
type Share struct {
	Tag  string `json:"tag"`
	Path string `json:"path"` // host directory, absolute, links resolved
	// Dev and Ino are the identity the caller saw; 0 and 0: not checked.
	Dev       uint64 `json:"dev,omitempty"`
	Ino       uint64 `json:"ino,omitempty"`
	Readonly  bool   `json:"readonly,omitempty"`
	StatVirt  string `json:"stat_virt,omitempty"`  // "strict" (also ""), "relaxed", "off"
	HostPerms string `json:"host_perms,omitempty"` // "private" (also ""), "mirror"
	Cache     string `json:"cache,omitempty"`      // "auto" (also ""), "none", "always"
	// GuestUID and GuestGID are the guest's owner of files that belong to the
	// server's user.
	GuestUID uint32 `json:"guest_uid,omitempty"`
	GuestGID uint32 `json:"guest_gid,omitempty"`
	Queues   int    `json:"queues,omitempty"` // request queues; 0 means 1
}

// Options describe one file server process.
type Options struct {
	MSB     string     // path of msb
	Shares  []Share    // at least one
	Conns   []*os.File // same order: one end of a socket pair each, or a listening socket
	Inherit []*os.File // attach locks, kept open while the process lives
	// Ledgers are what the shares charge to, in their order; nil, also all of it,
	// where nothing is counted. The caller closes its own once Start has returned:
	// the process is to be the only one that has them open.
	Ledgers []*os.File
	Log     *os.File // stderr of the process; nil: /dev/null
	ID      string   // of the sandbox, for messages
	// Config offers the device's configuration space over vhost-user: needed
	// by VMMs other than QEMU, fatal to QEMU 7.1 to 8.0.
	Config bool

	// Spawn starts the command; nil means cmd.Start. The parent-death signal
	// follows the thread that calls fork: it must not end before the process.
	Spawn func(*exec.Cmd) error
	// Without forces weaker confinement, for tests.
	Without []confine.Measure
}

// Limits of one process.
const (
	maxShares = 64
	maxQueues = 16
)

func (o *Options) validate() error {
	if len(o.Shares) == 0 || len(o.Shares) > maxShares {
		return errdefs.New(errdefs.InvalidArgument, "file server: %d shares, want 1 to %d", len(o.Shares), maxShares)
	}
	if len(o.Conns) != len(o.Shares) {
		return errdefs.New(errdefs.InvalidArgument, "file server: %d connections for %d shares", len(o.Conns), len(o.Shares))
	}
	if n := len(o.Ledgers); n != 0 && n != len(o.Shares) {
		return errdefs.New(errdefs.InvalidArgument, "file server: %d ledgers for %d shares", n, len(o.Shares))
	}
	for _, s := range o.Shares {
		if !filepath.IsAbs(s.Path) {
			return errdefs.New(errdefs.InvalidArgument, "file server: share %q: path %q is not absolute", s.Tag, s.Path)
		}
		if s.Queues < 0 || s.Queues > maxQueues {
			return errdefs.New(errdefs.InvalidArgument, "file server: share %q: %d queues, want 1 to %d", s.Tag, s.Queues, maxQueues)
		}
		if err := s.config().Validate(); err != nil {
			return err
		}
	}
	return nil
}

// config is what the share means to the server behind it.
func (s Share) config() fuseserver.Config {
	return fuseserver.Config{
		Readonly:  s.Readonly,
		StatVirt:  s.StatVirt,
		HostPerms: s.HostPerms,
		Cache:     s.Cache,
		GuestUID:  s.GuestUID,
		GuestGID:  s.GuestGID,
	}
}

// Process is a running file server.
type Process struct {
	cmd      *exec.Cmd
	findings []confine.Finding
	done     chan struct{}
	err      error // of the process; valid when done is closed
	kill     sync.Once
}

// Start starts a file server and returns when it serves all shares. The
// caller's copies of the files stay open and may be closed afterwards.
//
// Errors: UnsupportedOperation if this host cannot confine it, or a share's
// file system cannot do what its stat virtualization needs (the hint names the
// way out); InvalidConfig and IO as the child reports them. After an error, or
// when ctx ends first, no process is left.
func Start(ctx context.Context, o Options) (*Process, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	statusR, statusW, err := os.Pipe()
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "file server")
	}
	defer statusR.Close()
	defer statusW.Close()
	launch, err := prepare(&o, statusW)
	if err != nil {
		return nil, err
	}
	defer launch.Close()
	if o.Log != nil {
		launch.Cmd.Stderr = o.Log
	}
	spawn := o.Spawn
	if spawn == nil {
		spawn = (*exec.Cmd).Start
	}
	if err := spawn(launch.Cmd); err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "start file server %s", o.MSB)
	}
	p := &Process{cmd: launch.Cmd, done: make(chan struct{})}
	go p.wait()
	_ = statusW.Close() // so that the end of the child ends the pipe
	if err := p.handshake(ctx, statusR, launch); err != nil {
		p.Kill()
		<-p.done
		return nil, err
	}
	return p, nil
}

// prepare makes the command: descriptor fdStatus is the pipe, fdRequest the
// request, then the connections, what is only kept open, and the ledgers.
func prepare(o *Options, status *os.File) (*confine.Launch, error) {
	profile, privileged := profileOf(o)
	root := confine.Inspect().Less(o.Without...).PrivateRoot()
	files := append(slices.Clone(o.Conns), o.Inherit...)
	ledgers := make([]int, len(o.Shares))
	for i, f := range o.Ledgers {
		if f != nil {
			ledgers[i] = fdRequest + 1 + len(files)
			files = append(files, f)
		}
	}
	b, err := json.Marshal(request{
		ID: o.ID, Shares: o.Shares, PrivateRoot: root, Privileged: privileged, Config: o.Config,
		Ledgers: ledgers, ProcSelfFd: fdRequest + 1 + len(files),
	})
	if err != nil {
		return nil, errdefs.Wrap(errdefs.Internal, err, "file server")
	}
	req, err := fileOf(b)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.IO, err, "file server")
	}
	files = append([]*os.File{status, req}, files...)
	launch, err := confine.Prepare(o.MSB, profile, []string{"msb", "fileserver", o.ID}, files)
	if err != nil {
		_ = req.Close()
		return nil, err
	}
	launch.Own(req)
	return launch, nil
}

// fileOf returns a file of memory with these bytes, at offset 0.
func fileOf(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("msb-fileserver", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "msb-fileserver")
	if _, err := f.WriteAt(b, 0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// profileOf says how the server is confined, and whether it has the
// capabilities of one started by root.
func profileOf(o *Options) (p confine.Profile, privileged bool) {
	host := confine.Inspect().Less(o.Without...)
	p = confine.Profile{
		Name:       "file server",
		Filter:     confine.FilterFileServer,
		ProcSelfFd: true,
		Without:    o.Without,
		Rlimits: []confine.Rlimit{
			{Resource: unix.RLIMIT_CORE}, // a core would hold guest memory
			{Resource: unix.RLIMIT_NOFILE, ToHard: true},
			{Resource: unix.RLIMIT_FSIZE, ToHard: true},
		},
		Env: environment(),
	}
	for i, s := range o.Shares {
		p.Binds = append(p.Binds, confine.Bind{
			Source: s.Path, Target: shareRoot(i), Dev: s.Dev, Ino: s.Ino, Writable: !s.Readonly,
		})
	}
	if os.Geteuid() == 0 {
		// uid 0 owns root's files whatever its capabilities are.
		p.Required = append(p.Required, confine.PrivateRoot)
	}
	if !host.Privileged {
		return p, false
	}
	p.Keep = []string{"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER"}
	for _, s := range o.Shares {
		if s.StatVirt == "off" {
			p.Keep = append(p.Keep, "CAP_CHOWN", "CAP_FSETID", "CAP_SETUID", "CAP_SETGID")
			p.Filter = confine.FilterFileServerOwners
			break
		}
	}
	return p, true
}

// shareRoot is where share i lies in the private root.
func shareRoot(i int) string { return fmt.Sprintf("/share/%d", i) }

// environment is the number of CPUs that we may use, which the runtime cannot
// find out where there is no /sys, and what a test or a developer set.
func environment() []string {
	env := []string{"GOMAXPROCS=" + strconv.Itoa(runtime.GOMAXPROCS(0))}
	for _, name := range []string{"MSB_FAILPOINT", "GOCOVERDIR", "GOTRACEBACK", "GODEBUG"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

// handshake waits for the child's word, or its end, or the end of ctx.
func (p *Process) handshake(ctx context.Context, status *os.File, launch *confine.Launch) error {
	stop := context.AfterFunc(ctx, p.Kill) // which ends the pipe
	defer stop()
	s, err := readStatus(status)
	if ctx.Err() != nil {
		return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "start of the file server")
	}
	if err == nil && !s.Ready {
		return s.error()
	}
	if err == nil {
		p.findings, err = launch.Outcome()
		return err
	}
	<-p.done // the child said nothing: how it ended says why
	if _, why := launch.Outcome(); why != nil {
		return why
	}
	return errdefs.Wrap(errdefs.IO, errors.Join(p.err, err), "file server ended at once")
}

// wait reaps the process.
func (p *Process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Findings are the measures of confinement that could not be applied.
func (p *Process) Findings() []confine.Finding { return p.findings }

// Done is closed when the process has ended and is reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended, nil for a clean end: every front end closed
// its connection. Valid after Done.
func (p *Process) Err() error {
	<-p.done
	if p.err == nil {
		return nil
	}
	return errdefs.Wrap(errdefs.IO, p.err, "file server")
}

// Kill ends the process at once. It is idempotent; Done tells when it is gone.
func (p *Process) Kill() {
	p.kill.Do(func() { _ = p.cmd.Process.Kill() })
}
