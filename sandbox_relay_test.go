package microsandbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// relaySandbox is one sandbox for the tests below.
func relaySandbox(t *testing.T) (home.Dir, *microsandbox.Sandbox) {
	t.Helper()
	h := vmtest.Home(t)
	ctx := context.Background()
	sb, err := microsandbox.CreateSandbox(ctx, "r", microsandbox.WithImage(vmtest.Image), microsandbox.WithMemory(256))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sb.Kill(ctx); err != nil && !microsandbox.IsKind(err, microsandbox.ErrSandboxNotRunning) {
			t.Error(err)
		}
	})
	return h, sb
}

// TestRelay shares one guest among clients that do not behave.
func TestRelay(t *testing.T) {
	h, sb := relaySandbox(t)
	t.Run("unread output", func(t *testing.T) { testUnreadOutput(t, sb) })
	t.Run("many clients", func(t *testing.T) { testManyClients(t, sb) })
	t.Run("client goes", func(t *testing.T) { testClientGoes(t, sb) })
	t.Run("kill during stop", func(t *testing.T) { testKillDuringStop(t, h, sb) })
}

// unread starts an exec whose output nobody receives and opens a file of the
// guest whose bytes nobody drains, and returns when both have filled their windows.
func unread(t *testing.T, sb *microsandbox.Sandbox) (stop func()) {
	t.Helper()
	ctx := context.Background()
	flood, err := sb.ExecStream(ctx, "sh", []string{"-c", "exec cat /dev/zero"})
	if err != nil {
		t.Fatal(err)
	}
	if ev, err := flood.Recv(ctx); err != nil || ev.Kind != microsandbox.ExecEventStarted {
		t.Fatalf("%+v %v", ev, err)
	}
	if out, err := sb.Exec(ctx, "truncate", []string{"-s", "1G", "/tmp/large"}); err != nil || !out.Success() {
		t.Fatalf("truncate: %v %+v", err, out)
	}
	file, err := sb.FS().ReadStream(ctx, "/tmp/large")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Recv(ctx); err != nil {
		t.Fatal(err)
	}
	settled(t, sb)
	return func() {
		_ = flood.Close()
		_ = file.Close()
	}
}

// settled waits until the flood's writer sleeps in its pipe: it has no credit.
func settled(t *testing.T, sb *microsandbox.Sandbox) {
	t.Helper()
	vmtest.Eventually(t, 30*time.Second, "writer blocked in its pipe", func() bool {
		out, err := sb.Shell(context.Background(), `grep State $(grep -l 'dev.zer[o]' /proc/[0-9]*/cmdline | sed s/cmdline/status/)`)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out.Stdout()) == "State:\tS (sleeping)"
	})
}

// testUnreadOutput measures "true" from another client with and without the
// unread streams, in turn, and compares medians: what else the machine does
// falls on both.
func testUnreadOutput(t *testing.T, sb *microsandbox.Sandbox) {
	const rounds, each = 4, 5
	once := func() time.Duration {
		began := time.Now()
		out, err := sb.Exec(context.Background(), "true", nil)
		if err != nil || !out.Success() {
			t.Fatalf("true: %v %+v", err, out)
		}
		return time.Since(began)
	}
	once()
	var alone, beside []time.Duration
	for range rounds {
		for range each {
			alone = append(alone, once())
		}
		stop := unread(t, sb)
		for range each {
			beside = append(beside, once())
		}
		stop()
	}
	a, b := median(alone), median(beside)
	t.Logf("true: %s alone, %s beside unread streams", a.Round(time.Microsecond), b.Round(time.Microsecond))
	if b > 2*a {
		t.Errorf("unread output slows another client: %s instead of %s", b, a)
	}
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// testManyClients runs programs from many connections at once.
func testManyClients(t *testing.T, sb *microsandbox.Sandbox) {
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() {
			want := fmt.Sprintf("client %d\n", i)
			out, err := sb.Exec(context.Background(), "echo", []string{"client", fmt.Sprint(i)})
			if err == nil && out.Stdout() != want {
				err = fmt.Errorf("got %q, want %q", out.Stdout(), want)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// testClientGoes: the programs of a client end with its connection, however it
// ends, and those of others do not.
func testClientGoes(t *testing.T, sb *microsandbox.Sandbox) {
	ctx := context.Background()
	stays, err := sb.ExecStream(ctx, "sleep", []string{"7001"})
	if err != nil {
		t.Fatal(err)
	}
	defer stays.Close()
	goes, err := sb.ExecStream(ctx, "sleep", []string{"7002"})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []*microsandbox.ExecHandle{stays, goes} {
		if ev, err := h.Recv(ctx); err != nil || ev.Kind != microsandbox.ExecEventStarted {
			t.Fatalf("%+v %v", ev, err)
		}
	}
	if err := goes.Close(); err != nil {
		t.Fatal(err)
	}
	running := func(arg string) bool {
		out, err := sb.Shell(ctx, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c '"+arg+"'")
		if err != nil {
			t.Fatal(err)
		}
		return out.Stdout() != "0\n"
	}
	if !running("sleep 700[1]") {
		t.Fatal("a running program is not seen")
	}
	vmtest.Eventually(t, 20*time.Second, "end of the program", func() bool { return !running("sleep 700[2]") })
	if !running("sleep 700[1]") {
		t.Error("a program ended with the connection of another client")
	}
}

// testKillDuringStop: a kill ends a stop that waits for a guest whose VMM does
// not run.
func testKillDuringStop(t *testing.T, h home.Dir, sb *microsandbox.Sandbox) {
	ctx := context.Background()
	kill(t, live(t, h, "r").VMMPID, syscall.SIGSTOP)
	stopped := make(chan error, 1)
	go func() { stopped <- sb.Stop(ctx, microsandbox.WithStopTimeout(time.Hour)) }()
	vmtest.Eventually(t, 10*time.Second, "draining", func() bool { return live(t, h, "r").State == supervisor.StatusDraining })
	began := time.Now()
	if err := sb.Kill(ctx); err != nil {
		t.Error(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > freeWithin {
		t.Errorf("kill took %s", took)
	}
	mustBeFree(t, h, "r")
	i, err := microsandbox.GetSandbox(ctx, "r")
	if err != nil || i.Status() != microsandbox.SandboxStatusStopped || i.Cause() != "" {
		t.Errorf("status %v, cause %q, %v", i.Status(), i.Cause(), err)
	}
}
