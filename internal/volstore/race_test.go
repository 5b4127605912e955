package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// withPoint runs fn with an action at a fail point of this process.
func withPoint(t testing.TB, name string, act func() error, fn func()) {
	t.Helper()
	defer failpoint.Arm(name, act)()
	fn()
}

// churn creates and removes one name, with others doing the same: the only
// errors are that somebody else was faster.
func churn(ctx context.Context, s *Store, name string, n int) error {
	for range n {
		if _, err := s.Create(ctx, Spec{Name: name}); err != nil && !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
			return err
		}
		if err := s.Remove(ctx, name); err != nil && !errdefs.Is(err, errdefs.VolumeNotFound) {
			return err
		}
	}
	return nil
}

// TestProcessesOnOneName: four processes create, remove and recreate one name,
// 500 times each, while a stranger's directory comes to the name and goes.
func TestProcessesOnOneName(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "other"})
	n := 500
	if testing.Short() {
		n = 20
	}
	stop, visits := make(chan struct{}), make(chan int)
	go func() { visits <- visit(t, h, "a", stop) }()
	within(t, 4*time.Minute, func() {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				if out, err := child(h, fmt.Sprint("churn a ", n), "").CombinedOutput(); err != nil {
					t.Errorf("child: %v\n%s", err, out)
				}
			})
		}
		wg.Wait()
	})
	close(stop)
	if v := <-visits; v == 0 {
		t.Error("the stranger never found the name free")
	} else {
		t.Logf("the stranger came %d times", v)
	}
	_ = s.Remove(t.Context(), "a")
	mustCreate(t, s, Spec{Name: "a"})
}

// visit puts a stranger's directory at a name whenever it is free and takes it
// away again, until stop; it demands that it is the same then. It returns how
// often it was there.
func visit(t testing.TB, h home.Dir, name string, stop chan struct{}) (visits int) {
	stranger := filepath.Join(filepath.Dir(string(h.Volumes())), "stranger")
	if err := errors.Join(os.Mkdir(stranger, 0o755), os.WriteFile(filepath.Join(stranger, "foreign"), []byte("y"), 0o640)); err != nil {
		t.Error(err)
		return 0
	}
	was := portrait(t, stranger)
	for pause := time.NewTicker(3 * time.Millisecond); ; {
		select {
		case <-stop:
			return visits
		case <-pause.C:
		}
		if renameNew(stranger, h.Volume(name)) != nil {
			continue
		}
		visits++
		<-pause.C
		if now := portrait(t, h.Volume(name)); now != was {
			t.Errorf("the stranger at %s was touched: it is\n%sand was\n%s", name, now, was)
		}
		if err := renameNew(h.Volume(name), stranger); err != nil {
			t.Error(err)
			return visits
		}
	}
}

func TestProcessesOnAColdHome(t *testing.T) {
	h := home.Dir(filepath.Join(t.TempDir(), "home"))
	within(t, 2*time.Minute, func() {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				if out, err := child(h, fmt.Sprintf("many p%d- 50", i), "").CombinedOutput(); err != nil {
					t.Errorf("child: %v\n%s", err, out)
				}
			})
		}
		wg.Wait()
	})
	s := New(h)
	defer s.Close()
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 400 {
		t.Errorf("%d volumes, %v", len(all), err)
	}
	checkHome(t, s)
}

func TestThousandCallersOfOneName(t *testing.T) {
	s, _ := newStore(t)
	mustCreate(t, s, Spec{Name: "other"})
	start := time.Now()
	var won atomic.Int32
	within(t, time.Minute, func() {
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				_, err := s.Create(context.Background(), Spec{Name: "a"})
				if err == nil {
					won.Add(1)
				} else if !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	if won.Load() != 1 {
		t.Errorf("%d winners", won.Load())
	}
	t.Logf("1000 callers in %v", time.Since(start))
}

func TestRenameAgainstRename(t *testing.T) {
	s, h := newStore(t)
	other := New(h)
	defer other.Close()
	ctx := context.Background()
	within(t, time.Minute, func() {
		for i := range 60 {
			mustCreate(t, s, Spec{Name: "a"})
			if i%2 == 0 { // both exist: nobody may win; only a: one may
				mustCreate(t, s, Spec{Name: "b"})
			}
			done := make(chan error)
			go func() { _, err := other.Rename(ctx, "b", "a"); done <- err }()
			_, errAB := s.Rename(ctx, "a", "b")
			errBA := <-done
			if i%2 == 0 && (errAB == nil || errBA == nil) {
				t.Errorf("both exist: a to b: %v, b to a: %v", errAB, errBA)
			}
			if i%2 == 1 && errAB != nil {
				t.Errorf("only a exists: %v", errAB)
			}
			all, err := s.List(ctx, Filter{})
			if err != nil || len(all) != 2-i%2 {
				t.Fatalf("%d volumes, %v", len(all), err)
			}
			for _, v := range all {
				if err := s.RemoveID(ctx, v.ID); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
