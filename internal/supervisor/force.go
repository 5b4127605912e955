package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// ErrSilent is the cause of a request that a supervisor took no notice of: it
// hangs, or was stopped by a signal.
var ErrSilent = errors.New("supervisor does not answer")

// KillSilent kills the supervisor of a sandbox with SIGKILL; VMM and file server
// die with it. It is for a supervisor that does not answer. It returns when the
// signal is sent, not when the sandbox's lock is free.
//
// The process is the one that the kernel names as the listener of control.sock,
// and it must have the sandbox's lock file open: nobody else is ever killed.
//
// Errors: SandboxNotRunning when nobody listens; UnsupportedOperation when the
// process cannot be told for sure, or is not this user's to kill.
func KillSilent(ctx context.Context, h home.Dir, id, name string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(h.Run(id), ControlSocket))
	if err != nil {
		return errdefs.Wrap(errdefs.SandboxNotRunning, err, "sandbox %q is not running", name)
	}
	defer conn.Close()
	pid, err := listenerOf(conn.(*net.UnixConn))
	if err == nil {
		err = killHolder(pid, filepath.Join(h.Sandbox(name), lockName))
	}
	if err != nil {
		return errdefs.Wrap(errdefs.UnsupportedOperation, err, "supervisor of sandbox %q does not answer and cannot be killed", name)
	}
	return nil
}

// listenerOf returns the process that listens on the socket conn is connected to.
func listenerOf(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, fmt.Errorf("credentials of %s: %w", ControlSocket, err)
	}
	if cred.Pid <= 1 || int(cred.Pid) == os.Getpid() {
		return 0, fmt.Errorf("%s is served by process %d", ControlSocket, cred.Pid)
	}
	return int(cred.Pid), nil
}

// killHolder kills a process that has the file at lock open. The process is held
// by a pidfd before it is looked at, so that the signal cannot reach another one
// that got its number.
func killHolder(pid int, lock string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	has, err := hasOpen(pid, lock)
	if err != nil {
		return err
	}
	if !has {
		return fmt.Errorf("process %d does not hold the sandbox", pid)
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}

// hasOpen reports whether a process has a descriptor of the file at path.
func hasOpen(pid int, path string) (bool, error) {
	want, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, fd := range fds {
		if fi, err := os.Stat(filepath.Join(dir, fd.Name())); err == nil && os.SameFile(fi, want) {
			return true, nil
		}
	}
	return false, nil
}
