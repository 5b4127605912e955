package main

import (
	"context"
	"fmt"
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
// its own and nothing of this command's: neither Ctrl-C nor a closed terminal or
// pipe concerns it.
func startReaper(homeDir string) error {
	cmd := exec.Command("/proc/self/exe", reapProcess)
	cmd.Args[0] = "msb"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), home.EnvVar+"="+homeDir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// reapMain deletes what is in the trash of $MSB_HOME, at low priority. A killed
// one leaves the rest for the next.
func reapMain([]string) int {
	runtime.LockOSThread() // on Linux a priority belongs to a thread
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
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
