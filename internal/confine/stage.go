package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// exitConfine is the exit status of a stage 1 that did not become its program.
const exitConfine = 125

// order is what Prepare tells stage 1: the profile, already cut down to what
// the host allows, and the descriptors.
type order struct {
	Profile     Profile  `json:"profile"`
	Argv        []string `json:"argv"`
	PrivateRoot bool     `json:"private_root"`
	Mounter     mounter  `json:"mounter"`
	MakeNodes   bool     `json:"make_nodes"`
	LandlockABI int      `json:"landlock_abi"`
	Files       int      `json:"files"` // descriptors 3 to 2+Files belong to the program
	Parent      int      `json:"parent"`
	ParentPidfd int      `json:"parent_pidfd"` // -1: none, compare Parent
	Report      int      `json:"report"`
}

// report is what stage 1 leaves behind in a file of memory, right before it
// becomes the program, or when it gives up.
type report struct {
	Findings []Finding `json:"findings,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Main is stage 1, the hidden command msb confine-exec FD: it reads its orders
// from the descriptor, confines its thread and becomes the program. It returns
// only when that fails.
func Main(args []string) int {
	// Namespaces, capabilities, filters and Landlock are properties of a
	// thread; execve ends all threads but this one.
	runtime.LockOSThread()
	o, err := readOrder(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "msb: confine:", err)
		return exitConfine
	}
	s := &stage{order: *o}
	err = s.run()
	fmt.Fprintf(os.Stderr, "msb: confine: %s: %v\n", o.Profile.Name, err)
	_ = s.writeReport(report{Findings: s.findings, Error: err.Error()})
	return exitConfine
}

func readOrder(args []string) (*order, error) {
	if len(args) != 1 {
		return nil, errors.New("want one argument, the descriptor of the orders; this command is for msb itself")
	}
	fd, err := strconv.Atoi(args[0])
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("%q is no descriptor", args[0])
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("orders: %w", err)
	}
	b := make([]byte, st.Size)
	if n, err := unix.Pread(fd, b, 0); err != nil || n != len(b) {
		return nil, fmt.Errorf("orders: read %d of %d bytes: %w", n, len(b), err)
	}
	o := new(order)
	if err := json.Unmarshal(b, o); err != nil {
		return nil, fmt.Errorf("orders: %w", err)
	}
	return o, o.Profile.Validate()
}

// stage is one run of stage 1.
type stage struct {
	order
	findings []Finding
	proc     int // descriptor of /proc/self/fd, -1 if not asked for
}

// run confines the thread and executes the program. The order matters: mounts
// and ids need capabilities, Landlock and seccomp need no_new_privs, the id
// switch clears the parent-death signal, and the filter comes last because it
// forbids the rest.
func (s *stage) run() error {
	unix.Umask(0o022) // of the private root's directories; a caller's 077 would hide them
	for _, step := range []struct {
		measure Measure
		apply   func() error
	}{
		{ParentDeath, s.watchParent},
		{PrivateRoot, s.isolate},
		{PrivateRoot, s.openProc},
		{PrivateRoot, s.privateRoot},
		{Rlimits, func() error { return s.limit(false) }},
		{OwnUser, s.switchUser},
		{Capabilities, s.reduce},
		{OwnUser, s.readable},
		{NoNewPrivs, s.noNewPrivs},
		{Landlock, s.landlock},
		{Descriptors, s.closeRest},
		{ParentDeath, s.watchParent},
	} {
		if err := step.apply(); err != nil {
			return fmt.Errorf("%s: %w", step.measure, err)
		}
	}
	if err := s.writeReport(report{Findings: s.findings}); err != nil {
		return err
	}
	if err := s.limit(true); err != nil {
		return fmt.Errorf("%s: %w", Rlimits, err)
	}
	return s.execute()
}

// watchParent asks for SIGKILL when the thread that started us ends, and then
// makes sure that it had not ended before.
func (s *stage) watchParent() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	if s.ParentPidfd >= 0 {
		fds := []unix.PollFd{{Fd: int32(s.ParentPidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		for err == unix.EINTR {
			n, err = unix.Poll(fds, 0)
		}
		if err != nil || n != 0 {
			return fmt.Errorf("process %d, which started this one, is gone", s.Parent)
		}
		return nil
	}
	// 0: the parent is outside our PID namespace, dead or not.
	if ppid := unix.Getppid(); ppid != s.Parent && ppid != 0 {
		return fmt.Errorf("process %d, which started this one, is gone", s.Parent)
	}
	return nil
}

func (s *stage) isolate() error {
	if s.PrivateRoot {
		return isolate()
	}
	return nil
}

// openProc opens what cannot be reached from inside the private root.
func (s *stage) openProc() (err error) {
	s.proc = -1
	switch {
	case !s.Profile.ProcSelfFd:
	case s.PrivateRoot:
		s.proc, err = s.Mounter.procSelfFd()
	default:
		s.proc, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	return err
}

// privateRoot builds the root or, where the host's stays, looks at least
// whether the binds are what they should be.
func (s *stage) privateRoot() error {
	if s.PrivateRoot {
		return privateRoot(&s.Profile, s.Mounter, s.MakeNodes)
	}
	for _, b := range s.Profile.Binds {
		fd, err := unix.Open(b.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if b.Optional && err == unix.ENOENT {
			continue
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", b.Source, err)
		}
		err = b.check(fd)
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return unix.Chdir("/")
}

// limit lowers the limits: on memory at the very end, since they are the
// program's and less than what this process has reserved, on all else before.
func (s *stage) limit(memory bool) error {
	for _, l := range s.Profile.Rlimits {
		if memory != (l.Resource == unix.RLIMIT_AS || l.Resource == unix.RLIMIT_DATA) {
			continue
		}
		if memory {
			debug.SetGCPercent(-1) // a collection would want memory of its own
		}
		var r unix.Rlimit
		if err := unix.Getrlimit(l.Resource, &r); err != nil {
			return fmt.Errorf("limit %d: %w", l.Resource, err)
		}
		if l.ToHard {
			r.Cur = r.Max
		} else {
			r.Max = min(r.Max, l.Max)
			r.Cur = r.Max
		}
		if err := unix.Setrlimit(l.Resource, &r); err != nil {
			return fmt.Errorf("limit %d: %w", l.Resource, err)
		}
	}
	return nil
}

// switchUser changes all ids of this thread; the wrappers of package syscall
// would change those of every thread, of which there will be no other.
func (s *stage) switchUser() error {
	u := s.Profile.User
	if u == nil {
		return nil
	}
	groups := append([]uint32{}, u.Groups...)
	var list unsafe.Pointer
	if len(groups) > 0 {
		list = unsafe.Pointer(&groups[0])
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(list), 0); e != 0 {
		return fmt.Errorf("setgroups: %w", e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(u.GID), uintptr(u.GID), uintptr(u.GID)); e != 0 {
		return fmt.Errorf("gid %d: %w", u.GID, e)
	}
	// Keep the permitted set over the switch from uid 0, for the steps after
	// this one; it is reduced to the profile's before the program runs.
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(u.UID), uintptr(u.UID), uintptr(u.UID)); e != 0 {
		return fmt.Errorf("uid %d: %w", u.UID, e)
	}
	return restoreEffective()
}

func (s *stage) reduce() error {
	bounded, err := reduceCapabilities(s.Profile.Keep)
	if err != nil {
		return err
	}
	if !bounded {
		return s.weaker(Finding{Measure: Capabilities, Status: Weaker,
			Detail: "the bounding set stays as it was, for want of CAP_SETPCAP; no_new_privs makes it useless"})
	}
	return nil
}

// readable makes sure that the program's own user can read the files bound for
// it, whose owner is somebody else: better said here than by the program.
func (s *stage) readable() error {
	if s.Profile.User == nil {
		return nil
	}
	for _, b := range s.Profile.Binds {
		path := b.Source
		if s.PrivateRoot {
			path = b.target()
		}
		err := unix.Faccessat(unix.AT_FDCWD, path, unix.R_OK, unix.AT_EACCESS)
		if err != nil && !(b.Optional && err == unix.ENOENT) {
			return fmt.Errorf("uid %d cannot read %s: %w; make it readable by all", s.Profile.User.UID, path, err)
		}
	}
	return nil
}

func (s *stage) noNewPrivs() error {
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

func (s *stage) landlock() error {
	if s.LandlockABI < landlockMinABI {
		return nil // a finding of Prepare
	}
	return restrictPaths(s.LandlockABI, s.Profile.grants(s.PrivateRoot))
}

// closeRest leaves the program its files and standard streams; everything
// else stays open until execve, which closes it.
func (s *stage) closeRest() error {
	end := 3 + s.Files
	if s.proc >= 0 {
		if err := unix.Dup3(s.proc, end, unix.O_CLOEXEC); err != nil { // Prepare left the number free
			return err
		}
		end++
	}
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		if err := closeOnExecEach(); err != nil {
			return err
		}
	}
	for fd := 3; fd < end; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// closeOnExecEach is close_range for kernels before 5.11.
func closeOnExecEach() error {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	for fd := uintptr(3); fd < uintptr(min(r.Cur, 1<<20)); fd++ {
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, unix.FD_CLOEXEC); err != nil && err != unix.EBADF {
			return err
		}
	}
	return nil
}

// execute installs the filter and becomes the program.
func (s *stage) execute() error {
	if f := filterFor(s.Profile.Filter); f != nil {
		if err := f.install(false); err != nil {
			return fmt.Errorf("%s: %w", Seccomp, err)
		}
	}
	path := s.Profile.programPath(s.PrivateRoot)
	return fmt.Errorf("execute %s: %w", path, syscall.Exec(path, s.Argv, s.Profile.Env))
}

// weaker records f, or refuses if the measure is required.
func (s *stage) weaker(f Finding) error {
	if s.Profile.requires(f.Measure) {
		return errors.New(f.Detail)
	}
	s.findings = append(s.findings, f)
	return nil
}

func (s *stage) writeReport(r report) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := unix.Ftruncate(s.Report, 0); err != nil {
		return err
	}
	_, err = unix.Pwrite(s.Report, b, 0)
	return err
}
