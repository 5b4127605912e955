package microsandbox_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// failure is the cause of an error of kind ErrExecFailed, nil if it has none.
func failure(err error) *msb.ExecFailure {
	var f *msb.ExecFailure
	errors.As(err, &f)
	return f
}

// execBench is one sandbox with every setting that programs see.
type execBench struct {
	ctx context.Context
	sb  *msb.Sandbox
}

// TestSandboxExec runs programs in a guest.
func TestSandboxExec(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	b := &execBench{ctx, boot(ctx, t, "exec.box-1",
		msb.WithCPUs(2), msb.WithMemory(600),
		msb.WithEnv(map[string]string{"A": "sandbox", "B": "kept", "EMPTY": ""}),
		msb.WithWorkdir("/usr/share"), msb.WithUser("daemon"), msb.WithShell("/bin/bash"),
		msb.WithEntrypoint("/bin/echo", "entry"), msb.WithCmd("point", "two words"),
		named("/data", "data", (*msb.NamedVolumeBuilder).Create),
	)}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"settings", b.testSettings},
		{"the guest's own files", b.testSystem},
		{"a volume belongs to the sandbox's user", b.testOwner},
		{"exit codes", b.testExitCodes},
		{"programs that cannot run", b.testFailures},
		{"default command", b.testDefault},
		{"events", b.testEvents},
		{"standard input", b.testStdin},
		{"100 MB of output", b.testMuchOutput},
		{"signals", b.testSignals},
		{"timeout", b.testTimeout},
		{"end of the caller's context", b.testCancelled},
		{"close ends the program", b.testClose},
		{"20 at once", b.testMany},
		{"what a program leaves behind", b.testOrphans},
		{"logs", b.testLogs},
	} {
		t.Run(test.name, test.run)
	}
}

func (b *execBench) testSettings(t *testing.T) {
	got := sh(t, b.sb, `id -un; pwd; hostname; echo "$A $B [$EMPTY] $LANG $0"; nproc; umask`)
	if want := "daemon\n/usr/share\nexec.box-1\nsandbox kept [] C.UTF-8 /bin/bash\n2\n0022"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if mib := sh(t, b.sb, `awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo`); mib < "450" || mib > "600" || len(mib) != 3 {
		t.Errorf("a guest of 600 MiB has %s", mib)
	}
	out := must(b.sb.Exec(b.ctx, "sh", []string{"-c", `echo "$A $B $HOME"; pwd; id -u; id -g; id -G`},
		msb.WithExecEnv(map[string]string{"A": "exec"}), msb.WithExecCwd("/tmp"), msb.WithExecUser("nobody:7")))(t)
	if want := "exec kept /nonexistent\n/tmp\n65534\n7\n7\n"; out.Stdout() != want {
		t.Errorf("got %q, want %q", out.Stdout(), want)
	}
	for user, want := range map[string]string{"0": "0:0", "root": "0:0", "1234": "1234:0", "12:34": "12:34", "daemon:tty": "1:5"} {
		if got := sh(t, b.sb, "echo $(id -u):$(id -g)", msb.WithExecUser(user)); got != want {
			t.Errorf("user %s is %s, want %s", user, got, want)
		}
	}
}

func (b *execBench) testSystem(t *testing.T) {
	got := sh(t, b.sb, `stat -c '%a %U' /tmp /var/tmp /dev/shm /dev/null /dev/pts/ptmx
echo x > /tmp/mine && echo x > /dev/shm/mine && echo x > /dev/null && cat /dev/fd/0 && stat -f -c %T /dev/shm /proc /sys /run
python3 -c 'import socket; print(socket.gethostbyname("localhost"), socket.gethostbyname(socket.gethostname()))'
test -r /etc/resolv.conf && ! grep -q nameserver /etc/resolv.conf && cat /etc/hostname`)
	want := "1777 root\n1777 root\n1777 root\n666 root\n666 root\ntmpfs\nproc\nsysfs\ntmpfs\n127.0.0.1 127.0.1.1\nexec.box-1"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	var sec int64 // the clock is the host's
	if _, err := fmt.Sscan(sh(t, b.sb, "date +%s"), &sec); err != nil || time.Since(time.Unix(sec, 0)).Abs() > 5*time.Second {
		t.Errorf("the guest's clock is %s off, %v", time.Since(time.Unix(sec, 0)), err)
	}
}

// testOwner: what the host has put into a volume is the sandbox's user's, who is
// not root here.
func (b *execBench) testOwner(t *testing.T) {
	vol := must(msb.GetVolume(b.ctx, "data"))(t)
	ok(t, vol.FS().WriteString(b.ctx, "/in/seed", "seed"))
	got := sh(t, b.sb, "cd /data && echo more >> in/seed && mkdir out && chmod 700 out && echo result > out/file && stat -c %U . in in/seed out out/file")
	if want := strings.TrimSuffix(strings.Repeat("daemon\n", 5), "\n"); got != want {
		t.Errorf("owners %q, want %q", got, want)
	}
	refuses(t, b.sb, "ls /data/out", "Permission denied", msb.WithExecUser("nobody"))
	if got := must(vol.FS().ReadString(b.ctx, "/out/file"))(t); got != "result\n" {
		t.Errorf("the host reads %q", got)
	}
}

func (b *execBench) testExitCodes(t *testing.T) {
	for script, want := range map[string]int{"true": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 137, "kill -TERM $$": 143} {
		if out := run(t, b.sb, script); out.ExitCode() != want || out.Success() != (want == 0) {
			t.Errorf("%s: exit code %d, success %t", script, out.ExitCode(), out.Success())
		}
	}
	out := run(t, b.sb, `printf 'a\0b\377' ; printf err >&2`)
	if !bytes.Equal(out.StdoutBytes(), []byte("a\x00b\xff")) || out.Stderr() != "err" {
		t.Errorf("stdout %q, stderr %q", out.StdoutBytes(), out.StderrBytes())
	}
}

func (b *execBench) testFailures(t *testing.T) {
	sh(t, b.sb, `cd /tmp; printf 'no program' > text; chmod 755 text; printf '#!/no/such/interpreter\n' > script; chmod 755 script; touch plain`)
	for _, test := range []struct {
		cmd, kind string
		opts      []msb.ExecOption
	}{
		{"no-such-program", "not_found", nil},
		{"/no/such/program", "not_found", nil},
		{"/tmp/script", "not_found", nil},
		{"/tmp/plain", "permission_denied", nil},
		{"/tmp", "permission_denied", nil},
		{"/tmp/text", "not_executable", nil},
		{"true", "bad_cwd", []msb.ExecOption{msb.WithExecCwd("/absent")}},
		{"true", "bad_cwd", []msb.ExecOption{msb.WithExecCwd("/etc/passwd")}},
		{"true", "user_setup_failed", []msb.ExecOption{msb.WithExecUser("nobody-of-this-name")}},
		{"true", "bad_args", []msb.ExecOption{msb.WithExecEnv(map[string]string{"NUL": "\x00"})}},
		{"", "not_found", nil},
	} {
		_, err := b.sb.Exec(b.ctx, test.cmd, nil, test.opts...)
		wantKind(t, err, msb.ErrExecFailed)
		if f := failure(err); f == nil || f.Kind != test.kind || f.Path != test.cmd || f.Message == "" {
			t.Errorf("%s: failure %+v, want %s", test.cmd, f, test.kind)
		}
	}
	_, err := b.sb.Exec(b.ctx, "true", nil, msb.WithExecTTY(true))
	wantKind(t, err, msb.ErrUnsupportedOperation)
}

func (b *execBench) testDefault(t *testing.T) {
	if out := must(b.sb.ExecDefault(b.ctx))(t); out.Stdout() != "entry point two words\n" {
		t.Errorf("default command printed %q", out.Stdout())
	}
}

func (b *execBench) testEvents(t *testing.T) {
	h := must(b.sb.ShellStream(b.ctx, "echo out; read -r line; echo err >&2; exit 3", msb.WithExecStdinPipe()))(t)
	defer h.Close()
	var kinds []msb.ExecEventKind
	for len(kinds) == 0 || kinds[len(kinds)-1] != msb.ExecEventDone {
		ev := must(h.Recv(b.ctx))(t)
		kinds = append(kinds, ev.Kind)
		switch {
		case ev.Kind == msb.ExecEventStarted && ev.PID == 0:
			t.Error("started without a pid")
		case ev.Kind == msb.ExecEventStdout:
			ok(t, h.TakeStdin().Close())
		case ev.Kind == msb.ExecEventExited && ev.ExitCode != 3:
			t.Errorf("exit code %d", ev.ExitCode)
		}
	}
	want := []msb.ExecEventKind{msb.ExecEventStarted, msb.ExecEventStdout, msb.ExecEventStderr, msb.ExecEventExited, msb.ExecEventDone}
	if fmt.Sprint(kinds) != fmt.Sprint(want) {
		t.Errorf("events %v, want %v", kinds, want)
	}
	if ev := must(h.Recv(b.ctx))(t); ev.Kind != msb.ExecEventDone {
		t.Errorf("after the end: %v", ev.Kind)
	}
	h = must(b.sb.ExecStream(b.ctx, "no-such-program", nil))(t)
	defer h.Close()
	if ev := must(h.Recv(b.ctx))(t); ev.Kind != msb.ExecEventFailed || ev.Failure == nil || ev.Failure.Kind != "not_found" {
		t.Errorf("event %+v", ev)
	}
}

func (b *execBench) testStdin(t *testing.T) {
	if got := sh(t, b.sb, "readlink /proc/self/fd/0; cat"); got != "/dev/null" {
		t.Errorf("without input: %q", got)
	}
	if h := must(b.sb.ExecStream(b.ctx, "true", nil))(t); h.TakeStdin() != nil || h.Close() != nil {
		t.Error("an input without WithExecStdinPipe")
	}
	data := bytes.Repeat([]byte("0123456789abcde\n"), 1<<18) // 4 MiB, many windows
	h := must(b.sb.ExecStream(b.ctx, "sha256sum", nil, msb.WithExecStdinPipe()))(t)
	defer h.Close()
	in := h.TakeStdin()
	go func() {
		_, _ = in.Write(data)
		_ = in.Close()
	}()
	out := must(h.Collect(b.ctx))(t)
	if want := sha256.Sum256(data); !strings.HasPrefix(out.Stdout(), hex.EncodeToString(want[:])) {
		t.Errorf("the guest's digest of %d bytes: %q", len(data), out.Stdout())
	}
	if _, err := in.Write([]byte("x")); err == nil {
		t.Error("a program that has ended took input")
	}
	// A program that closes its input is not disturbed by what comes.
	h = must(b.sb.ShellStream(b.ctx, "exec <&-; echo closed; sleep 0.3; echo end", msb.WithExecStdinPipe()))(t)
	defer h.Close()
	go func(in *msb.ExecSink) {
		for range 64 {
			if _, err := in.Write(data[:64<<10]); err != nil {
				return
			}
		}
	}(h.TakeStdin())
	if out := must(h.Collect(b.ctx))(t); out.Stdout() != "closed\nend\n" || !out.Success() {
		t.Errorf("stdout %q, exit code %d", out.Stdout(), out.ExitCode())
	}
}

func (b *execBench) testMuchOutput(t *testing.T) {
	const total = 100_000_000
	block := make([]byte, 1000) // repeated by the guest: head -c alone costs it little
	for i := range block {
		block[i] = byte(i)
	}
	h := must(b.sb.ExecStream(b.ctx, "python3", []string{"-c", fmt.Sprintf(
		"import sys\nb = bytes(i %% 256 for i in range(1000)) * 1000\nfor i in range(%d): sys.stdout.buffer.write(b)", total/1_000_000)}))(t)
	defer h.Close()
	want, got, n := sha256.New(), sha256.New(), 0
	for range total / len(block) {
		want.Write(block)
	}
	began := time.Now()
	for {
		ev := must(h.Recv(b.ctx))(t)
		if ev.Kind == msb.ExecEventExited {
			break
		}
		got.Write(ev.Data)
		n += len(ev.Data)
	}
	if n != total || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("%d bytes of %d, or other ones", n, total)
	}
	t.Logf("%d MB in %s", n/1_000_000, time.Since(began).Round(time.Millisecond))
}

// alive reports whether a program with these arguments runs in the guest.
func (b *execBench) alive(t *testing.T, args string) bool {
	t.Helper()
	return run(t, b.sb, "pgrep -f '["+args[:1]+"]"+args[1:]+"'").Success()
}

func (b *execBench) testSignals(t *testing.T) {
	h := must(b.sb.ShellStream(b.ctx, `trap 'echo usr1' USR1; trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.05; done`))(t)
	defer h.Close()
	var out string
	for ended := false; !ended; {
		ev := must(h.Recv(b.ctx))(t)
		if ev.Kind == msb.ExecEventStdout { // the shell reports its child's end on the other
			out += string(ev.Data)
		}
		switch {
		case ev.Kind == msb.ExecEventExited:
			ended = true
			if ev.ExitCode != 5 || out != "ready\nusr1\nterm\n" {
				t.Errorf("exit code %d, output %q", ev.ExitCode, out)
			}
		case ev.Kind != msb.ExecEventStdout:
		case strings.HasSuffix(out, "ready\n"):
			ok(t, h.Signal(b.ctx, 10))
		case strings.HasSuffix(out, "usr1\n"):
			ok(t, h.Signal(b.ctx, 15))
		}
	}
	if err := h.Signal(b.ctx, 9); err == nil {
		t.Error("a program that has ended was signalled")
	}
	// Kill takes the whole group.
	h = must(b.sb.ShellStream(b.ctx, "sleep 4711 & echo started; wait"))(t)
	defer h.Close()
	for must(h.Recv(b.ctx))(t).Kind != msb.ExecEventStdout {
	}
	ok(t, h.Kill(b.ctx))
	if code := must(h.Wait(b.ctx))(t); code != 137 {
		t.Errorf("killed: exit code %d", code)
	}
	vmtest.Eventually(t, 2*time.Second, "the child of the killed program has gone", func() bool { return !b.alive(t, "sleep 4711") })
}

func (b *execBench) testTimeout(t *testing.T) {
	began := time.Now()
	_, err := b.sb.Shell(b.ctx, "sleep 4712", msb.WithExecTimeout(300*time.Millisecond))
	wantKind(t, err, msb.ErrExecTimeout, "300ms")
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the timeout of 300 ms took %s", d)
	}
	vmtest.Eventually(t, 2*time.Second, "the program has gone", func() bool { return !b.alive(t, "sleep 4712") })
	if out := must(b.sb.Shell(b.ctx, "echo in time", msb.WithExecTimeout(time.Minute)))(t); out.Stdout() != "in time\n" {
		t.Errorf("stdout %q", out.Stdout())
	}
	// Nobody receives, nobody closes: it is killed all the same.
	h := must(b.sb.ExecStream(b.ctx, "sleep", []string{"4713"}, msb.WithExecTimeout(300*time.Millisecond)))(t)
	defer h.Close()
	vmtest.Eventually(t, 5*time.Second, "the program nobody waits for has gone", func() bool { return !b.alive(t, "sleep 4713") })
	_, err = h.Wait(b.ctx)
	wantKind(t, err, msb.ErrExecTimeout)
}

func (b *execBench) testCancelled(t *testing.T) {
	ctx, cancel := context.WithTimeout(b.ctx, 300*time.Millisecond)
	defer cancel()
	_, err := b.sb.Shell(ctx, "sleep 4714")
	wantKind(t, err, msb.ErrCancelled)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v does not match context.DeadlineExceeded", err)
	}
	vmtest.Eventually(t, 5*time.Second, "the program has gone", func() bool { return !b.alive(t, "sleep 4714") })
}

func (b *execBench) testClose(t *testing.T) {
	h := must(b.sb.ExecStream(b.ctx, "yes", []string{"no 4715"}))(t)
	for must(h.Recv(b.ctx))(t).Kind != msb.ExecEventStdout {
	}
	ok(t, h.Close())
	ok(t, h.Close())
	vmtest.Eventually(t, 5*time.Second, "the program has gone", func() bool { return !b.alive(t, "yes no 4715") })
}

func (b *execBench) testMany(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			out, err := b.sb.Shell(b.ctx, fmt.Sprintf("seq %d %d; echo %d >&2; exit %d", i*1000, i*1000+999, i, i))
			if err != nil {
				t.Error(err)
				return
			}
			lines := strings.Fields(out.Stdout())
			if len(lines) != 1000 || lines[0] != fmt.Sprint(i*1000) || out.Stderr() != fmt.Sprintf("%d\n", i) || out.ExitCode() != i {
				t.Errorf("program %d: %d lines, stderr %q, exit code %d", i, len(lines), out.Stderr(), out.ExitCode())
			}
		})
	}
	wg.Wait()
}

// testOrphans: a program's end does not wait for what it has started, which
// lives on.
func (b *execBench) testOrphans(t *testing.T) {
	if got := sh(t, b.sb, "(sleep 4716; echo late) & echo now"); got != "now" {
		t.Errorf("got %q", got)
	}
	if !b.alive(t, "sleep 4716") {
		t.Error("a background program has gone")
	}
	sh(t, b.sb, "pkill -f '[s]leep 4716'")
	vmtest.Eventually(t, 5*time.Second, "every zombie was reaped", func() bool { return sh(t, b.sb, "ps -eo stat= | grep -c ^Z; true") == "0" })
}

func (b *execBench) testLogs(t *testing.T) {
	const marker = "marker of testLogs"
	sh(t, b.sb, fmt.Sprintf(`echo '%s'; echo 'on stderr' >&2; sleep 0.1; printf '\377\376'`, marker))
	all := must(b.sb.Logs(b.ctx, msb.LogOptions{}))(t)
	at := -1
	for i, e := range all {
		if strings.Contains(e.Text(), marker) {
			at = i
		}
		if e.SessionID == nil || e.Timestamp.IsZero() || e.Source == msb.LogSourceSystem {
			t.Fatalf("entry %+v", e)
		}
	}
	if at < 0 || time.Since(all[at].Timestamp).Abs() > time.Minute {
		t.Fatalf("the marker is not in %d entries", len(all))
	}
	var stderr, binary bool
	for _, e := range all {
		stderr = stderr || e.Source == msb.LogSourceStderr && e.Text() == "on stderr\n" && *e.SessionID == *all[at].SessionID
		binary = binary || e.Text() == "\xff\xfe"
	}
	if !stderr || !binary {
		t.Errorf("entries of the program: %+v", all[max(0, at-2):])
	}
	tail := must(b.sb.Logs(b.ctx, msb.LogOptions{Tail: 2}))(t)
	if len(tail) != 2 || tail[1].Cursor != all[len(all)-1].Cursor {
		t.Errorf("tail = %+v", tail)
	}
	since := must(b.sb.Logs(b.ctx, msb.LogOptions{Since: all[at].Timestamp}))(t)
	if len(since) != len(all)-at {
		t.Errorf("%d entries since the marker, want %d", len(since), len(all)-at)
	}
	until := must(b.sb.Logs(b.ctx, msb.LogOptions{Until: all[at].Timestamp, Sources: []msb.LogSource{msb.LogSourceStderr}}))(t)
	for _, e := range until {
		if e.Source != msb.LogSourceStderr || !e.Timestamp.Before(all[at].Timestamp) {
			t.Errorf("until the marker, stderr: %+v", e)
		}
	}
}
