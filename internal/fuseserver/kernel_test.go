package fuseserver

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// serveEnv holds the Config of a process that serves /dev/fuse (descriptor 3)
// from a directory (descriptor 4). It is a process of its own, because a
// process that waits for its own file system hangs for ever.
const serveEnv = "FUSESERVER_TEST_SERVE"

func serveFuse(config string) int {
	cfg := Config{Logf: func(f string, a ...any) { fmt.Fprintf(os.Stderr, f+"\n", a...) }}
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var err error
	cfg.Root = 4
	if cfg.ProcSelfFd, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	s, err := New(cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var threads sync.WaitGroup
	for range 3 {
		threads.Go(func() { pump(s, 3) })
	}
	threads.Wait()
	_ = s.Close()
	if n := s.fds.Load(); n != 0 {
		fmt.Fprintf(os.Stderr, "%d descriptors are still charged after Close\n", n)
		return 1
	}
	return 0
}

// mountShare mounts a share through the FUSE client of the host's own kernel,
// with default_permissions and allow_other as virtio-fs has them: the guest
// kernel without the guest.
func mountShare(t *testing.T, cfg Config) (mnt, dir string) {
	t.Helper()
	dir = t.TempDir()
	return mountDir(t, dir, cfg), dir
}

// mountDir is mountShare for a directory that is there.
func mountDir(t *testing.T, dir string, cfg Config) (mnt string) {
	t.Helper()
	prereq.Root(t, "mount")
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		prereq.Missing(t, "/dev/fuse: %v", err)
	}
	defer dev.Close()
	mnt = t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", dev.Fd())
	if err := unix.Mount("share", mnt, "fuse.msbtest", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		prereq.Missing(t, "a mount of type fuse: %v", err)
	}
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	cfg.Logf = nil
	config, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	server := exec.Command("/proc/self/exe")
	server.Env = append(os.Environ(), serveEnv+"="+string(config))
	server.ExtraFiles = []*os.File{dev, root}
	server.Stderr = os.Stderr
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		_ = unix.Unmount(mnt, unix.MNT_FORCE|unix.MNT_DETACH)
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(mnt, unix.MNT_FORCE|unix.MNT_DETACH)
		}
		if err := server.Wait(); err != nil {
			t.Errorf("server: %v", err)
		}
	})
	return mnt
}

// pump carries requests from /dev/fuse to the server until the unmount.
func pump(s *Server, fd int) {
	c := newCall(s)
	buf := make([]byte, maxWrite+64<<10)
	reply := make([]byte, maxWrite+4096)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.ENODEV {
			return
		}
		if err != nil {
			continue // EINTR, or ENOENT: the request was interrupted
		}
		args := min(n, headerSize+w.WriteInSize)
		in := [][]byte{buf[:headerSize], buf[headerSize:args], buf[args:n]}
		out := reply
		if w.Opcode(binary.NativeEndian.Uint32(buf[4:])) == w.OpSetlkw {
			out = make([]byte, replySize) // its answer may come after those of later requests
		}
		p := &parkedRequest{in, [][]byte{out[:replySize], out[replySize:]}, make(chan int, 1)}
		used, done := c.serve(p.in, p.out, p)
		switch {
		case !done && len(out) == replySize:
			go func() { _, _ = unix.Write(fd, out[:<-p.done]) }()
			continue
		case !done:
			used = <-p.done
		}
		if used > 0 {
			_, _ = unix.Write(fd, out[:used])
		}
	}
}
