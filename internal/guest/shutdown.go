package guest

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/mountinfo"
)

// defaultGrace is what programs get between SIGTERM and SIGKILL.
const defaultGrace = 2 * time.Second

// killWait bounds the wait for killed processes to vanish: one that sleeps in
// an unanswered file server cannot be waited for.
const killWait = time.Second

// shutdown ends all programs, unmounts everything and says goodbye. The machine
// is to be powered off next.
func (a *agent) shutdown(grace time.Duration) {
	if grace <= 0 {
		grace = defaultGrace
	}
	a.endPrograms(grace)
	a.sessions.closeHandles(func(*handle) bool { return true })
	a.unmountAll()
	_ = a.link.send(0, 0, agentproto.MsgGoodbye, nil)
	a.link.close()
}

// endPrograms asks all processes to end, then kills those that do not.
func (a *agent) endPrograms(grace time.Duration) {
	if !a.procs.anyLeft() {
		return
	}
	_ = unix.Kill(-1, unix.SIGTERM)
	_ = unix.Kill(-1, unix.SIGCONT) // a stopped one could not act on it
	a.waits.stop()
	if a.procs.waitGone(grace) {
		return
	}
	// Again and again: one that was being forked may have been missed.
	for deadline := time.Now().Add(killWait); time.Now().Before(deadline); {
		_ = unix.Kill(-1, unix.SIGKILL)
		if a.procs.waitGone(50 * time.Millisecond) {
			return
		}
	}
}

// waitGone waits until no process is left; false when d has passed.
func (p *procs) waitGone(d time.Duration) bool {
	deadline := time.Now().Add(d)
	for pause := time.Millisecond; p.anyLeft(); pause = min(2*pause, 20*time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
	return true
}

// unmountAll unmounts all file systems that hold data, the last mounted first,
// also those that programs have mounted. What is still busy is made read-only,
// which is as clean on the disk.
func (a *agent) unmountAll() {
	a.growth.end()
	a.waits.close()
	for _, m := range dataMounts() {
		if err := unix.Unmount(m, 0); err != nil {
			remountReadOnly(m, err)
		}
	}
	if a.root != nil {
		a.root.leave()
	}
	unix.Sync()
}

func remountReadOnly(path string, why error) {
	if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		logf("agent: unmount %s: %v; read-only: %v", path, why, err)
	}
}

// kernelTypes are file systems without data of their own.
var kernelTypes = map[string]bool{
	"proc": true, "sysfs": true, "devtmpfs": true, "devpts": true, "tmpfs": true, "mqueue": true,
	"cgroup": true, "cgroup2": true, "rootfs": true, "ramfs": true, "debugfs": true, "tracefs": true,
	"securityfs": true, "bpf": true, "binfmt_misc": true, "hugetlbfs": true, "autofs": true,
}

// dataMounts lists mount points below the root from the last mounted to the
// first (proc_pid_mountinfo(5): order of mounting).
func dataMounts() (out []string) {
	mounts, err := mountinfo.Self()
	if err != nil {
		logf("agent: %v", err)
	}
	for _, m := range slices.Backward(mounts) {
		if m.Point != "/" && !kernelTypes[m.Type] {
			out = append(out, m.Point)
		}
	}
	return out
}

// leave moves the agent back to the initramfs and unmounts the root's layers.
// Errors are logged: the disk is synced anyway, and its journal repairs it.
func (r *rootFS) leave() {
	if r.initramfs < 0 || !r.disk {
		return
	}
	if err := unix.Unmount("/", unix.MNT_DETACH); err != nil {
		logf("agent: detach the root: %v", err)
	}
	if err := unix.Fchdir(r.initramfs); err != nil {
		logf("agent: leave the root: %v", err)
		return
	}
	if err := unix.Chroot("."); err != nil {
		logf("agent: leave the root: %v", err)
		return
	}
	if err := unix.Unmount(upperDir, 0); err != nil {
		remountReadOnly(upperDir, err)
	}
}
