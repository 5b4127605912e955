package fuseserver

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lockEnv makes this binary a program that locks: "KIND PATH ROUNDS". With
// rounds it adds 1 to the number in the file that often, under the lock, and
// ends; with 0 it takes the lock, says so, and waits for its end.
const lockEnv = "FUSESERVER_TEST_LOCK"

func lockProgram(spec string) int {
	var kind, path string
	var rounds int
	if _, err := fmt.Sscan(spec, &kind, &path, &rounds); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := locked(kind, path, rounds); err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", kind, path, err)
		return 1
	}
	return 0
}

func locked(kind, path string, rounds int) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if rounds == 0 {
		if err := realLock(kind, f, unix.F_WRLCK); err != nil {
			return err
		}
		fmt.Println("locked")
		for {
			time.Sleep(time.Hour) // until it is ended; select{} is a deadlock to Go's runtime
		}
	}
	for range rounds {
		if err := realLock(kind, f, unix.F_WRLCK); err != nil {
			return err
		}
		if err := increment(f); err != nil {
			return err
		}
		if err := realLock(kind, f, unix.F_UNLCK); err != nil {
			return err
		}
	}
	return nil
}

func increment(f *os.File) error {
	b := make([]byte, 8)
	if _, err := f.ReadAt(b, 0); err != nil {
		return err
	}
	n, err := strconv.Atoi(string(b))
	if err != nil {
		return err
	}
	_, err = f.WriteAt(fmt.Appendf(nil, "%08d", n+1), 0)
	return err
}

// realLock waits for a lock as programs do.
func realLock(kind string, f *os.File, typ int16) error {
	lk := unix.Flock_t{Type: typ, Whence: unix.SEEK_SET}
	for {
		var err error
		switch kind {
		case "flock":
			err = unix.Flock(int(f.Fd()), flockOps[typ])
		case "posix":
			err = unix.FcntlFlock(f.Fd(), unix.F_SETLKW, &lk)
		case "ofd":
			err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &lk)
		}
		if err != unix.EINTR { // the Go runtime preempts with signals
			return err
		}
	}
}

// locker starts this binary as a program that locks.
func locker(t *testing.T, kind, path string, rounds int) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", lockEnv, kind, path, rounds))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestCounterUnderLocks: programs of two guests and of the host add to one
// number under one lock, and no addition is lost, with every kind of lock. The
// guests are the host's own FUSE client, which sends what a guest's kernel
// sends; they see data at once, as with cache=none.
func TestCounterUnderLocks(t *testing.T) {
	const rounds = 1000
	for _, kind := range []string{"flock", "posix", "ofd"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "n")
			if err := os.WriteFile(path, []byte("00000000"), 0o666); err != nil {
				t.Fatal(err)
			}
			cfg := Config{AsRoot: true, Cache: "none"}
			var programs []*exec.Cmd
			for _, place := range []string{mountDir(t, dir, cfg), mountDir(t, dir, cfg), dir} {
				programs = append(programs, locker(t, kind, filepath.Join(place, "n"), rounds), locker(t, kind, filepath.Join(place, "n"), rounds))
			}
			for _, p := range programs {
				if err := p.Start(); err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range programs {
				if err := p.Wait(); err != nil {
					t.Error(err)
				}
			}
			b, err := os.ReadFile(path)
			if want := fmt.Sprintf("%08d", rounds*len(programs)); err != nil || string(b) != want {
				t.Errorf("counted %s, %v, want %s", b, err, want)
			}
		})
	}
}

// TestLocksThroughKernel: what becomes of real programs' locks when they unlock,
// close and die, and when a signal comes while they wait.
func TestLocksThroughKernel(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{AsRoot: true, Cache: "none"}
	one, other := mountDir(t, dir, cfg), mountDir(t, dir, cfg)
	for _, kind := range []string{"flock", "posix", "ofd"} {
		t.Run(kind, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(dir, kind), nil, 0o666); err != nil {
				t.Fatal(err)
			}
			for _, places := range [][2]string{{one, other}, {one, dir}, {dir, one}, {one, one}} {
				testHolder(t, kind, filepath.Join(places[0], kind), filepath.Join(places[1], kind))
			}
		})
	}
}

// testHolder has a program lock the file at one path and others want it at
// another path.
func testHolder(t *testing.T, kind, held, wanted string) {
	t.Helper()
	holder, waiter := locker(t, kind, held, 0), locker(t, kind, wanted, 0)
	awaitLock(t, holder)
	if err := waiter.Start(); err != nil {
		t.Fatal(err)
	}
	// A signal ends the wait of a program at once, as everywhere.
	for !sleepsInLock(t, waiter.Process.Pid) {
		runtime.Gosched()
	}
	_ = waiter.Process.Signal(unix.SIGTERM)
	if err := waiter.Wait(); err == nil || !strings.Contains(err.Error(), "terminated") {
		t.Errorf("%s: a waiting program that was told to end: %v", wanted, err)
	}
	heir := locker(t, kind, wanted, 0)
	out, err := heir.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := heir.Start(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Process.Kill() // its locks are dropped
	_ = holder.Wait()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Errorf("%s: after the end of the holder: %q, %v", wanted, line, err)
	}
	_ = heir.Process.Kill()
	_ = heir.Wait()
}

// awaitLock starts a program and returns when it has its lock.
func awaitLock(t *testing.T, p *exec.Cmd) {
	t.Helper()
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatalf("lock: %q, %v", line, err)
	}
}

// sleepsInLock reports whether a thread of the process, which must not have
// ended, is in flock or fcntl.
func sleepsInLock(t *testing.T, pid int) bool {
	t.Helper()
	if stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(stat), ") Z ") {
		t.Fatal("a program that was to wait for a lock has ended")
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(task)
		nr, _, _ := strings.Cut(string(b), " ")
		if nr == strconv.Itoa(unix.SYS_FLOCK) || nr == strconv.Itoa(unix.SYS_FCNTL) {
			return true
		}
	}
	return false
}
