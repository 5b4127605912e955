package volstore

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// slots is the number of flock files that all names share.
const slots = 64

// nameMutex is the in-process half of a name's lock.
type nameMutex struct {
	turn  chan struct{} // holds one token
	users int           // holders and waiters; guarded by Store.mu
}

// nameLock is the lock on one or two names: in-process mutexes and the flocks
// of their slots.
type nameLock struct {
	s     *Store
	names []string   // whose mutex is held, ascending
	slots []int      // whose flock is held, ascending
	files []*os.File // open slots
}

func slotOf(name string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	return int(h.Sum32() % slots)
}

// holdNames takes the in-process mutexes only; lockSlots completes the lock.
func (s *Store) holdNames(ctx context.Context, names ...string) (*nameLock, error) {
	slices.Sort(names)
	l := &nameLock{s: s}
	for _, name := range slices.Compact(names) {
		m := s.mutexOf(name)
		select {
		case <-m.turn:
			l.names = append(l.names, name)
		case <-ctx.Done():
			s.dropMutex(name)
			l.unlock()
			return nil, ctx.Err()
		}
	}
	return l, nil
}

// lockNames takes the whole lock of one or two names, waiting until ctx ends.
func (s *Store) lockNames(ctx context.Context, names ...string) (*nameLock, error) {
	l, err := s.holdNames(ctx, names...)
	if err != nil {
		return nil, err
	}
	if err := l.lockSlots(ctx); err != nil {
		l.unlock()
		return nil, err
	}
	return l, nil
}

// lockSlots takes the flocks.
func (l *nameLock) lockSlots(ctx context.Context) error {
	want := make([]int, len(l.names))
	for i, name := range l.names {
		want[i] = slotOf(name)
	}
	slices.Sort(want)
	for _, slot := range slices.Compact(want) {
		f, err := l.s.openSlot(slot)
		if err != nil {
			return err
		}
		l.files = append(l.files, f)
		if err := waitFlock(ctx, f); err != nil {
			return err
		}
		l.slots = append(l.slots, slot)
	}
	return nil
}

// waitFlock takes an exclusive flock, waiting until ctx ends.
func waitFlock(ctx context.Context, f *os.File) error {
	return poll(ctx, 4*time.Millisecond, func(time.Duration) (bool, error) {
		ok, err := tryFlock(f, unix.LOCK_EX)
		return ok || err != nil, err
	})
}

// poll calls try until it is done or ctx ends, with pauses that grow up to about
// most: a kernel lock that is waited for could not be given up. It says how long
// it has been at it.
func poll(ctx context.Context, most time.Duration, try func(waited time.Duration) (done bool, err error)) error {
	began := time.Now()
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, most) {
		if done, err := try(time.Since(began)); done {
			return err
		}
		// A random part keeps waiters from meeting again and again.
		timer := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
	}
}

func (s *Store) openSlot(slot int) (*os.File, error) {
	path := filepath.Join(s.home.NameLocks(), fmt.Sprintf("%02x", slot))
	f, err := openFile(path, unix.O_RDWR|unix.O_CREAT)
	if errors.Is(err, os.ErrNotExist) {
		if err := s.home.Ensure(); err != nil {
			return nil, err
		}
		return openFile(path, unix.O_RDWR|unix.O_CREAT)
	}
	return f, err
}

// also reports whether name's lock could be had without waiting, while l is
// held, and returns what releases it again.
func (l *nameLock) also(name string) (release func(), ok bool) {
	if slices.Contains(l.names, name) {
		return func() {}, true
	}
	other, ok := l.s.tryName(name, l.slots)
	if !ok {
		return nil, false
	}
	return other.unlock, true
}

// tryName takes the whole lock of a name if that needs no waiting. Slots that the
// caller holds are left alone.
func (s *Store) tryName(name string, held []int) (l *nameLock, ok bool) {
	m := s.mutexOf(name)
	select {
	case <-m.turn:
	default:
		s.dropMutex(name)
		return nil, false
	}
	l = &nameLock{s: s, names: []string{name}}
	slot := slotOf(name)
	if slices.Contains(held, slot) {
		return l, true
	}
	f, err := s.openSlot(slot)
	if err == nil {
		l.files = []*os.File{f}
		ok, err = tryFlock(f, unix.LOCK_EX)
	}
	if err != nil || !ok {
		l.unlock()
		return nil, false
	}
	l.slots = []int{slot}
	return l, true
}

// unlock releases everything; a second call does nothing.
func (l *nameLock) unlock() {
	for _, f := range l.files {
		unlock(f)
	}
	for _, name := range l.names {
		l.s.mutexHeld(name).turn <- struct{}{}
		l.s.dropMutex(name)
	}
	l.files, l.slots, l.names = nil, nil, nil
}

func (s *Store) mutexOf(name string) *nameMutex {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.names[name]
	if m == nil {
		m = &nameMutex{turn: make(chan struct{}, 1)}
		m.turn <- struct{}{}
		s.names[name] = m
	}
	m.users++
	return m
}

func (s *Store) mutexHeld(name string) *nameMutex {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names[name]
}

func (s *Store) dropMutex(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.names[name]; m.users > 1 {
		m.users--
	} else {
		delete(s.names, name)
	}
}
