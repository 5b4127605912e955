package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// reapProcess is the first argument of a process that deletes removed volumes:
// a command need not wait until a million files are gone.
const reapProcess = "reap-trash"

// useReaper makes the default backend, if it is local, leave large removed
// volumes, and large ones to be counted, to processes of their own. A backend that cannot be had is reported by
// the command that wants it.
func useReaper() {
	if b, err := microsandbox.DefaultBackend(); err == nil {
		if local, ok := b.(*microsandbox.LocalBackend); ok {
			local.SetReaper(startReaper)
			local.SetCounter(startCounter)
		}
	}
}

// startReaper starts the process and does not wait for it. It has a session of
// its own and nothing of this command's but the end of a pipe: neither Ctrl-C nor
// a closed terminal concerns it. It works once begin has closed the pipe, or the
// end of this process has.
func startReaper(homeDir string) (begin func(), err error) {
	wait, hold, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer wait.Close()
	cmd := exec.Command("/proc/self/exe", reapProcess)
	cmd.Args[0] = "msb"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), home.EnvVar+"="+homeDir)
	cmd.Stdin = wait
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, hold.Close())
	}
	return func() { _ = hold.Close() }, cmd.Process.Release()
}

// reapMain deletes what is in the trash of $MSB_HOME, at low priority, after the
// end of its input. A killed one leaves the rest for the next.
func reapMain([]string) int {
	runtime.LockOSThread() // on Linux a priority belongs to a thread
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	_, _ = io.Copy(io.Discard, os.Stdin)
	h, err := home.Resolve()
	if err == nil {
		err = volstore.New(h).ReapTrash(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "msb: error:", err)
		return exitFailure
	}
	return exitOK
}
