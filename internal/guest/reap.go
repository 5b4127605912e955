package guest

import (
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// procs starts programs and reaps every child, also those that orphaned
// processes of programs become. os/exec is not used: it waits for its own
// children, and two waiters would take each other's.
type procs struct {
	// mu is held while a program is started and while exits are handed out, so
	// that a program which ends at once finds its waiter.
	mu      sync.Mutex
	waiting map[int]chan<- unix.WaitStatus // by pid, guarded by mu
}

func newProcs() *procs { return &procs{waiting: map[int]chan<- unix.WaitStatus{}} }

// watch begins to reap. It is called once, before the first program starts.
// ended is called when processes have ended.
func (p *procs) watch(ended func()) {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	go func() {
		for range chld {
			p.reap()
			ended()
		}
	}()
}

// start runs fork, which returns the pid of a new child, and returns the channel
// that will carry the child's status, once.
func (p *procs) start(fork func() (pid int, err error)) (int, <-chan unix.WaitStatus, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err := fork()
	if err != nil {
		return 0, nil, err
	}
	done := make(chan unix.WaitStatus, 1)
	p.waiting[pid] = done
	return pid, done, nil
}

// reap collects all children that have ended and reports whether any is left.
// A program whose exec failed is reaped by syscall.ForkExec itself, under mu.
func (p *procs) reap() (left bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		var st unix.WaitStatus
		pid, err := unix.Wait4(-1, &st, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil: // ECHILD
			return false
		case pid == 0:
			return true
		}
		if done, ok := p.waiting[pid]; ok && (st.Exited() || st.Signaled()) {
			done <- st
			delete(p.waiting, pid)
		}
	}
}

// signalGroup signals the process group of a program that has not been reaped;
// reports whether it was still there. Holding mu keeps the pid from being reused.
func (p *procs) signalGroup(pid int, sig unix.Signal) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.waiting[pid]; !ok {
		return false
	}
	return unix.Kill(-pid, sig) == nil
}

// anyLeft reports whether any process but the agent exists: every other one is
// its child or will be when its own parent ends. (kill(-1, 0) counts kernel
// threads too.)
func (p *procs) anyLeft() bool { return p.reap() }

// exitCode is the shell's: the status, or 128 and the signal.
func exitCode(st unix.WaitStatus) int32 {
	if st.Signaled() {
		return 128 + int32(st.Signal())
	}
	return int32(st.ExitStatus())
}
