package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// guest is a real virtual machine with the bare agent: no image, no disks.
type guest struct {
	t       *testing.T
	m       vmm.Machine
	w       *agentproto.Writer
	r       *agentproto.LinkReader
	console string
	next    uint32
	frames  map[uint32][]agentproto.Frame // read while waiting for others
}

// need demands a part, which err says is missing.
func need(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		prereq.Missing(t, "%s: %v", what, err)
	}
}

// seedHome is the home that has kernels: $MSB_HOME, else that of make seed.
func seedHome(t *testing.T) home.Dir {
	t.Helper()
	if h := os.Getenv(home.EnvVar); h != "" {
		return home.Dir(h)
	}
	abs, err := filepath.Abs("../../../build/home")
	if err != nil {
		t.Fatal(err)
	}
	return home.Dir(abs)
}

// agentBinary builds the agent once for all tests.
func agentBinary(t *testing.T) []byte {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "msb-agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "../../../cmd/msb-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	b, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// machine describes a machine with the bare agent and returns our end of its
// link and the path of its console.
func machine(t *testing.T, change func(*vmm.Config)) (m vmm.Machine, link *os.File, console string, handed []*os.File) {
	t.Helper()
	_, _, err := qemu.Find()
	need(t, "QEMU", err)
	k, err := kernel.Find(seedHome(t), agentBinary(t))
	need(t, "a guest kernel", err)
	dir := t.TempDir()
	log, err := os.OpenFile(filepath.Join(dir, "console"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "link"), os.NewFile(uintptr(fds[1]), "agent")
	cfg := vmm.Config{
		ID: "TEST", CPUs: 1, MemoryMiB: 256, Accel: vmm.AccelTCG, Kernel: k,
		Agent: theirs, Console: log, Stderr: log, BootTimeout: 2 * time.Minute,
	}
	if change != nil {
		change(&cfg)
	}
	if m, err = qemu.New(cfg, qemu.Options{Runtime: dir}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Kill()
		<-m.Done()
		ours.Close()
		if b, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("console:\n%s", b)
		}
	})
	return m, ours, log.Name(), []*os.File{theirs, log}
}

// start only tries to start a machine.
func start(t *testing.T, change func(*vmm.Config)) error {
	t.Helper()
	m, _, _, handed := machine(t, change)
	err := m.Start(context.Background())
	for _, f := range handed {
		f.Close()
	}
	return err
}

// boot starts a machine and waits for the agent's hello.
func boot(t *testing.T, change func(*vmm.Config)) *guest {
	t.Helper()
	m, link, console, handed := machine(t, change)
	began := time.Now()
	if err := m.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, f := range handed {
		f.Close()
	}
	g := &guest{
		t: t, m: m, w: agentproto.NewWriter(link, agentproto.MaxFrame), r: agentproto.NewLinkReader(link, agentproto.MaxLinkFrame),
		console: console, frames: map[uint32][]agentproto.Frame{},
	}
	var hello agentproto.Hello
	g.expect(0, agentproto.MsgHello, &hello)
	if len(hello.Modules) > 0 {
		t.Errorf("modules that do not load: %q", hello.Modules)
	}
	t.Logf("hello after %d ms", time.Since(began).Milliseconds())
	return g
}

// ready sends Boot and waits for MsgReady.
func (g *guest) ready(b agentproto.Boot) {
	g.t.Helper()
	began := time.Now()
	if b.TimeNS == 0 {
		b.TimeNS = time.Now().UnixNano()
	}
	g.send(0, 0, agentproto.MsgBoot, b)
	var r agentproto.Ready
	g.expect(0, agentproto.MsgReady, &r)
	g.m.AgentReady()
	g.t.Logf("ready %d ms after boot was sent", time.Since(began).Milliseconds())
}

func (g *guest) send(id uint32, flags uint8, typ string, payload any) {
	g.t.Helper()
	if err := g.w.WriteFrame(agentproto.Frame{ID: id, Flags: flags, Body: agentproto.MustEncode(typ, payload)}); err != nil {
		g.t.Fatal(err)
	}
}

// frame returns the next frame of an id and decodes its envelope.
func (g *guest) frame(id uint32) (agentproto.Frame, string, []byte) {
	g.t.Helper()
	var f agentproto.Frame
	if q := g.frames[id]; len(q) > 0 {
		f, g.frames[id] = q[0], q[1:]
	} else {
		for {
			var err error
			if f, err = g.r.ReadFrame(); err != nil {
				g.t.Fatalf("link: %v; machine: %s %+v", err, g.m.State(), g.m.Exit())
			}
			if f.ID == id {
				break
			}
			g.frames[f.ID] = append(g.frames[f.ID], f)
		}
	}
	typ, _, p, err := agentproto.Decode(f.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return f, typ, p
}

func (g *guest) expect(id uint32, want string, into any) {
	g.t.Helper()
	_, typ, p := g.frame(id)
	if typ != want {
		var e agentproto.BootFailed
		_ = agentproto.Unmarshal(p, &e)
		g.t.Fatalf("got %s (%+v), want %s", typ, e, want)
	}
	if err := agentproto.Unmarshal(p, into); err != nil {
		g.t.Fatal(err)
	}
}

// execResult is what a program did.
type execResult struct {
	out, err string
	code     int32
	failed   *agentproto.ExecFailed
}

// exec runs a program to its end, giving credit for all of its output.
func (g *guest) exec(x agentproto.Exec, stdin string) execResult {
	g.t.Helper()
	g.next++
	id := g.next
	has := stdin != ""
	x.Stdin = &has
	g.send(id, agentproto.FlagSessionStart, agentproto.MsgExec, x)
	if has {
		g.send(id, agentproto.FlagData, agentproto.MsgStdin, agentproto.Data{Data: []byte(stdin)})
		g.send(id, agentproto.FlagData, agentproto.MsgStdin, agentproto.Data{})
	}
	return g.collect(id)
}

func (g *guest) collect(id uint32) execResult {
	g.t.Helper()
	var r execResult
	var out, errOut bytes.Buffer
	for {
		f, typ, p := g.frame(id)
		if f.Flags&agentproto.FlagData != 0 {
			d, err := agentproto.DecodeData(p)
			if err != nil {
				g.t.Fatal(err)
			}
			if typ == agentproto.MsgStdout {
				out.Write(d)
			} else {
				errOut.Write(d)
			}
			g.send(id, 0, agentproto.MsgCredit, agentproto.Credit{N: uint32(len(f.Body))})
			continue
		}
		switch typ {
		case agentproto.MsgExited:
			var e agentproto.Exited
			g.must(agentproto.Unmarshal(p, &e))
			r.out, r.err, r.code = out.String(), errOut.String(), e.Code
			return r
		case agentproto.MsgExecFailed:
			r.failed = &agentproto.ExecFailed{}
			g.must(agentproto.Unmarshal(p, r.failed))
			return r
		}
	}
}

func (g *guest) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// fs performs a file operation; data is sent (Write) or returned (Read).
func (g *guest) fs(op agentproto.FSOp, data []byte) (agentproto.FSResponse, []byte) {
	g.t.Helper()
	g.next++
	id := g.next
	g.send(id, agentproto.FlagSessionStart, agentproto.MsgFSRequest, agentproto.FSRequest{Op: op})
	if op.Write != nil {
		credit := agentproto.Window
		for rest := data; ; {
			n := min(len(rest), 48<<10)
			body := agentproto.EncodeData(agentproto.MsgFSData, rest[:n])
			for credit < len(body) {
				f, typ, p := g.frame(id)
				if typ != agentproto.MsgCredit {
					g.t.Fatalf("%s %b while writing", typ, f.Flags)
				}
				var c agentproto.Credit
				g.must(agentproto.Unmarshal(p, &c))
				credit += int(c.N)
			}
			credit -= len(body)
			g.must(g.w.WriteFrame(agentproto.Frame{ID: id, Flags: agentproto.FlagData, Body: body}))
			if n == 0 {
				break
			}
			rest = rest[n:]
		}
	}
	var got []byte
	for {
		f, typ, p := g.frame(id)
		switch typ {
		case agentproto.MsgFSData:
			d, err := agentproto.DecodeData(p)
			g.must(err)
			got = append(got, d...)
			g.send(id, 0, agentproto.MsgCredit, agentproto.Credit{N: uint32(len(f.Body))})
		case agentproto.MsgFSResponse:
			var r agentproto.FSResponse
			g.must(agentproto.Unmarshal(p, &r))
			return r, got
		}
	}
}

// stop shuts the guest down and returns how it ended.
func (g *guest) stop() vmm.Exit {
	g.t.Helper()
	began := time.Now()
	g.m.Stopping()
	g.send(0, agentproto.FlagShutdown, agentproto.MsgShutdown, agentproto.Shutdown{})
	g.expect(0, agentproto.MsgGoodbye, &struct{}{})
	<-g.m.Done()
	g.t.Logf("stopped after %d ms", time.Since(began).Milliseconds())
	return g.m.Exit()
}

func TestBareGuest(t *testing.T) {
	began := time.Now()
	g := boot(t, nil)
	g.ready(agentproto.Boot{Hostname: "box", Env: []string{"FROM=boot"}})
	g.probeSelf(began)
	g.files()
	if e := g.stop(); e.Reason != "guest-shutdown" || g.m.State() != vmm.Stopped {
		t.Errorf("exit %+v in state %s", e, g.m.State())
	}
}

// probeSelf runs the only program a bare guest has: the agent itself, which
// says what it is and exits with 2.
func (g *guest) probeSelf(began time.Time) {
	t := g.t
	r := g.exec(agentproto.Exec{Cmd: "/init"}, "")
	t.Logf("first exec done %d ms after start", time.Since(began).Milliseconds())
	if r.failed != nil || r.code != 2 || !strings.Contains(r.err, "init process of a sandbox") {
		t.Fatalf("exec /init: %+v %+v", r, r.failed)
	}
	for cmd, kind := range map[string]string{
		"/nowhere": "not_found", "nowhere": "not_found", "/etc": "permission_denied", "/etc/hosts": "permission_denied", "": "not_found",
	} {
		if r := g.exec(agentproto.Exec{Cmd: cmd}, ""); r.failed == nil || r.failed.Kind != kind {
			t.Errorf("exec %q: %+v, want %s", cmd, r.failed, kind)
		}
	}
}

func (g *guest) files() {
	t := g.t
	data := bytes.Repeat([]byte("0123456789abcdef"), 100_000) // beyond several windows
	open := func(o agentproto.FSOpenOptions) uint64 {
		t.Helper()
		r, _ := g.fs(agentproto.FSOp{OpenFile: &agentproto.FSOpenFile{Path: "/tmp/f", Options: o}}, nil)
		if !r.OK {
			t.Fatalf("open: %s", *r.Error)
		}
		return *r.Data.Handle
	}
	h := open(agentproto.FSOpenOptions{Write: true, Create: true, Truncate: true})
	if r, _ := g.fs(agentproto.FSOp{Write: &agentproto.FSTransfer{Handle: h}}, data); !r.OK {
		t.Fatalf("write: %s", *r.Error)
	}
	g.fs(agentproto.FSOp{CloseHandle: &agentproto.FSHandle{Handle: h}}, nil)
	h = open(agentproto.FSOpenOptions{Read: true})
	r, got := g.fs(agentproto.FSOp{Read: &agentproto.FSTransfer{Handle: h}}, nil)
	if !r.OK || !bytes.Equal(got, data) {
		t.Errorf("read back %d of %d bytes: %+v", len(got), len(data), r)
	}
	r, _ = g.fs(agentproto.FSOp{Stat: &agentproto.FSStat{Path: "/tmp"}}, nil)
	if !r.OK || r.Data.Stat.Kind != agentproto.KindDir || r.Data.Stat.Mode != 0o1777 {
		t.Errorf("stat /tmp: %+v", r.Data)
	}
	r, _ = g.fs(agentproto.FSOp{List: &agentproto.FSPath{Path: "/tmp"}}, nil)
	if !r.OK || len(*r.Data.List) != 1 || (*r.Data.List)[0].Path != "/tmp/f" || (*r.Data.List)[0].Size != uint64(len(data)) {
		t.Errorf("list /tmp: %+v", r.Data)
	}
	if r, _ = g.fs(agentproto.FSOp{Stat: &agentproto.FSStat{Path: "/tmp/none"}}, nil); r.OK || r.Errno == nil || *r.Errno != int32(unix.ENOENT) {
		t.Errorf("stat of nothing: %+v", r)
	}
}

// TestPanicIsNotAStop: when PID 1 ends the kernel panics, and QEMU exits with
// status 0 all the same.
func TestPanicIsNotAStop(t *testing.T) {
	g := boot(t, func(c *vmm.Config) { c.Kernel.Cmdline = append(c.Kernel.Cmdline, "msb.failpoint=agent.crash=exit") })
	g.ready(agentproto.Boot{})
	g.send(1, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "/init"})
	<-g.m.Done()
	if e := g.m.Exit(); e.Reason != "guest-reset" || g.m.State() != vmm.Failed {
		t.Errorf("exit %+v in state %s", e, g.m.State())
	}
	if _, err := g.r.ReadFrame(); !errors.Is(err, io.EOF) {
		t.Errorf("link after the panic: %v", err)
	}
}
