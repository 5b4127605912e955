package fuseserver

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// playEnv makes TestQuotaChild a file server of its own with a guest that never
// stops: "DIRECTORY LEDGER SEED".
const playEnv = "FUSESERVER_TEST_PLAY"

func TestQuotaChild(t *testing.T) {
	spec := os.Getenv(playEnv)
	if spec == "" {
		return // it is a part of TestKilledServers
	}
	a := &account{t: t}
	var seed uint64
	if _, err := fmt.Sscan(spec, &a.dir, &a.path, &seed); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 2))
	g := &guestPlayer{share: a.serve(), known: map[uint64]uint64{}}
	for i := 1; ; i++ {
		if err := g.step(r); err != nil {
			t.Fatal(err)
		}
		if i%20 == 0 {
			g.rest(r)
			fmt.Println(i)
		}
	}
}

// child starts a server process that plays, and returns when it is at work.
func (a *account) child(seed uint64, lines int) *exec.Cmd {
	a.t.Helper()
	return a.childOf("TestQuotaChild", fmt.Sprintf("%s=%s %s %d", playEnv, a.dir, a.path, seed), lines)
}

// childOf starts this program as one of its tests, and returns when that has
// printed so many lines.
func (a *account) childOf(test, env string, lines int) *exec.Cmd {
	a.t.Helper()
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		a.t.Fatal(err)
	}
	read := bufio.NewReader(out)
	for range lines + 1 { // the first one is the test's own
		if line, err := read.ReadString('\n'); err != nil {
			a.t.Fatalf("child: %q, %v", line, err)
		}
	}
	go func() { _, _ = read.WriteTo(noWriter{}) }()
	return cmd
}

type noWriter struct{}

func (noWriter) Write(b []byte) (int, error) { return len(b), nil }

// TestKilledServers: file servers are killed and stopped at work, at any instant.
// The ledger never says less than there is, nobody waits for one of them, and a
// walk makes it exact.
func TestKilledServers(t *testing.T) {
	a := newAccount(t, ledger.Limits{Bytes: 1 << 30, Inodes: 1000})
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	for round := range uint64(6) {
		one, other := a.child(seed+2*round, r.IntN(8)), a.child(seed+2*round+1, r.IntN(8))
		_ = one.Process.Kill()
		_ = one.Wait()
		_ = other.Process.Signal(unix.SIGSTOP)
		if walk, u := a.walk(), a.used(); u.Bytes < walk.Bytes || u.Inodes < walk.Inodes {
			t.Errorf("round %d: one killed, one stopped: the ledger says %v, a walk finds %v", round, u, walk)
		}
		a.besideStopped(r)
		_ = other.Process.Kill()
		_ = other.Wait()
		if walk, u := a.walk(), a.used(); u.Bytes < walk.Bytes || u.Inodes < walk.Inodes {
			t.Errorf("round %d: both killed: the ledger says %v, a walk finds %v", round, u, walk)
		}
		w, err := a.l.Settle(context.Background(), func(context.Context) (ledger.Delta, error) { return a.walk(), nil })
		if walk, u := a.walk(), a.used(); err != nil || !w.Exact || u != walk {
			t.Fatalf("round %d: after a walk: the ledger says %v, there is %v; %+v, %v", round, u, walk, w, err)
		}
	}
}

// besideStopped has a guest work while another one's server is stopped, perhaps
// inside an operation.
func (a *account) besideStopped(r *rand.Rand) {
	a.t.Helper()
	s := a.serve()
	g := &guestPlayer{share: s, known: map[uint64]uint64{}}
	for range 60 {
		began := time.Now()
		if err := g.step(r); err != nil {
			a.t.Fatal(err)
		}
		// A quarter of a second for each of the inodes of one operation.
		if d := time.Since(began); d > 5*time.Second {
			a.t.Errorf("an operation took %v", d)
		}
	}
	s.init()
	if err := s.srv.Close(); err != nil {
		a.t.Error(err)
	}
	a.shares = nil
}
