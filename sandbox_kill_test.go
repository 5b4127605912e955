package microsandbox_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// freeWithin is the promise of the kill matrix: so long after a death every lock
// is free and no process is left.
const freeWithin = 2 * time.Second

// runMSB runs the built msb to its end.
func runMSB(t testing.TB, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, vmtest.MSB(t), args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("msb %q: %v, stderr %q", args, err, errOut.String())
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// mustMSB runs msb and wants it to succeed.
func mustMSB(t testing.TB, args ...string) string {
	t.Helper()
	out, errOut, code := runMSB(t, nil, args...)
	if code != 0 {
		t.Fatalf("msb %q: exit code %d, stderr %q", args, code, errOut)
	}
	return out
}

// background is an msb command that runs while the test goes on.
type background struct {
	cmd    *exec.Cmd
	lines  chan string // of its standard output; closed at its end
	stderr bytes.Buffer
	done   chan struct{}
}

func startMSB(t testing.TB, env []string, args ...string) *background {
	t.Helper()
	return startProgram(t, env, vmtest.MSB(t), args...)
}

func startProgram(t testing.TB, env []string, program string, args ...string) *background {
	t.Helper()
	b := &background{cmd: exec.Command(program, args...), lines: make(chan string, 1000), done: make(chan struct{})}
	b.cmd.Env = append(os.Environ(), env...)
	b.cmd.Stderr = &b.stderr
	out, err := b.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			b.lines <- lines.Text()
		}
		_, _ = io.Copy(io.Discard, out)
		_ = b.cmd.Wait()
		close(b.lines)
		close(b.done)
	}()
	t.Cleanup(func() {
		_ = b.cmd.Process.Kill()
		<-b.done
	})
	return b
}

// expect waits for a line.
func (b *background) expect(t testing.TB, want string) {
	t.Helper()
	limit := time.After(60 * time.Second)
	for {
		select {
		case line, ok := <-b.lines:
			if !ok {
				t.Fatalf("%q ended before it printed %q: %s", b.cmd.Args, want, b.stderr.String())
			}
			if line == want {
				return
			}
		case <-limit:
			t.Fatalf("%q does not print %q", b.cmd.Args, want)
		}
	}
}

// end waits for the command's end and returns its exit code.
func (b *background) end(t testing.TB) int {
	t.Helper()
	select {
	case <-b.done:
		return b.cmd.ProcessState.ExitCode()
	case <-time.After(30 * time.Second):
		t.Fatalf("%q does not end", b.cmd.Args)
		return 0
	}
}

// live asks a sandbox's supervisor for the processes.
func live(t testing.TB, h home.Dir, name string) *supervisor.Live {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	sb, err := microsandbox.GetSandbox(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	var c supervisor.Config
	if err := json.Unmarshal([]byte(sb.ConfigJSON()), &c); err != nil {
		t.Fatal(err)
	}
	l, err := supervisor.Query(ctx, h, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func kill(t testing.TB, pid int, sig syscall.Signal) {
	t.Helper()
	if pid <= 1 {
		t.Fatalf("no process to send %v to", sig)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatalf("send %v to %d: %v", sig, pid, err)
	}
}

// mustBeFree waits until the sandbox's lock is free, its volumes can be attached
// by somebody else and none of its processes is left, and returns how long that
// took.
func mustBeFree(t testing.TB, h home.Dir, name string, volumes ...string) time.Duration {
	t.Helper()
	began := time.Now()
	ctx := context.Background()
	vols := volstore.New(h)
	defer vols.Close()
	// Whether the file system in it is sound is not the question here.
	vols.SetChecker(func(context.Context, *volstore.Volume, *os.File) error { return nil })
	var left string
	free := func() bool {
		if held, err := supervisor.Locked(h, name); err != nil || held {
			left = fmt.Sprintf("sandbox lock held: %v %v", held, err)
			return false
		}
		for _, v := range volumes {
			a, err := vols.Attach(ctx, v, volstore.Exclusive, volstore.Holder{Sandbox: "tester", PID: os.Getpid()})
			if err != nil {
				left = fmt.Sprintf("volume %s: %v", v, err)
				return false
			}
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if ps := vmtest.Processes(string(h)); len(ps) > 0 {
			left = "processes: " + strings.Join(ps, "; ")
			return false
		}
		return true
	}
	for !free() {
		if time.Since(began) > freeWithin {
			t.Fatalf("not free within %s: %s", freeWithin, left)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(began)
}

// killCase is one row of the matrix: what dies, and what is said about it.
type killCase struct {
	env     string // fail point of the guest's agent
	kill    func(creator int, l *supervisor.Live) int
	status  microsandbox.SandboxStatus
	cause   string // regular expression, also in msb ls
	creator string // what the creator prints, "" if it is dead
}

var killMatrix = map[string]killCase{
	"creator": {
		kill:   func(creator int, _ *supervisor.Live) int { return creator },
		status: microsandbox.SandboxStatusStopped, cause: `^creator gone$`,
	},
	"supervisor": {
		kill:   func(_ int, l *supervisor.Live) int { return l.SupervisorPID },
		status: microsandbox.SandboxStatusCrashed, cause: `^supervisor gone$`,
		creator: `sandbox "k" crashed: supervisor gone`,
	},
	"vmm": {
		kill:   func(_ int, l *supervisor.Live) int { return l.VMMPID },
		status: microsandbox.SandboxStatusCrashed, cause: `^vmm gone: signal: killed$`,
		creator: `sandbox "k" crashed: vmm gone`,
	},
	"file server": {
		kill:   func(_ int, l *supervisor.Live) int { return l.FileServerPID },
		status: microsandbox.SandboxStatusCrashed, cause: `^file server gone: .*signal: killed$`,
		creator: `sandbox "k" crashed: file server gone`,
	},
	"agent exits": {
		env:    "agent.crash=exit",
		status: microsandbox.SandboxStatusCrashed, cause: `^guest agent gone: .*exitcode=0x00006300`,
		creator: `sandbox "k" crashed: guest agent gone`,
	},
	"agent crashes": {
		env:    "agent.crash=panic",
		status: microsandbox.SandboxStatusCrashed, cause: `^guest agent gone: .*exitcode=0x00000200`,
		creator: `sandbox "k" crashed: guest agent gone`,
	},
}

// TestKillMatrix kills every process that a sandbox consists of, each with its
// VMM running and with the VMM stopped by a signal. It is one sandbox that is
// started again after every death, which is part of the proof.
func TestKillMatrix(t *testing.T) {
	h := vmtest.Home(t)
	mustMSB(t, "volume", "create", "-q", "files")
	mustMSB(t, "volume", "create", "-q", "disk", "--kind", "disk", "--size", "64")
	// made by a creator that starts no program and goes: the sandbox outlives it
	mustMSB(t, "create", "-q", "--name", "k", "--memory", "256M", "-v", "files:/files", "--mount-named", "disk:/disk:create=existing", vmtest.Image)
	if got := mustMSB(t, "exec", "k", "--", "echo", "reached by name"); got != "reached by name\n" {
		t.Errorf("exec in a detached sandbox printed %q", got)
	}
	mustMSB(t, "stop", "-q", "k")
	mustBeFree(t, h, "k", "files", "disk")

	for name, row := range killMatrix {
		t.Run(name, func(t *testing.T) { row.run(t, h, false) })
		t.Run(name+", VMM stopped", func(t *testing.T) { row.run(t, h, true) })
	}
	t.Run("supervisor that does not answer", func(t *testing.T) { testSilentSupervisor(t, h) })
	t.Run("creator of a detached sandbox", func(t *testing.T) { testDetachedSurvives(t, h) })
	mustMSB(t, "rm", "-q", "k")
	mustMSB(t, "volume", "rm", "-q", "files", "disk")
}

// testSilentSupervisor: a supervisor that a signal has stopped takes no request;
// what is to end the sandbox ends it all the same.
func testSilentSupervisor(t *testing.T, h home.Dir) {
	for _, args := range [][]string{{"kill", "-q", "k"}, {"stop", "-q", "-t", "1", "k"}} {
		t.Run(args[0], func(t *testing.T) {
			mustMSB(t, "start", "-q", "k")
			l := live(t, h, "k")
			kill(t, l.SupervisorPID, syscall.SIGSTOP)
			t.Cleanup(func() { _ = syscall.Kill(l.SupervisorPID, syscall.SIGCONT) })
			vmtest.Eventually(t, 10*time.Second, "a stopped supervisor", func() bool {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", l.SupervisorPID))
				return err == nil && bytes.Contains(b, []byte(") T "))
			})
			mustMSB(t, args...)
			mustBeFree(t, h, "k", "files", "disk")
			killCase{status: microsandbox.SandboxStatusCrashed, cause: `^supervisor gone$`}.check(t)
		})
	}
}

// creatorEnv makes TestCreatorProcess the creator that is killed.
const creatorEnv = "MSB_TEST_CREATOR"

// TestCreatorProcess is no test: it is a program that starts a sandbox, lets go
// of it, and does not end by itself.
func TestCreatorProcess(t *testing.T) {
	name := os.Getenv(creatorEnv)
	if name == "" {
		t.Skip("it is started by TestKillMatrix")
	}
	ctx := context.Background()
	sb, err := microsandbox.StartSandbox(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if !sb.OwnsLifecycleOrFalse() {
		t.Fatal("an attached sandbox is not owned")
	}
	if err := sb.Detach(ctx); err != nil || sb.OwnsLifecycleOrFalse() {
		t.Fatal("detach: ", err)
	}
	fmt.Println("detached")
	select {}
}

// testDetachedSurvives: the death of the creator is nothing to a sandbox that
// was let go of; it is reached again by name.
func testDetachedSurvives(t *testing.T, h home.Dir) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := startProgram(t, []string{creatorEnv + "=k"}, exe, "-test.run", "^TestCreatorProcess$")
	b.expect(t, "detached")
	before := live(t, h, "k")
	kill(t, b.cmd.Process.Pid, syscall.SIGKILL)
	<-b.done
	ctx := context.Background()
	i, err := microsandbox.GetSandbox(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	sb, err := i.Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := sb.Exec(ctx, "echo", []string{"here"}); err != nil || out.Stdout() != "here\n" {
		t.Errorf("exec after the creator's death: %v %+v", err, out)
	}
	if after := live(t, h, "k"); after.VMMPID != before.VMMPID || after.Attached {
		t.Errorf("%+v, before %+v", after, before)
	}
	if err := sb.Stop(ctx); err != nil {
		t.Error(err)
	}
	mustBeFree(t, h, "k", "files", "disk")
}

func (c killCase) run(t *testing.T, h home.Dir, stopped bool) {
	t.Cleanup(func() {
		if t.Failed() { // for the other rows
			_, _, _ = runMSB(t, nil, "kill", "-q", "k")
		}
	})
	var env []string
	if c.env != "" {
		if stopped {
			c.runStoppedAgent(t, h)
			return
		}
		env = []string{"MSB_FAILPOINT=" + c.env}
	}
	b := startMSB(t, env, "run", "-q", "--name", "k", "--", "sh", "-c", "echo up; exec sleep 1000")
	if c.kill != nil {
		b.expect(t, "up")
		l := live(t, h, "k")
		if stopped {
			kill(t, l.VMMPID, syscall.SIGSTOP)
		}
		kill(t, c.kill(b.cmd.Process.Pid, l), syscall.SIGKILL)
	} else {
		b.end(t) // the first program made the agent fail: msb run says so when the sandbox is gone
	}
	took := mustBeFree(t, h, "k", "files", "disk")
	t.Logf("free after %s", took.Round(time.Millisecond))
	c.check(t)
	code := b.end(t)
	if errOut := b.stderr.String(); c.creator != "" && (code != 1 || !strings.Contains(errOut, "msb: error: "+c.creator)) {
		t.Errorf("creator: exit code %d, stderr %q, want %q", code, errOut, c.creator)
	}
}

// runStoppedAgent: an agent in a stopped VMM does not run, so the request that
// makes it fail waits in the link, and the two seconds begin when the VMM goes on.
func (c killCase) runStoppedAgent(t *testing.T, h home.Dir) {
	_, errOut, code := runMSB(t, []string{"MSB_FAILPOINT=" + c.env}, "start", "-q", "k")
	if code != 0 {
		t.Fatal(errOut)
	}
	l := live(t, h, "k")
	kill(t, l.VMMPID, syscall.SIGSTOP)
	b := startMSB(t, nil, "exec", "k", "--", "true")
	kill(t, l.VMMPID, syscall.SIGCONT)
	if code := b.end(t); code != 1 || !strings.Contains(b.stderr.String(), c.creator) {
		t.Errorf("msb exec: exit code %d, stderr %q, want %q", code, b.stderr.String(), c.creator)
	}
	mustBeFree(t, h, "k", "files", "disk")
	c.check(t)
}

// check wants the status and the cause, in the API and in the table.
func (c killCase) check(t *testing.T) {
	t.Helper()
	i, err := microsandbox.GetSandbox(context.Background(), "k")
	if err != nil {
		t.Fatal(err)
	}
	if i.Status() != c.status || !regexp.MustCompile(c.cause).MatchString(i.Cause()) {
		t.Errorf("%s (%s), want %s (%s)", i.Status(), i.Cause(), c.status, c.cause)
	}
	if out, want := mustMSB(t, "ls"), fmt.Sprintf("%s (%s)", i.Status(), i.Cause()); !strings.Contains(out, want) {
		t.Errorf("msb ls printed %q, want %q in it", out, want)
	}
}
