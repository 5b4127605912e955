package guest

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// lockWaits ends waits for locks on virtio-fs mounts. Linux's virtiofs takes no
// request back: a thread that waits for a lock does not notice a signal, not even
// SIGKILL, until it has the lock. So the agent looks for such threads and tells
// the file server, which then answers EINTR.
type lockWaits struct {
	look chan struct{} // capacity 1: a signal was sent, or a process ended

	mu     sync.Mutex
	mounts []int // O_PATH descriptors of the mounts' roots, guarded by mu
}

const (
	// lookEvery is how often threads are looked at if nothing gives a reason to:
	// programs send signals to each other.
	lookEvery = 2 * time.Second
	// lookPause lets a signal arrive, and joins looks of many reasons.
	lookPause = 20 * time.Millisecond
	// tellWait bounds the wait for a file server that does not answer.
	tellWait = time.Second
)

func newLockWaits() *lockWaits { return &lockWaits{look: make(chan struct{}, 1)} }

// add takes in the mount at path. Guests lock on the host on writable mounts only.
func (w *lockWaits) add(path string) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		logf("agent: locks of %s: %v", path, err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mounts = append(w.mounts, fd)
}

// close lets go of the mounts, which could not be unmounted otherwise.
func (w *lockWaits) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, fd := range w.mounts {
		_ = unix.Close(fd)
	}
	w.mounts = nil
}

// soon has the threads looked at.
func (w *lockWaits) soon() {
	if w == nil {
		return
	}
	select {
	case w.look <- struct{}{}:
	default:
	}
}

// watch looks for as long as the agent lives, if there is anything to look for.
func (w *lockWaits) watch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.mounts) == 0 {
		return
	}
	go func() {
		tick := time.NewTicker(lookEvery)
		defer tick.Stop()
		for {
			select {
			case <-w.look:
				time.Sleep(lookPause)
			case <-tick.C:
			}
			if threads := signalled("/proc"); len(threads) > 0 {
				w.tell(strings.Join(threads, " "))
			}
		}
	}()
}

// stop ends all waits, now and later: programs are about to be killed.
func (w *lockWaits) stop() { w.tell("stop") }

// tell says something to every file server. It waits for their answers, but not
// for long.
func (w *lockWaits) tell(value string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var told sync.WaitGroup
	for _, fd := range w.mounts {
		path := "/proc/self/fd/" + strconv.Itoa(fd)
		told.Go(func() {
			if err := unix.Setxattr(path, agentproto.EndWaitsAttr, []byte(value), 0); err != nil {
				logf("agent: end waits for locks: %v", err)
			}
		})
	}
	done := make(chan struct{})
	go func() { told.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(tellWait):
	}
}

// maxThreads bounds what one look tells: the value of an attribute has 64 KiB.
const maxThreads = 4096

// signalled lists the threads below proc that sleep without noticing signals
// and have one to attend to, as decimal numbers.
func signalled(proc string) (threads []string) {
	list, err := os.ReadDir(proc)
	if err != nil {
		return nil
	}
	for _, p := range list {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		tasks, err := os.ReadDir(proc + "/" + p.Name() + "/task")
		if err != nil {
			continue // it has ended
		}
		for _, t := range tasks {
			b, err := os.ReadFile(proc + "/" + p.Name() + "/task/" + t.Name() + "/status")
			if err == nil && len(threads) < maxThreads && mustAttend(string(b), t.Name() == p.Name()) {
				threads = append(threads, t.Name())
			}
		}
	}
	return threads
}

// mustAttend judges a thread by its status file. A signal for the whole process
// is given to its first thread, if that does not block it; SIGKILL is in the
// thread's own set once it is to die.
func mustAttend(status string, first bool) bool {
	var state string
	set := map[string]uint64{}
	for _, line := range strings.Split(status, "\n") {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "State":
			state, _, _ = strings.Cut(value, " ")
		case "SigPnd", "ShdPnd", "SigBlk":
			set[name], _ = strconv.ParseUint(value, 16, 64)
		}
	}
	pending := set["SigPnd"]
	if first {
		pending |= set["ShdPnd"]
	}
	return state == "D" && pending&^set["SigBlk"] != 0
}
