package supervisor

import (
	"os/exec"
	"runtime"
	"sync"
)

// spawner starts processes from one locked thread that lives as long as the
// supervisor: the parent-death signal of a child is sent when the *thread* that
// started it ends (prctl(2), PR_SET_PDEATHSIG), and Go ends threads at will.
type spawner struct {
	once sync.Once
	work chan func()
}

func (s *spawner) start(cmd *exec.Cmd) error {
	s.once.Do(func() {
		s.work = make(chan func())
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the process
			for f := range s.work {
				f()
			}
		}()
	})
	done := make(chan error, 1)
	s.work <- func() { done <- cmd.Start() }
	return <-done
}
