package microsandbox_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// lockScript takes a lock: KIND PATH ROUNDS. With rounds it adds 1 to the number
// in the file that often; "hold" says so and keeps the lock; "wait" also says
// so, in a file, when a signal ends its wait.
const lockScript = `import fcntl, os, signal, struct, sys, time
kind, path, what = sys.argv[1:4]
f = os.open(path, os.O_RDWR)
def lock(kind, typ, wait=True):
    if kind == "flock":
        fcntl.flock(f, {"w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}[typ] | (0 if wait else fcntl.LOCK_NB))
    elif kind == "posix":
        fcntl.lockf(f, {"w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}[typ] | (0 if wait else fcntl.LOCK_NB))
    else:
        t = {"w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}[typ]
        fcntl.fcntl(f, 38 if wait else 37, struct.pack("hhqqi4x", t, 0, 0, 0, 0))
class Told(Exception): pass
def told(sig, frame): raise Told(sig)
if what == "try":
    lock(kind, "w", False)
elif what == "hold":
    lock(kind, "w")
    print("locked", flush=True)
    time.sleep(1000)
elif what == "wait":
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGALRM, told)
    signal.alarm(int(sys.argv[4]))
    open(path + ".waits", "w").close()
    try:
        lock(kind, "w")
        print("got it")
    except Told as e:
        open(path + ".told", "w").close()
        print("told", e.args[0])
else:
    for i in range(int(what)):
        lock(kind, "w")
        n = int(os.pread(f, 8, 0))
        os.pwrite(f, b"%08d" % (n + 1), 0)
        lock(kind, "u")
`

// lockBench is two sandboxes with one volume: at /v for writing, in the second
// also at /ro for reading.
type lockBench struct {
	a, b *msb.Sandbox
	dir  string // of the host
}

var lockKinds = []string{"flock", "posix", "ofd"}

// TestLocksInGuests: locks of two sandboxes and the host exclude each other.
func TestLocksInGuests(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	vol := must(msb.CreateVolume(ctx, "locks"))(t)
	ok(t, vol.FS().WriteString(ctx, "/lock.py", lockScript))
	for _, k := range lockKinds {
		ok(t, vol.FS().WriteString(ctx, "/"+k, "00000000"))
	}
	exact := msb.Mount.Named("locks", msb.MountOptions{Cache: msb.CacheModeNone})
	b := &lockBench{dir: vol.Path()}
	b.a = boot(ctx, t, "locks-a", msb.WithMounts(map[string]msb.MountConfig{"/v": exact}))
	b.b = boot(ctx, t, "locks-b", msb.WithMounts(map[string]msb.MountConfig{"/v": exact,
		"/ro": msb.Mount.Named("locks", msb.MountOptions{Readonly: true})}))
	for _, test := range []struct {
		name string
		run  func(context.Context, *testing.T)
	}{
		{"counter", b.testCounter}, {"dropped", b.testDropped}, {"signals", b.testSignals},
		{"readonly", b.testReadonly}, {"stop", b.testStop},
	} {
		if !t.Run(test.name, func(t *testing.T) { test.run(ctx, t) }) {
			break
		}
	}
}

// lockHost opens a file of the volume on the host and returns what locks it.
func (b *lockBench) lockHost(t *testing.T, kind string) (lock func(typ int16), f *os.File) {
	t.Helper()
	f = must(os.OpenFile(filepath.Join(b.dir, kind), os.O_RDWR, 0))(t)
	t.Cleanup(func() { f.Close() })
	return func(typ int16) {
		for {
			lk := unix.Flock_t{Type: typ, Whence: unix.SEEK_SET}
			var err error
			switch kind {
			case "flock":
				err = unix.Flock(int(f.Fd()), map[int16]int{unix.F_WRLCK: unix.LOCK_EX, unix.F_UNLCK: unix.LOCK_UN}[typ])
			case "posix":
				err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &lk)
			default:
				err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lk)
			}
			if err != unix.EINTR {
				ok(t, err)
				return
			}
		}
	}, f
}

// testCounter: no update is lost in 3000 rounds of each kind.
func (b *lockBench) testCounter(ctx context.Context, t *testing.T) {
	const rounds = 1000
	for _, kind := range lockKinds {
		began := time.Now()
		var parties sync.WaitGroup
		for _, sb := range []*msb.Sandbox{b.a, b.b} {
			parties.Go(func() { sh(t, sb, fmt.Sprintf("python3 /v/lock.py %s /v/%s %d", kind, kind, rounds)) })
		}
		parties.Go(func() {
			lock, f := b.lockHost(t, kind)
			for bytes.HasPrefix(must(os.ReadFile(f.Name()))(t), []byte("000000")) {
				time.Sleep(time.Millisecond) // the guests take longer to begin than the host to end
			}
			for range rounds {
				lock(unix.F_WRLCK)
				addOne(t, f)
				lock(unix.F_UNLCK)
			}
		})
		parties.Wait()
		got := string(must(os.ReadFile(filepath.Join(b.dir, kind)))(t))
		if want := fmt.Sprintf("%08d", 3*rounds); got != want {
			t.Errorf("%s: counted %s, want %s", kind, got, want)
		}
		t.Logf("%s: %d rounds in %v", kind, 3*rounds, time.Since(began).Round(time.Millisecond))
	}
}

func addOne(t *testing.T, f *os.File) {
	buf := make([]byte, 8)
	var n int
	_ = must(f.ReadAt(buf, 0))(t)
	_ = must(fmt.Sscanf(string(buf), "%08d", &n))(t)
	_ = must(f.WriteAt(fmt.Appendf(nil, "%08d", n+1), 0))(t)
}

// hold has a program in a guest take a lock and returns its pid there.
func (b *lockBench) hold(t *testing.T, sb *msb.Sandbox, kind string) (pid string) {
	t.Helper()
	return sh(t, sb, fmt.Sprintf(`rm -f /tmp/out; (exec python3 /v/lock.py %s /v/%s hold >/tmp/out 2>&1) & p=$!
		until grep -q locked /tmp/out; do kill -0 $p || exit 1; done; echo $p`, kind, kind))
}

func try(kind, dir string) string {
	return fmt.Sprintf("python3 /v/lock.py %s %s/%s try", kind, dir, kind)
}

// testDropped: a lock is there for others when its holder unlocks, closes the
// file or dies.
func (b *lockBench) testDropped(ctx context.Context, t *testing.T) {
	for _, kind := range lockKinds {
		pid := b.hold(t, b.a, kind)
		refuses(t, b.b, try(kind, "/v"), "BlockingIOError")
		sh(t, b.a, "kill -9 "+pid)
		sh(t, b.b, fmt.Sprintf("timeout 60 python3 /v/lock.py %s /v/%s wait 0", kind, kind))
		// Ending a program closes its file; a second one shows that the lock is gone.
		sh(t, b.a, try(kind, "/v")+" && "+try(kind, "/v"))
	}
	// sleep keeps the file open.
	sh(t, b.a, "exec 9<>/v/flock; flock -n 9; flock -u 9; (sleep 1000 >/dev/null 2>&1 &)")
	sh(t, b.b, try("flock", "/v"))
	sh(t, b.a, "pkill sleep")
}

// testSignals: a signal ends the wait of a program in a guest, although Linux's
// virtiofs does not tell the file server about it.
func (b *lockBench) testSignals(ctx context.Context, t *testing.T) {
	for _, kind := range lockKinds {
		lock, f := b.lockHost(t, kind)
		lock(unix.F_WRLCK)
		began := time.Now()
		if got := sh(t, b.a, fmt.Sprintf("timeout -s KILL 60 python3 /v/lock.py %s /v/%s wait 1", kind, kind)); !strings.HasPrefix(got, "told") {
			t.Errorf("%s: a wait with an alarm: %q", kind, got)
		}
		t.Logf("%s: told after %v, asked for 1 s", kind, time.Since(began).Round(time.Millisecond))
		// Nor does SIGKILL wait for the lock.
		sh(t, b.b, fmt.Sprintf(`rm -f /v/%[1]s.waits; python3 /v/lock.py %[1]s /v/%[1]s wait 0 & p=$!
			until test -e /v/%[1]s.waits; do :; done; sleep 0.2; kill -9 $p; wait $p; test $? = 137`, kind))
		ok(t, f.Close())
	}
}

// testReadonly: who may only read keeps its locks to itself.
func (b *lockBench) testReadonly(ctx context.Context, t *testing.T) {
	sh(t, b.b, `exec 9</ro/flock; flock -n -x 9; (sleep 1000 >/dev/null 2>&1 &)`)
	sh(t, b.a, try("flock", "/v"))
	sh(t, b.a, try("ofd", "/v"))
	sh(t, b.b, "pkill sleep")
}

// testStop: programs that wait for locks do not hold up the end of a sandbox,
// and see the signal that tells them to end.
func (b *lockBench) testStop(ctx context.Context, t *testing.T) {
	for _, kind := range lockKinds {
		lock, f := b.lockHost(t, kind)
		lock(unix.F_WRLCK)
		defer f.Close()
		sh(t, b.b, fmt.Sprintf(`rm -f /v/%[1]s.waits /v/%[1]s.told; (python3 /v/lock.py %[1]s /v/%[1]s wait 0 >/dev/null 2>&1 &)
			until test -e /v/%[1]s.waits; do :; done; sleep 0.3`, kind))
	}
	began := time.Now()
	ok(t, b.b.Stop(ctx))
	t.Logf("stopped in %v", time.Since(began).Round(time.Millisecond))
	for _, kind := range lockKinds {
		if _, err := os.Stat(filepath.Join(b.dir, kind+".told")); err != nil {
			t.Errorf("%s: the waiting program was not told to end: %v", kind, err)
		}
	}
	if h := must(msb.GetSandbox(ctx, "locks-b"))(t); h.Status() != msb.SandboxStatusStopped {
		t.Errorf("status %s", h.Status())
	}
}
