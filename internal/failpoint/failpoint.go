// Package failpoint lets tests stop a process, or make it fail, at a named
// instant between two durable steps. Nothing is armed in normal use, where Hit
// costs one atomic load.
//
// A point is declared once, as a package-level value, so that a test can list
// all points of the program and demand that each one is reached:
//
//	var staged = failpoint.New("volstore.staged")
//	...
//	if err := staged.Hit(); err != nil { return err }
//
// The environment variable MSB_FAILPOINT arms points in a child process:
// "volstore.staged=kill;agent.ready=error". Actions: kill (SIGKILL to the own
// process), exit (status 99), error, panic, stop (SIGSTOP to itself), sleep.
package failpoint

import (
	"fmt"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// EnvVar arms points in a process when it starts.
const EnvVar = "MSB_FAILPOINT"

var (
	armed atomic.Pointer[map[string]func() error]

	mu    sync.Mutex
	names = map[string]bool{} // guarded by mu
)

// Point is one declared instant.
type Point struct{ name string }

// New declares a point. Names are "package.instant", named for what has happened.
func New(name string) Point {
	mu.Lock()
	defer mu.Unlock()
	if names[name] {
		panic("failpoint: declared twice: " + name)
	}
	names[name] = true
	return Point{name}
}

// Hit runs the action armed for the point, if any.
func (p Point) Hit() error {
	m := armed.Load()
	if m == nil {
		return nil
	}
	if act := (*m)[p.name]; act != nil {
		return act()
	}
	return nil
}

// Names lists the declared points, sorted.
func Names() []string {
	mu.Lock()
	defer mu.Unlock()
	out := make([]string, 0, len(names))
	for n := range names {
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}

// Arm sets the action of a point in this process and returns a function that
// disarms it. It is for tests; only one point is armed at a time.
func Arm(name string, act func() error) (disarm func()) {
	m := map[string]func() error{name: act}
	armed.Store(&m)
	return func() { armed.Store(nil) }
}

// ArmFromEnv arms what MSB_FAILPOINT says. Commands call it first in main.
func ArmFromEnv() error { return ArmSpec(os.Getenv(EnvVar)) }

// ArmSpec arms points from the text form of EnvVar; an empty text arms none.
func ArmSpec(spec string) error {
	if spec == "" {
		return nil
	}
	m := map[string]func() error{}
	for _, part := range strings.Split(spec, ";") {
		name, action, ok := strings.Cut(part, "=")
		if !ok {
			return fmt.Errorf("failpoint: %q is not NAME=ACTION", part)
		}
		act, err := parseAction(name, action)
		if err != nil {
			return err
		}
		m[name] = act
	}
	armed.Store(&m)
	return nil
}

// stop stops the process before it returns. A signal to the process alone may be
// taken by another thread, some time later.
func stop() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_, _, errno := syscall.RawSyscall(syscall.SYS_TGKILL, uintptr(os.Getpid()), uintptr(syscall.Gettid()), uintptr(syscall.SIGSTOP))
	if errno != 0 {
		return errno
	}
	return nil
}

func parseAction(name, action string) (func() error, error) {
	switch action {
	case "kill":
		return func() error {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}, nil
	case "exit":
		return func() error { os.Exit(99); return nil }, nil
	case "error":
		return func() error { return fmt.Errorf("failpoint %s", name) }, nil
	case "panic":
		return func() error { panic("failpoint " + name) }, nil
	case "stop":
		return stop, nil
	case "sleep":
		return func() error { time.Sleep(time.Hour); return nil }, nil
	}
	return nil, fmt.Errorf("failpoint: unknown action %q", action)
}
