package volstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

const (
	childHome = "MSB_TEST_STORE_HOME"
	childOp   = "MSB_TEST_STORE_OP"
)

// TestMain lets the test binary stand in for another process: it runs one
// operation on a home and exits.
func TestMain(m *testing.M) {
	storetest.Watched()
	if h := os.Getenv(childHome); h != "" {
		if err := failpoint.ArmFromEnv(); err != nil {
			panic(err)
		}
		if err := runOp(New(home.Dir(h)), strings.Fields(os.Getenv(childOp))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is a process that runs op on a home, with fail points.
func child(h home.Dir, op, failpoints string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childHome+"="+string(h), childOp+"="+op, failpoint.EnvVar+"="+failpoints)
	return cmd
}

// runOp runs an operation written as words: "create a", "rename a b" ...
func runOp(s *Store, op []string) (err error) {
	ctx := context.Background()
	arg := func(i int) string { return op[i] }
	switch op[0] {
	case "create":
		_, err = s.Create(ctx, Spec{Name: arg(1), QuotaMiB: 7, Labels: map[string]string{"k": "v"}})
	case "create-disk":
		_, err = s.Create(ctx, Spec{Name: arg(1), Kind: KindDisk, SizeMiB: 4})
	case "remove":
		err = s.Remove(ctx, arg(1))
	case "rename":
		_, err = s.Rename(ctx, arg(1), arg(2))
	case "adopt":
		_, err = s.Adopt(ctx, arg(1), AdoptOptions{Labels: map[string]string{"k": "v"}})
	case "label":
		var v *Volume
		if v, err = s.Get(ctx, arg(1)); err == nil {
			_, err = s.SetLabels(ctx, v.ID, map[string]string{"new": "label"})
		}
	case "limit": // limit NAME: quota and inodes
		quota, inodes := uint32(9), int64(5000)
		_, err = s.SetQuota(ctx, mustID(s, arg(1)), Quota{MiB: &quota, Inodes: &inodes})
	case "count": // count NAME: open its ledger
		var f *os.File
		if f, err = s.OpenLedger(ctx, mustID(s, arg(1))); err == nil {
			err = f.Close()
		}
	case "grow":
		_, err = s.Grow(ctx, arg(1), 8)
	case "attach": // attach NAME: for writing, until the end
		s.SetChecker(func(context.Context, *Volume, *os.File) error { return nil })
		var a *Attachment
		if a, err = s.Attach(ctx, arg(1), Exclusive, Holder{Sandbox: "box", PID: os.Getpid()}); err == nil {
			err = errors.Join(a.MarkClean(), a.Close())
		}
	case "prune": // prune KEY VALUE
		_, err = s.Prune(ctx, PruneFilter{Filter: Filter{Labels: map[string]string{arg(1): arg(2)}}})
	case "repair":
		_, err = s.Repair(ctx)
	case "remove-rename-first":
		err = removeRenameFirst(ctx, s, arg(1))
	case "churn": // churn NAME COUNT: create and remove, whoever wins
		n, _ := strconv.Atoi(arg(2))
		err = churn(ctx, s, arg(1), n)
	case "many": // many PREFIX COUNT
		n, _ := strconv.Atoi(arg(2))
		for i := range n {
			if _, err := s.Create(ctx, Spec{Name: fmt.Sprint(arg(1), i)}); err != nil {
				return err
			}
		}
	case "hold": // hold NAME: attach and wait for the end of stdin
		var a *Attachment
		if a, err = s.Attach(ctx, arg(1), Shared, Holder{Sandbox: "box", PID: os.Getpid()}); err == nil {
			fmt.Println("held")
			_, _ = os.Stdin.Read(make([]byte, 1))
			err = a.Close()
		}
	case "lock": // lock DIR: until the end of stdin
		var f *os.File
		if f, err = lockDir(arg(1)); err == nil {
			fmt.Println("locked")
			_, _ = os.Stdin.Read(make([]byte, 1))
			unlock(f)
		}
	case "label-back":
		_, err = s.EditLabels(ctx, mustID(s, arg(1)), map[string]string{"only": arg(1)}, []string{"new"})
	case "get":
		_, err = s.Get(ctx, arg(1))
	case "ls-names":
		var all []*Volume
		all, err = s.List(ctx, Filter{})
		for _, v := range all {
			fmt.Println(v.Name)
		}
	case "seed": // seed COUNT
		n, _ := strconv.Atoi(arg(1))
		err = seedSmall(s, n)
	case "check":
		err = checkSmall(s)
	case "eat": // eat FILE
		err = eat(arg(1))
	case "ls":
		_, err = s.List(ctx, Filter{})
	default:
		return fmt.Errorf("unknown operation %q", op)
	}
	if err != nil {
		return err
	}
	return s.Close()
}

// mustID is the id of a volume, "" if there is none.
func mustID(s *Store, name string) string {
	v, err := s.Get(context.Background(), name)
	if err != nil {
		return ""
	}
	return v.ID
}

func newStore(t testing.TB) (*Store, home.Dir) {
	t.Helper()
	h := home.Dir(t.TempDir())
	s := New(h)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		checkHome(t, s)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, h
}

// checkHome demands that records and directories agree, after one mutating
// command has had its chance.
func checkHome(t testing.TB, s *Store) {
	t.Helper()
	found, err := s.Check(context.Background())
	if err != nil {
		t.Errorf("check: %v", err)
	}
	for _, f := range found {
		if f.Kind == FoundStranger {
			continue
		}
		t.Errorf("odd: %+v", f)
	}
}

func mustCreate(t testing.TB, s *Store, sp Spec) *Volume {
	t.Helper()
	v, err := s.Create(context.Background(), sp)
	if err != nil {
		t.Fatalf("create %s: %v", sp.Name, err)
	}
	return v
}

// within fails the test if fn takes longer than a generous limit: a hang.
func within(t testing.TB, limit time.Duration, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); fn() }()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatalf("not done after %v", limit)
	}
}
