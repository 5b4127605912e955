package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/fileserver"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/mount"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// Sockets in a sandbox's run directory.
const (
	AgentSocket   = "agent.sock"
	ControlSocket = "control.sock"
)

// Serials of the disks that make the guest's root.
const (
	serialRoot  = "msb-root"
	serialUpper = "msb-upper"
)

// UpperFile is the sandbox's own writable layer in its directory.
const UpperFile = "upper.ext4"

// Times of the stop sequence.
const (
	defaultBootTimeout = 60 * time.Second
	kvmBootTimeout     = 20 * time.Second
	lifelineGrace      = time.Second     // a creator that died leaves at most 2 s until every lock is free
	fileServerGrace    = time.Second     // to end by itself once the VMM has gone
	goodbyeGrace       = 2 * time.Second // from the agent's goodbye to the VMM's exit: file systems are unmounted by then
)

var (
	pointLocked  = failpoint.New("supervisor.locked")
	pointMounted = failpoint.New("supervisor.opened-mounts")
	pointServed  = failpoint.New("supervisor.started-file-server")
	pointStarted = failpoint.New("supervisor.started-vmm")
	pointReady   = failpoint.New("supervisor.ready")
)

// supervisor runs one sandbox from start to end.
type supervisor struct {
	h     home.Dir
	cfg   Config
	msb   string // path of this program
	agent []byte // the guest agent built into it
	lock  *os.File

	spawn    spawner
	log      *outputLog
	plan     *mount.Plan
	kernel   func() (vmm.Kernel, error) // waits for the search
	served   func() error               // waits for the file server
	files    *fileserver.Process        // nil without virtiofs mounts, and before served
	vmShares []vmm.Share
	machine  vmm.Machine
	link     *os.File
	relay    *relay
	heard    bool // the guest's agent has spoken
	runDir   string
	undo     []func() // in reverse order at the end
	began    time.Time
	bootNS   int64

	stop chan stopRequest

	mu       sync.Mutex
	attached bool   // guarded by mu
	state    string // guarded by mu
	stopping bool   // guarded by mu: a stop was asked for
}

// stopRequest asks for the end of the sandbox; the first one counts.
type stopRequest struct {
	why   string
	grace time.Duration // 0: kill
}

func (s *supervisor) logPath(name string) string {
	return filepath.Join(s.h.Sandbox(s.cfg.Name), "logs", name)
}

func (s *supervisor) bootTimeout() time.Duration {
	switch {
	case s.cfg.BootTimeout > 0:
		return s.cfg.BootTimeout
	case s.machine != nil && s.machine.Accel() == vmm.AccelKVM:
		return kvmBootTimeout
	}
	return defaultBootTimeout
}

// startAny starts the sandbox. When KVM passed the probe and the guest's agent
// was still never heard of, TCG is tried once; if that boots the same guest, KVM
// is remembered as broken for this boot of the host. After an error nothing is
// left running.
func (s *supervisor) startAny(ctx context.Context, report func(step string)) error {
	err := s.start(ctx, report)
	if err == nil {
		return nil
	}
	suspect := s.machine != nil && s.machine.Accel() == vmm.AccelKVM && s.cfg.Accel != string(vmm.AccelKVM) && !s.heard && ctx.Err() == nil
	s.tearDown()
	if !suspect {
		return err
	}
	s.log.system("KVM could not boot the guest, trying TCG: " + err.Error())
	s.vmShares, s.files, s.machine, s.relay = nil, nil, nil, nil
	s.cfg.Accel = string(vmm.AccelTCG)
	report("retry with TCG")
	if err := s.start(ctx, report); err != nil {
		s.tearDown()
		return err
	}
	qemu.RememberBroken(s.h.Kernels(), "a guest did not boot: "+firstLine(err.Error()))
	return nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// start brings the sandbox up in named steps; whatever fails, the caller runs
// tearDown. report is called with the name of each step.
func (s *supervisor) start(ctx context.Context, report func(step string)) error {
	steps := []struct {
		name string
		do   func(context.Context) error
		hit  failpoint.Point
	}{
		{"mounts", s.openMounts, pointMounted},
		{"fileserver", s.startFileServer, pointServed},
		{"boot", s.startMachine, pointStarted},
		{"agent", s.bootGuest, failpoint.Point{}},
		{"listen", s.listen, pointReady},
	}
	if err := pointLocked.Hit(); err != nil {
		return err
	}
	s.kernel = begin(func() (vmm.Kernel, error) { return kernel.Find(s.h, s.agent) })
	s.undo = append(s.undo, func() { _, _ = s.kernel() })
	for _, step := range steps {
		report(step.name)
		if err := step.do(ctx); err != nil {
			return err
		}
		if err := step.hit.Hit(); err != nil {
			return err
		}
	}
	s.bootNS = time.Since(s.began).Nanoseconds()
	return nil
}

func (s *supervisor) openMounts(ctx context.Context) error {
	vols := volstore.New(s.h)
	vols.SetChecker(func(ctx context.Context, v *volstore.Volume, image *os.File) error {
		s.log.system("checking disk volume " + v.Name + ": its last sandbox did not end cleanly")
		if err := wholeImage(v, image); err != nil {
			return err
		}
		return diskimg.CheckExt4(ctx, s.msb, image, v.DiskPath, diskimg.Limits{})
	})
	s.undo = append(s.undo, func() { vols.Close() })
	plan, err := mount.Open(ctx, vols, s.cfg.Mounts, mount.OpenOptions{
		Sandbox: s.cfg.Name, PID: os.Getpid(), GuestUID: s.cfg.GuestUID, GuestGID: s.cfg.GuestGID,
	})
	if err != nil {
		return err
	}
	s.plan = plan
	s.undo = append(s.undo, func() { plan.Close() })
	return nil
}

// wholeImage refuses an image that something has made shorter than its volume.
func wholeImage(v *volstore.Volume, image *os.File) error {
	fi, err := image.Stat()
	if err != nil || fi.Size() >= v.CapacityBytes {
		return err
	}
	return errdefs.New(errdefs.Filesystem, "disk volume %q is damaged: its image has %d of %d bytes", v.Name, fi.Size(), v.CapacityBytes).
		WithHint("put a copy of the image back at %s, or msb volume rm %s", v.DiskPath, v.Name)
}

// begin runs f beside its caller. The function it returns waits for the result.
func begin[T any](f func() (T, error)) func() (T, error) {
	var v T
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		v, err = f()
	}()
	return func() (T, error) {
		<-done
		return v, err
	}
}

// startFileServer starts the file server and does not wait for it: QEMU starts
// meanwhile and waits for its answers. served waits, and says why it did not
// start.
func (s *supervisor) startFileServer(ctx context.Context) error {
	s.served = func() error { return nil }
	if len(s.plan.Shares) == 0 {
		return nil
	}
	log, err := s.openLog(SupervisorLog)
	if err != nil {
		return err
	}
	conns := make([]*os.File, 0, len(s.plan.Shares))
	for _, share := range s.plan.Shares {
		front, back, err := socketPair(share.Tag)
		if err != nil {
			closeAll(append(conns, log))
			return err
		}
		conns = append(conns, back)
		s.vmShares = append(s.vmShares, vmm.Share{Tag: share.Tag, Conn: front})
	}
	started := begin(func() (*fileserver.Process, error) {
		defer closeAll(append(conns, log))
		defer s.plan.CloseLedgers()
		return fileserver.Start(ctx, fileserver.Options{
			MSB: s.msb, ID: s.cfg.ID, Shares: s.plan.Shares, Conns: conns,
			Inherit: s.plan.ShareLocks, Ledgers: s.plan.Ledgers, Log: log, Spawn: s.spawn.start,
		})
	})
	s.served = sync.OnceValue(func() error {
		p, err := started()
		if err != nil {
			return err
		}
		s.files = p
		s.logFindings("file server", p.Findings())
		return nil
	})
	s.undo = append(s.undo, func() {
		if s.served() == nil {
			s.files.Kill()
			<-s.files.Done()
		}
	})
	return nil
}

func (s *supervisor) startMachine(ctx context.Context) error {
	jail, err := confine.NewVMM(s.msb)
	if err != nil {
		return err
	}
	s.undo = append(s.undo, jail.Close) // the uid it may have taken is QEMU's until its end
	k, err := s.kernel()
	if err != nil {
		return err
	}
	cfg, opened, err := s.machineConfig(k)
	defer closeAll(opened)
	if err != nil {
		return err
	}
	m, err := qemu.New(cfg, qemu.Options{Launch: jail.Launch, Spawn: s.spawn.start, Runtime: s.h.Kernels()})
	if err != nil {
		return err
	}
	s.machine = m // tearDown ends it
	startErr := m.Start(ctx)
	if err := s.served(); err != nil {
		return err // QEMU had nobody to talk to
	}
	if m.PID() == 0 {
		return startErr
	}
	findings, err := jail.Outcome()
	s.logFindings("QEMU", findings)
	if startErr != nil && err != nil && ctx.Err() == nil {
		return err // it never became QEMU
	}
	return startErr
}

// logFindings tells which measures of confinement could not be applied.
func (s *supervisor) logFindings(who string, findings []confine.Finding) {
	for _, f := range findings {
		s.log.system(who + " is confined less than it could be: " + f.String())
	}
}

// bootGuest waits for the agent. The link is closed when the deadline passes or
// the machine or file server ends, which ends the exchange.
func (s *supervisor) bootGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.bootTimeout())
	defer cancel()
	answered := make(chan struct{})
	watcher := make(chan struct{})
	go func() {
		defer close(watcher)
		select {
		case <-answered:
			return
		case <-ctx.Done():
		case <-s.machine.Done():
		case <-s.filesDone():
		}
		s.link.Close()
	}()
	in := agentproto.NewLinkReader(s.link, agentproto.MaxLinkFrame)
	ready, heard, err := handshake(s.link, in, bootMessage(&s.cfg, s.plan.Guest))
	s.heard = heard
	close(answered)
	<-watcher
	if err != nil {
		return s.bootError(ctx, err)
	}
	s.machine.AgentReady()
	s.relay = newRelay(s.link, s.log)
	s.relay.ready = ready
	go s.relay.run(in)
	return nil
}

func (s *supervisor) listen(context.Context) error {
	dir, err := s.h.EnsureRun(s.cfg.ID)
	if err != nil {
		return err
	}
	s.runDir = dir
	s.undo = append(s.undo, func() { os.RemoveAll(dir) })
	for name, serve := range map[string]func(net.Listener){AgentSocket: s.relay.serve, ControlSocket: s.serveControl} {
		path := filepath.Join(dir, name)
		os.Remove(path)
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		s.undo = append(s.undo, func() { l.Close() })
		go serve(l)
	}
	return nil
}

// filesDone is closed when the file server has ended; without one it never is.
func (s *supervisor) filesDone() <-chan struct{} {
	if s.files == nil {
		return nil
	}
	return s.files.Done()
}

// stopGuest asks the guest to power off and waits for it within the grace; a
// guest that does not is ended by the caller.
func (s *supervisor) stopGuest(r stopRequest) {
	s.mu.Lock()
	s.state, s.stopping = StatusDraining, true
	s.mu.Unlock()
	s.log.system("stopping: " + r.why)
	s.machine.Stopping()
	if r.grace <= 0 {
		return
	}
	if err := s.relay.stopGuest(r.grace); err != nil && !errors.Is(err, net.ErrClosed) {
		return
	}
	select {
	case <-s.machine.Done():
	case <-time.After(r.grace):
		s.log.system(fmt.Sprintf("guest did not stop within %s: killed", r.grace))
	}
}

// tearDown ends what is left, in reverse order of its making. It is safe after
// any failed step.
func (s *supervisor) tearDown() {
	if s.machine != nil {
		s.machine.Kill()
		<-s.machine.Done()
		s.markClean()
	}
	if s.files != nil {
		select {
		case <-s.files.Done():
		case <-time.After(fileServerGrace):
		}
	}
	for i := len(s.undo) - 1; i >= 0; i-- {
		s.undo[i]()
	}
	s.undo = nil
	if s.relay != nil {
		s.relay.close(nil)
		s.relay.wait()
	}
}

// markClean spares disk volumes the check if the guest unmounted them and
// powered off.
func (s *supervisor) markClean() {
	if s.relay == nil || s.machineEnd() != "" {
		return
	}
	if err := s.plan.MarkClean(); err != nil {
		s.log.system("disk volumes will be checked when they are attached again: " + err.Error())
	}
}

func (s *supervisor) setState(state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

func suffix(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
