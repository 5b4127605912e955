package fileserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/confine/confinetest"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
)

// TestMain makes the test binary the msb that Start needs, and the starter of
// TestStarterDies.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "confine-exec":
			os.Exit(confine.Main(os.Args[2:]))
		case "fileserver":
			os.Exit(Main(os.Args[2:]))
		case "starter":
			starter(os.Args[2])
		}
	}
	os.Exit(m.Run())
}

// served is a running file server and the front ends' ends of its sockets.
type served struct {
	*Process
	ends []*os.File
}

func testMSB(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// pair returns the two ends of a socket pair.
func pair(t testing.TB) (ours, its *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "front end"), os.NewFile(uintptr(fds[1]), "back end")
}

// start starts a server of the shares and ends it with the test.
func start(t testing.TB, o Options) (*served, error) {
	t.Helper()
	s := new(served)
	for range o.Shares {
		ours, its := pair(t)
		s.ends = append(s.ends, ours)
		o.Conns = append(o.Conns, its)
	}
	o.MSB, o.ID, o.Spawn = testMSB(t), "test", confinetest.KeptThread(t)
	if o.Log == nil {
		o.Log = os.Stderr
	}
	p, err := Start(t.Context(), o)
	for _, f := range o.Conns {
		_ = f.Close()
	}
	if err != nil {
		s.hangUp()
		return nil, err
	}
	s.Process = p
	t.Cleanup(func() {
		s.hangUp()
		p.Kill()
		<-p.Done()
	})
	return s, nil
}

func mustStart(t testing.TB, o Options) *served {
	t.Helper()
	s, err := start(t, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *served) hangUp() {
	for _, f := range s.ends {
		_ = f.Close()
	}
}

// guest connects a native front end to share i and starts a FUSE session.
func (s *served) guest(t testing.TB, i int) *guest {
	t.Helper()
	conn, err := vhostuser.FileConn(s.ends[i])
	if err != nil {
		t.Fatal(err)
	}
	_ = s.ends[i].Close()
	c, err := frontend.Connect(conn, frontend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	g := &guest{t, c}
	in := fusewire.InitIn{Major: 7, Minor: 38}
	if _, errno := g.call(fusewire.OpInit, 0, fusewire.Append(nil, &in), 64); errno != 0 {
		t.Fatalf("INIT: %v", errno)
	}
	return g
}

// guest speaks FUSE.
type guest struct {
	t testing.TB
	c *frontend.Client
}

// call sends one request and returns the body of the reply.
func (g *guest) call(op fusewire.Opcode, node uint64, body []byte, room int) ([]byte, unix.Errno) {
	g.t.Helper()
	h := fusewire.InHeader{Len: uint32(fusewire.Size[fusewire.InHeader]() + len(body)), Opcode: op, Unique: 2, NodeID: node}
	reply, err := g.c.Do(1, [][]byte{append(fusewire.Append(nil, &h), body...)}, []int{fusewire.Size[fusewire.OutHeader]() + room})
	if err != nil {
		g.t.Fatalf("%v: %v", op, err)
	}
	var out fusewire.OutHeader
	rest, ok := fusewire.Decode(reply, &out)
	if !ok {
		g.t.Fatalf("%v: reply of %d bytes", op, len(reply))
	}
	return rest, unix.Errno(-out.Error)
}

func (g *guest) lookup(name string) (fusewire.EntryOut, unix.Errno) {
	g.t.Helper()
	b, errno := g.call(fusewire.OpLookup, fusewire.RootID, append([]byte(name), 0), fusewire.Size[fusewire.EntryOut]())
	var e fusewire.EntryOut
	fusewire.Decode(b, &e)
	return e, errno
}

func (g *guest) mkdir(name string) unix.Errno {
	g.t.Helper()
	in := fusewire.MkdirIn{Mode: 0o755}
	_, errno := g.call(fusewire.OpMkdir, fusewire.RootID, append(fusewire.Append(nil, &in), name+"\x00"...), fusewire.Size[fusewire.EntryOut]())
	return errno
}

// share makes a directory with one file and its Share.
func share(t testing.TB, tag string) Share {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "seed"), []byte("seed"), 0o644); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		t.Fatal(err)
	}
	return Share{Tag: tag, Path: dir, Dev: uint64(st.Dev), Ino: st.Ino}
}

// TestServe starts a server as a supervisor does, and looks at it from both
// sides: as its guest, and as the host's kernel shows it.
func TestServe(t *testing.T) {
	confinetest.Need(t, confine.Inspect().PrivateRoot(), "mount namespaces")
	plain, readonly, off := share(t, "plain"), share(t, "readonly"), share(t, "off")
	readonly.Readonly = true
	off.StatVirt = "off"
	lock := lockFile(t)
	s := mustStart(t, Options{Shares: []Share{plain, readonly, off}, Inherit: []*os.File{lock}})
	for _, f := range s.Findings() {
		if os.Geteuid() == 0 {
			t.Errorf("as root everything can be applied: %s", f)
		}
	}
	for i, want := range []unix.Errno{0, unix.EROFS, 0} {
		g := s.guest(t, i)
		if e, errno := g.lookup("seed"); errno != 0 || e.Attr.Size != 4 {
			t.Errorf("share %d: lookup: %v, size %d", i, errno, e.Attr.Size)
		}
		if errno := g.mkdir("new"); errno != want {
			t.Errorf("share %d: mkdir: %v, want %v", i, errno, want)
		}
	}
	if _, err := os.Stat(filepath.Join(plain.Path, "new")); err != nil {
		t.Error(err)
	}
	look(t, s.PID(), true, lock.Name())
	checkMounts(t, s.PID(), []Share{plain, readonly, off})
	t.Logf("resident: %s", confinetest.Status(t, fmt.Sprintf("/proc/%d/status", s.PID()))["VmRSS"])
}

// look compares the process with what it may have. owners: some share has
// stat virtualization off.
func look(t *testing.T, pid int, owners bool, locks ...string) {
	t.Helper()
	var keep []string
	if confine.Inspect().Privileged {
		keep = []string{"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER"}
		if owners {
			keep = append(keep, "CAP_CHOWN", "CAP_FSETID", "CAP_SETUID", "CAP_SETGID")
		}
	}
	confinetest.Threads(t, pid, keep)
	confinetest.Namespaces(t, pid)
	confinetest.Root(t, pid, "msb", "share")
	if uid := confinetest.UID(t, pid); uid != os.Geteuid() {
		t.Errorf("uid %d, want ours, %d", uid, os.Geteuid())
	}
	// "/" is /proc/self/fd on its own mount, the standard streams are the test's.
	for fd, to := range confinetest.Files(t, pid, append(locks, "socket:", "/")...) {
		if fd > 2 && strings.HasPrefix(to, "/") && to != "/" && !strings.HasPrefix(to, "/share/") && !slices.Contains(locks, to) {
			t.Errorf("descriptor %d is open: %s", fd, to)
		}
	}
}

// checkMounts wants every mount of the process to be restricted.
func checkMounts(t *testing.T, pid int, shares []Share) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		t.Fatal(err)
	}
	options := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		options[f[4]] = strings.Split(f[5], ",")
	}
	for i, s := range shares {
		want := []string{"nosuid", "nodev", "noexec"}
		if s.Readonly {
			want = append(want, "ro")
		}
		for _, o := range want {
			if !slices.Contains(options[shareRoot(i)], o) {
				t.Errorf("%s is mounted %v, without %s", shareRoot(i), options[shareRoot(i)], o)
			}
		}
	}
	if !slices.Contains(options["/"], "ro") {
		t.Errorf("root is mounted %v", options["/"])
	}
	for point := range options {
		if strings.HasPrefix(point, "/proc") || strings.HasPrefix(point, "/sys") || strings.HasPrefix(point, "/dev") {
			t.Errorf("%s is mounted", point)
		}
	}
}

// lockFile is a locked file, as an attachment has one.
func lockFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "attach"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return f
}

// free tells whether nobody holds the lock of a file.
func free(t testing.TB, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// TestEnds: the server ends by itself, properly, when its front ends are gone,
// and holds the attach locks until then.
func TestEnds(t *testing.T) {
	lock := lockFile(t)
	s := mustStart(t, Options{Shares: []Share{share(t, "a"), share(t, "b")}, Inherit: []*os.File{lock}})
	_ = lock.Close()
	first, second := s.guest(t, 0), s.guest(t, 1)
	_ = first.c.Close()
	if _, errno := second.lookup("seed"); errno != 0 {
		t.Errorf("after the other share ended: %v", errno)
	}
	if free(t, lock.Name()) {
		t.Error("the server does not hold the attach lock")
	}
	_ = second.c.Close()
	<-s.Done()
	if err := s.Err(); err != nil {
		t.Errorf("Err = %v", err)
	}
	if !free(t, lock.Name()) {
		t.Error("the attach lock is held after the end")
	}
}

// TestKill: a killed server leaves no lock.
func TestKill(t *testing.T) {
	lock := lockFile(t)
	s := mustStart(t, Options{Shares: []Share{share(t, "a")}, Inherit: []*os.File{lock}})
	_ = lock.Close()
	s.Kill()
	s.Kill()
	<-s.Done()
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("Err = %v", err)
	}
	if !free(t, lock.Name()) {
		t.Error("the attach lock is held")
	}
}

// TestWithoutRoot forces what an ordinary user gets where user namespaces are
// not allowed; root is refused there.
func TestWithoutRoot(t *testing.T) {
	without := []confine.Measure{confine.Namespaces, confine.PIDNamespace, confine.PrivateRoot}
	s, err := start(t, Options{Shares: []Share{share(t, "a")}, Without: without})
	if os.Geteuid() == 0 {
		if !errdefs.Is(err, errdefs.UnsupportedOperation) {
			t.Errorf("as root: Start = %v, want a refusal", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	g := s.guest(t, 0)
	if _, errno := g.lookup("seed"); errno != 0 {
		t.Errorf("lookup: %v", errno)
	}
	if errno := g.mkdir("new"); errno != 0 {
		t.Errorf("mkdir: %v", errno)
	}
	var missing []confine.Measure
	for _, f := range s.Findings() {
		missing = append(missing, f.Measure)
	}
	for _, m := range without {
		if !slices.Contains(missing, m) {
			t.Errorf("no finding about %s: %v", m, s.Findings())
		}
	}
}

func TestStartErrors(t *testing.T) {
	good := share(t, "good")
	swapped := share(t, "swapped")
	swapped.Ino++
	file := good
	file.Path, file.Ino = filepath.Join(good.Path, "seed"), 0
	file.Dev = 0
	gone := good
	gone.Path += "/gone"
	procfs := errdefs.UnsupportedOperation
	if os.Geteuid() != 0 {
		procfs = errdefs.InvalidConfig // not even allowed to try
	}
	tests := map[string]struct {
		shares []Share
		kind   errdefs.Kind
		msg    string
	}{
		"no share":          {nil, errdefs.InvalidArgument, "0 shares"},
		"relative":          {[]Share{{Path: "x"}}, errdefs.InvalidArgument, "not absolute"},
		"unknown virt":      {[]Share{{Path: "/", StatVirt: "loose"}}, errdefs.InvalidConfig, `"loose"`},
		"too many queues":   {[]Share{{Path: "/", Queues: 99}}, errdefs.InvalidArgument, "99 queues"},
		"gone":              {[]Share{good, gone}, errdefs.IO, "gone: no such file"},
		"swapped":           {[]Share{swapped}, errdefs.IO, "is not what it was"},
		"a file":            {[]Share{file}, errdefs.IO, "not a directory"},
		"strict on procfs":  {[]Share{{Path: "/proc"}}, procfs, "share /proc"},
		"relaxed on procfs": {[]Share{{Path: "/proc", StatVirt: "relaxed"}}, errdefs.Unknown, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := start(t, Options{Shares: tt.shares, Log: devNull(t)})
			if tt.msg == "" {
				if err != nil {
					t.Errorf("Start = %v", err)
				}
				return
			}
			if !errdefs.Is(err, tt.kind) || !strings.Contains(err.Error(), tt.msg) {
				t.Errorf("Start = %v (kind %d), want kind %d with %q", err, errdefs.KindOf(err), tt.kind, tt.msg)
			}
		})
	}
}

func devNull(t testing.TB) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// TestHint: what the child found out reaches the caller whole.
func TestHint(t *testing.T) {
	_, err := start(t, Options{Shares: []Share{{Path: "/proc"}}, Log: devNull(t)})
	var e *errdefs.Error
	if !errors.As(err, &e) || !strings.Contains(e.Hint, "stat-virt=relaxed") {
		t.Errorf("Start = %#v, want a hint", err)
	}
}

// TestCancelled: a start that is given up leaves no process.
func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	ours, its := pair(t)
	defer ours.Close()
	defer its.Close()
	var child *exec.Cmd
	_, err := Start(ctx, Options{MSB: testMSB(t), ID: "test", Shares: []Share{share(t, "a")}, Conns: []*os.File{its},
		Spawn: func(cmd *exec.Cmd) error {
			child = cmd
			err := cmd.Start()
			if err == nil {
				err = cmd.Process.Signal(unix.SIGSTOP) // it will never be ready
			}
			cancel()
			return err
		}})
	if !errdefs.Is(err, errdefs.Cancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("Start = %v", err)
	}
	if child == nil || child.ProcessState == nil {
		t.Error("the child was not reaped")
	}
}

// TestListeningSocket: the server takes the first connection of a listening
// socket, as msb virtiofs gives it.
func TestListeningSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := Start(t.Context(), Options{MSB: testMSB(t), ID: "test", Spawn: confinetest.KeptThread(t), Config: true,
		Shares: []Share{share(t, "a")}, Conns: []*os.File{f}, Log: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := frontend.Connect(conn, frontend.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	<-p.Done()
	if err := p.Err(); err != nil {
		t.Error(err)
	}
}

// starter is a process that starts a server and tells its pid.
func starter(dir string) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	exe, _ := os.Executable()
	p, err := Start(context.Background(), Options{MSB: exe, ID: "test", Log: os.Stderr,
		Shares: []Share{{Path: dir}}, Conns: []*os.File{os.NewFile(uintptr(fds[1]), "conn")}})
	if err != nil {
		panic(err)
	}
	fmt.Println(p.PID())
	<-p.Done()
}

// TestStarterDies: SIGKILL of the starter ends the server at once.
func TestStarterDies(t *testing.T) {
	cmd := exec.Command(testMSB(t), "starter", share(t, "a").Path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	b := make([]byte, 32)
	n, err := out.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for end := time.Now().Add(2 * time.Second); fds[0].Revents == 0; {
		_, err := unix.Poll(fds, int(time.Until(end).Milliseconds()))
		if time.Now().After(end) || err != nil && err != unix.EINTR {
			_ = unix.Kill(pid, unix.SIGKILL)
			t.Fatalf("2 s after its starter the server lives; %v", err)
		}
	}
}

// TestAsOrdinaryUser runs the tests of this package again as uid 65534.
func TestAsOrdinaryUser(t *testing.T) {
	confinetest.AsOrdinaryUser(t, "Serve|Ends|Kill|WithoutRoot|StartErrors|Hint|StarterDies|Listening")
}
