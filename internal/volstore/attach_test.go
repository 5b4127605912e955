package volstore

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

func TestAttach(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	v := mustCreate(t, s, Spec{Name: "a"})
	one, err := s.Attach(ctx, "a", Shared, Holder{Sandbox: "one", PID: 11})
	if err != nil {
		t.Fatal(err)
	}
	two, err := s.AttachID(ctx, v.ID, Shared, Holder{Sandbox: "two", PID: 22, Readonly: true})
	if err != nil {
		t.Fatal(err)
	}
	hs, err := s.Holders(ctx, v.ID)
	if err != nil || len(hs) != 2 || hs[0].Sandbox != "one" || hs[1].PID != 22 || !hs[1].Readonly || time.Since(hs[0].Since) > time.Minute {
		t.Errorf("holders %+v, %v", hs, err)
	}
	for name, err := range map[string]error{
		"remove": s.Remove(ctx, "a"), "rename": second(s.Rename(ctx, "a", "b")), "exclusive": second(s.Attach(ctx, "a", Exclusive, Holder{})),
	} {
		if !errdefs.Is(err, errdefs.InvalidConfig) || !errors.Is(err, errdefs.ErrVolumeInUse) || !strings.Contains(err.Error(), `sandbox "one"`) || !strings.Contains(err.Error(), `sandbox "two"`) {
			t.Errorf("%s while attached: %v", name, err)
		}
	}
	one.Close()
	if hs, err := s.Holders(ctx, v.ID); err != nil || len(hs) != 1 || hs[0].Sandbox != "two" {
		t.Errorf("holders after one left: %+v, %v", hs, err)
	}
	two.Close()
	three, err := s.Attach(ctx, "a", Exclusive, Holder{Sandbox: "three"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(ctx, "a", Shared, Holder{}); !errors.Is(err, errdefs.ErrVolumeInUse) || !strings.Contains(err.Error(), "three") {
		t.Errorf("shared beside exclusive: %v", err)
	}
	three.Close()
	if err := s.Remove(ctx, "a"); err != nil {
		t.Error(err)
	}
	if _, err := s.Attach(ctx, "a", Shared, Holder{}); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("attach after removal: %v", err)
	}
}

func TestAttachDisk(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	ctx := t.Context()
	mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	one, err := s.Attach(ctx, "d", Shared, Holder{Sandbox: "one", Readonly: true})
	if err != nil {
		t.Fatal(err)
	}
	two, err := s.Attach(ctx, "d", Shared, Holder{Sandbox: "two", Readonly: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.Disk.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a read-only attachment can write")
	}
	two.Close()
	one.Close()
	w, err := s.Attach(ctx, "d", Exclusive, Holder{Sandbox: "w"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Disk.WriteAt([]byte{0}, 0); err != nil {
		t.Error(err)
	}
}

// TestOrphanedAttachment: what a killed holder left behind is waited for, a
// living holder is not.
func TestOrphanedAttachment(t *testing.T) {
	needMkfs(t)
	ended := exec.Command("/bin/true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	for name, spec := range map[string]Spec{"directory": {Name: "a"}, "disk": {Name: "a", Kind: KindDisk, SizeMiB: 4}} {
		t.Run(name, func(t *testing.T) {
			s, _ := newStore(t)
			mustCreate(t, s, spec)
			living, err := s.Attach(t.Context(), "a", Exclusive, Holder{Sandbox: "box", PID: os.Getpid(), Readonly: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Remove(t.Context(), "a"); !errors.Is(err, errdefs.ErrVolumeInUse) {
				t.Errorf("remove while held: %v", err)
			}
			living.Close()
			dead, err := s.Attach(t.Context(), "a", Exclusive, Holder{Sandbox: "box", PID: ended.Process.Pid})
			if err != nil {
				t.Fatal(err)
			}
			heir := exec.Command("/bin/sleep", "0.3")
			heir.ExtraFiles = []*os.File{dead.Inherit()}
			if dead.Disk != nil { // closed after the lock, as an exiting process does
				heir = exec.Command("/bin/sh", "-c", "sleep 0.2; exec 3>&-; exec sleep 0.2")
				heir.ExtraFiles = []*os.File{dead.Inherit(), dead.Disk}
			}
			if err := heir.Start(); err != nil {
				t.Fatal(err)
			}
			dead.Close()
			if err := s.Remove(t.Context(), "a"); err != nil {
				t.Errorf("remove after the holder's end: %v", err)
			}
			if err := heir.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAttachmentOutlivesItsMaker: the lock is inherited, with the holder's name,
// and ends with the last process that has it.
func TestAttachmentOutlivesItsMaker(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	a, err := s.Attach(t.Context(), "a", Shared, Holder{Sandbox: "box"})
	if err != nil {
		t.Fatal(err)
	}
	heir := exec.Command("/bin/cat")
	heir.ExtraFiles = []*os.File{a.Inherit()}
	stdin, err := heir.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := heir.Start(); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if hs, err := s.Holders(t.Context(), v.ID); err != nil || len(hs) != 1 || hs[0].Sandbox != "box" {
		t.Errorf("holders with an heir: %+v, %v", hs, err)
	}
	if err := s.Remove(t.Context(), "a"); !errors.Is(err, errdefs.ErrVolumeInUse) {
		t.Errorf("remove with an heir: %v", err)
	}
	stdin.Close()
	_ = heir.Wait()
	if hs, err := s.Holders(t.Context(), v.ID); err != nil || len(hs) != 0 {
		t.Errorf("holders after the end: %+v, %v", hs, err)
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// TestCloseWhileForking: a closed attachment is gone although children are being
// started meanwhile, which have every descriptor until their exec.
func TestCloseWhileForking(t *testing.T) {
	s, _ := newStore(t)
	mustCreate(t, s, Spec{Name: "a"})
	stop := make(chan struct{})
	var forking sync.WaitGroup
	for range 4 {
		forking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := exec.Command("/bin/true").Run(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 300 {
		a, err := s.Attach(t.Context(), "a", Exclusive, Holder{PID: os.Getpid()})
		if err != nil {
			t.Error(err)
			break
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	forking.Wait()
}

// TestAttachmentOfAKilledProcess is free at once, whatever its record says.
func TestAttachmentOfAKilledProcess(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	cmd := child(h, "hold a", "")
	stdin, _ := cmd.StdinPipe()
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "held\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	if hs, err := s.Holders(t.Context(), v.ID); err != nil || len(hs) != 1 || hs[0].PID != cmd.Process.Pid {
		t.Errorf("holders: %+v, %v", hs, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if hs, err := s.Holders(t.Context(), v.ID); err != nil || len(hs) != 0 {
		t.Errorf("holders after the kill: %+v, %v", hs, err)
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// TestAttachAgainstRemove races the two; exactly one wins each time.
func TestAttachAgainstRemove(t *testing.T) {
	s, h := newStore(t)
	other := New(h)
	defer other.Close()
	ctx := context.Background()
	within(t, time.Minute, func() {
		wins := [2]int{}
		for range 200 {
			mustCreate(t, s, Spec{Name: "a"})
			removed := make(chan error)
			go func() { removed <- other.Remove(ctx, "a") }()
			a, attachErr := s.Attach(ctx, "a", Shared, Holder{Sandbox: "box"})
			removeErr := <-removed
			if (attachErr == nil) == (removeErr == nil) {
				t.Errorf("attach: %v; remove: %v", attachErr, removeErr)
			}
			if attachErr == nil {
				wins[0]++
				if _, err := os.Lstat(a.Volume.Path); err != nil {
					t.Errorf("attached without data: %v", err)
				}
				a.Close()
				if err := s.Remove(ctx, "a"); err != nil {
					t.Error(err)
				}
			} else {
				wins[1]++
			}
		}
		t.Logf("attach won %d, remove %d", wins[0], wins[1])
	})
}
