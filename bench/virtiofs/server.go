package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/fuseclient"
)

// server is a server process with a front end connected to it.
type server struct {
	name string
	pid  int
	cmd  *exec.Cmd // nil: this process
	c    *frontend.Client
	fs   *fuseclient.Client
}

// launch starts a server that listens on a socket, and connects to it.
func launch(name, dir string, argv []string) (*server, error) {
	sock := filepath.Join(dir, name+".sock")
	for i, a := range argv {
		argv[i] = strings.ReplaceAll(a, "SOCKET", sock)
	}
	_ = os.Remove(sock) // of a run that was interrupted
	cmd := exec.Command(argv[0], argv[1:]...)
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := urgently(cmd.Start); err != nil {
		return nil, err
	}
	s := &server{name: name, pid: cmd.Process.Pid, cmd: cmd}
	if err := s.connect(sock); err != nil {
		b, _ := os.ReadFile(log.Name())
		return nil, errors.Join(fmt.Errorf("%s: %w: %s", name, err, b), s.stop())
	}
	return s, nil
}

// urgently runs f on a thread with a high priority, which a process or thread
// that it starts inherits: on a busy machine both sides of a comparison shall
// have the processors. Priorities belong to threads.
func urgently(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -18)
	defer func() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, 0) }()
	return f()
}

func (s *server) connect(sock string) error {
	conn, err := dial(sock)
	if err != nil {
		return err
	}
	if s.c, err = frontend.Connect(conn, frontend.Options{MemMiB: 160}); err != nil {
		return err
	}
	s.pid = worker(s.pid)
	s.fs, err = fuseclient.Mount(s.c)
	return err
}

// dial waits for the server to listen.
func dial(sock string) (*net.UnixConn, error) {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock})
		if err == nil || time.Now().After(end) {
			return c, err
		}
	}
}

func (s *server) stop() error {
	var err error
	if s.c != nil {
		err = s.c.Close()
	} else {
		_ = s.cmd.Process.Kill()
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = s.cmd.Wait()
	}()
	select {
	case <-exited:
	case <-time.After(5 * time.Second):
		_ = s.cmd.Process.Kill()
		<-exited
	}
	return err
}

// cpu returns the processor time of the process, dead threads included.
func (s *server) cpu() time.Duration {
	var ts unix.Timespec
	clock := int32(^s.pid)<<3 | 2
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// wakeups counts the context switches of all threads.
func (s *server) wakeups() int {
	n := 0
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", s.pid))
	for _, t := range tasks {
		v, nv := statusValue(t, "voluntary_ctxt_switches"), statusValue(t, "nonvoluntary_ctxt_switches")
		n += v + nv
	}
	return n
}

// rss returns resident bytes without guest memory.
func (s *server) rss() int {
	f := fmt.Sprintf("/proc/%d/status", s.pid)
	return (statusValue(f, "RssAnon") + statusValue(f, "RssFile")) << 10
}

func statusValue(file, key string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			n, _ := strconv.Atoi(strings.Fields(v)[0])
			return n
		}
	}
	return 0
}

// buildOurs builds msb, or our server without confinement.
func buildOurs(dir string, bare bool, log io.Writer) (string, error) {
	pkg, name := "cmd/msb", "msb"
	if bare {
		pkg, name = "bench/virtiofs/ourserver", "ourserver"
	}
	bin := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-o", bin, "github.com/microsandbox-go/microsandbox/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = log, log
	return bin, cmd.Run()
}

// worker returns the process that serves: the last descendant, as msb serves
// in a confined child.
func worker(pid int) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				return worker(child)
			}
		}
	}
	return pid
}
