package storetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// sweepVar tells a child to have its mutating system calls watched.
const sweepVar = "MSB_TEST_SWEEP"

// mutating system calls of amd64 and arm64 that the store or its tools may use.
// Opening counts only with O_CREAT or O_TRUNC.
var mutating = []uint32{
	unix.SYS_MKDIRAT, unix.SYS_RENAMEAT2, unix.SYS_RENAMEAT, unix.SYS_UNLINKAT, unix.SYS_LINKAT, unix.SYS_SYMLINKAT,
	unix.SYS_FTRUNCATE, unix.SYS_TRUNCATE, unix.SYS_FALLOCATE, unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_WRITEV,
	unix.SYS_PWRITEV, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FSETXATTR, unix.SYS_COPY_FILE_RANGE,
	unix.SYS_PWRITEV2, unix.SYS_SENDFILE, unix.SYS_MKNODAT, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_SETXATTR, unix.SYS_FREMOVEXATTR,
}

// Watched must be called first in TestMain of a package that uses KillAt. In a
// child of KillAt it installs the filter, hands its descriptor over and starts
// the program again, so that all its threads and children are under it.
func Watched() {
	if os.Getenv(sweepVar) != "1" {
		return
	}
	if err := watch(); err != nil {
		fmt.Fprintln(os.Stderr, "watch system calls:", err)
		os.Exit(98)
	}
}

func watch() error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	prog := filter()
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return errno
	}
	if err := unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(fd)), nil, 0); err != nil {
		return err
	}
	unix.CloseOnExec(int(fd))
	unix.CloseOnExec(3)
	env := []string{}
	for _, kv := range os.Environ() {
		if kv != sweepVar+"=1" {
			env = append(env, kv)
		}
	}
	return syscall.Exec("/proc/self/exe", os.Args, env)
}

// filter notifies for the mutating calls and allows the rest.
func filter() []unix.SockFilter {
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		anyBit = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret    = unix.BPF_RET | unix.BPF_K

		offNr    = 0
		offArg1  = 16 + 8 // low word, little endian
		offArg2  = 16 + 2*8
		allow    = 0x7fff0000 // SECCOMP_RET_ALLOW
		notify   = 0x7fc00000 // SECCOMP_RET_USER_NOTIF
		creating = unix.O_CREAT | unix.O_TRUNC
	)
	prog := []unix.SockFilter{{Code: load, K: offNr}}
	for _, nr := range append(mutating, legacyMutating...) {
		prog = append(prog, unix.SockFilter{Code: equal, K: nr, Jf: 1}, unix.SockFilter{Code: ret, K: notify})
	}
	for nr, off := range map[uint32]uint32{unix.SYS_OPENAT: offArg2, legacyOpen: offArg1} {
		prog = append(prog,
			unix.SockFilter{Code: equal, K: nr, Jf: 4},
			unix.SockFilter{Code: load, K: off},
			unix.SockFilter{Code: anyBit, K: creating, Jf: 1},
			unix.SockFilter{Code: ret, K: notify},
			unix.SockFilter{Code: ret, K: allow})
	}
	return append(prog, unix.SockFilter{Code: ret, K: allow})
}

// KillAt starts cmd, whose TestMain calls Watched, and kills it before its n-th
// mutating system call, counted over all its threads and children. It returns
// false when the program ended by itself before that.
func KillAt(t testing.TB, cmd *exec.Cmd, n int) (killed bool) {
	t.Helper()
	return StopAt(t, cmd, n, func() (kill bool) { return true })
}

// StopAt starts cmd like KillAt and calls at while the program waits before its
// n-th mutating system call; at says whether it is killed there or goes on to
// its end. StopAt returns false when the program ended before that.
func StopAt(t testing.TB, cmd *exec.Cmd, n int, at func() (kill bool)) (reached bool) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = append(cmd.Env, sweepVar+"=1")
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := receive(ours)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		prereq.Missing(t, "seccomp notifications: "+err.Error())
	}
	reached = countdown(listener, n, cmd.Process, at)
	_ = listener.Close() // a call still waiting fails; its process is dead anyway
	_ = cmd.Wait()
	return reached
}

func receive(sock *os.File) (*os.File, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(sock.Fd()), make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("no descriptor arrived: %v", err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "seccomp listener"), nil
}

// struct seccomp_notif and seccomp_notif_resp (linux/seccomp.h).
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	data  [64]byte
}

type response struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

const (
	ioctlRecv = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	ioctlSend = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
	goOn      = 1          // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

// countdown lets every call go on but the n-th, until all processes under the
// filter are gone or p is killed.
func countdown(listener *os.File, n int, p *os.Process, at func() (kill bool)) (reached bool) {
	fd := listener.Fd()
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); errors.Is(err, unix.EINTR) {
			continue
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			return reached // hang-up: all processes under the filter are gone
		}
		var req notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlRecv, uintptr(unsafe.Pointer(&req))); errno != 0 {
			continue // the caller was killed meanwhile
		}
		if n--; n == 0 {
			reached = true
			if at() {
				_ = p.Kill()
				return true
			}
		}
		resp := response{id: req.id, flags: goOn}
		_, _, _ = unix.Syscall(unix.SYS_IOCTL, fd, ioctlSend, uintptr(unsafe.Pointer(&resp)))
	}
}
