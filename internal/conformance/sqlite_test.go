package conformance_test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/conformance/guesttest"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

const transactions = 1000

// TestSQLite runs 1000 transactions in WAL mode on directory volumes of both
// policies, as root and as an ordinary user, and on a disk volume. The machine
// is killed in the middle and at the end. No transaction that was acknowledged
// may be lost and the database must be whole.
func TestSQLite(t *testing.T) {
	h := vmtest.Home(t)
	k := makeKit(t)
	disk := []microsandbox.VolumeOption{microsandbox.WithVolumeKind(microsandbox.VolumeKindDisk), microsandbox.WithVolumeSize(64)}
	places := []*place{
		{volume: "strict-root", policy: strict}, {volume: "strict-user", policy: strict, uid: 1000},
		{volume: "off-root", policy: off}, {volume: "off-user", policy: off, uid: 1000},
		{volume: "disk", uid: 1000, options: disk},
	}
	boot(t, k, "sqlite", places...)
	acked := make([]int, len(places))
	for _, until := range []int{transactions / 2, transactions} {
		began := time.Now()
		transact(t, places, acked, until, func() { killMachine(t, h) })
		took(t, fmt.Sprintf("up to %d transactions", until), began)
		began = time.Now()
		restart(t, "sqlite", places)
		for i, p := range places {
			p := p.on(t)
			out := p.runs(`python3 /kit/sqlite.py check db`)
			rows, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(out, "rows ")))
			// The last may have been written but not acknowledged.
			if err != nil || rows < acked[i] || rows > acked[i]+1 {
				t.Errorf("%s: %d transactions acknowledged, %q after the kill", p.volume, acked[i], out)
			}
			if until == transactions && rows != transactions {
				t.Errorf("%s: %d rows after %d transactions", p.volume, rows, transactions)
			}
		}
		took(t, "restart and check", began)
	}
}

// transact lets all places work at once until each has acknowledged until
// transactions, kills the machine and notes how many each has acknowledged. In
// the middle they work when the machine dies; at the end they have just ended.
func transact(t *testing.T, places []*place, acked []int, until int, kill func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var reached, ended sync.WaitGroup
	for i, p := range places {
		x, err := p.sb.ExecStream(ctx, "python3", []string{"/kit/sqlite.py", "run", p.dir() + "/db", strconv.Itoa(transactions)},
			microsandbox.WithExecUser(fmt.Sprintf("%d:%d", p.uid, p.uid)), microsandbox.WithExecEnv(map[string]string{guesttest.DirEnv: p.dir()}))
		if err != nil {
			t.Fatal(err)
		}
		defer x.Close()
		reached.Add(1)
		ended.Add(1)
		go func() {
			defer ended.Done()
			once := sync.OnceFunc(reached.Done)
			defer once()
			if err := p.follow(ctx, x, &acked[i], until, once); err != nil {
				t.Errorf("%s: %v", p.volume, err)
			}
		}()
	}
	reached.Wait()
	kill()
	ended.Wait()
}

// follow reads acknowledgements into acked until the program or the machine
// ends, and calls reached when there are enough and more to come.
func (p *place) follow(ctx context.Context, x *microsandbox.ExecHandle, acked *int, until int, reached func()) error {
	text, talk := "", ""
	for {
		e, err := x.Recv(ctx)
		if err != nil || e.Kind == microsandbox.ExecEventExited || e.Kind == microsandbox.ExecEventFailed {
			if *acked < until {
				return fmt.Errorf("ended at %d: %v %+v %s", *acked, err, e, talk)
			}
			return nil // it is done, or the machine was killed
		}
		switch e.Kind {
		case microsandbox.ExecEventStdout:
			text += string(e.Data)
		case microsandbox.ExecEventStderr:
			talk += string(e.Data)
		}
		for line, rest, ok := strings.Cut(text, "\n"); ok; line, rest, ok = strings.Cut(text, "\n") {
			if *acked, err = strconv.Atoi(strings.TrimPrefix(line, "ack ")); err != nil {
				return fmt.Errorf("printed %q", text)
			}
			text = rest
		}
		if *acked >= until && until < transactions {
			reached()
		}
	}
}

// killMachine ends QEMU as a crash would.
func killMachine(t *testing.T, h home.Dir) {
	t.Helper()
	killed := 0
	for _, p := range vmtest.Processes(string(h)) {
		pid, argv, _ := strings.Cut(p, " ")
		if n, err := strconv.Atoi(pid); err == nil && strings.Contains(argv, "qemu-system") && !strings.Contains(argv, "supervise") {
			if err := syscall.Kill(n, syscall.SIGKILL); err == nil {
				killed++
			}
		}
	}
	if killed != 1 {
		t.Fatalf("killed %d machines of %s", killed, os.Getenv(home.EnvVar))
	}
}

// restart starts a sandbox whose machine is gone.
func restart(t *testing.T, name string, places []*place) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, err := places[0].sb.WaitUntilStopped(ctx); err != nil {
		t.Fatal(err)
	}
	sb, err := microsandbox.StartSandbox(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range places {
		p.sb = sb
	}
}
