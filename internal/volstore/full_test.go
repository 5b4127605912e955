package volstore

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

const somebody = storetest.Somebody

// smallHome is a home on a small file system, worked on by one user.
type smallHome struct {
	home.Dir
	dir string // where the file system is mounted
	uid int
}

// run runs an operation as the home's user and returns what it said.
func (h smallHome) run(op string) (string, error) {
	cmd := h.command(op)
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (h smallHome) command(op string) *exec.Cmd {
	cmd := child(h.Dir, op, "")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if h.uid != os.Getuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(h.uid), Gid: uint32(h.uid)}
	}
	return cmd
}

func (h smallHome) must(t testing.TB, op string) string {
	t.Helper()
	out, err := h.run(op)
	if err != nil {
		t.Fatalf("%s: %v\n%s", op, err, out)
	}
	return out
}

func (h smallHome) filler() string { return filepath.Join(h.dir, "filler") }

// leave fills the file system but for some blocks.
func (h smallHome) leave(t testing.TB, blocks int64) {
	t.Helper()
	f, err := os.OpenFile(h.filler(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fillUp(f)
	if fi, err := f.Stat(); err != nil || f.Truncate(fi.Size()-blocks*4096) != nil || f.Sync() != nil {
		t.Fatal("cannot leave blocks free")
	}
}

// fillUp appends until nothing fits any more.
func fillUp(f *os.File) {
	for size := 1 << 20; size > 0; {
		if n, err := f.Write(make([]byte, size)); err != nil && n == 0 {
			size /= 2
		}
	}
}

// smallHomes mounts small file systems of each kind, for each kind of user.
func smallHomes(t *testing.T, test func(t *testing.T, h smallHome)) {
	users := []int{os.Getuid()}
	inner, err := os.ReadFile("/proc/self/uid_map")
	if root := err == nil && len(strings.Fields(string(inner))) == 3 && strings.Fields(string(inner))[2] != "1"; root {
		users = append(users, somebody) // a root that is more than one user
	}
	for _, kind := range []string{"tmpfs", "ext4"} {
		for _, uid := range users {
			t.Run(fmt.Sprintf("%s/uid %d", kind, uid), func(t *testing.T) {
				if kind == "ext4" {
					prereq.Root(t, "mount ext4")
				}
				dir := ""
				if kind == "tmpfs" {
					dir = storetest.Tmpfs(t, "24m")
				} else {
					dir = storetest.Ext4(t, "-m", "0")
				}
				if err := errors.Join(os.Chown(dir, uid, uid), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
					t.Fatal(err)
				}
				test(t, smallHome{home.Dir(filepath.Join(dir, "home")), dir, uid})
			})
		}
	}
}

// fullOps are the operations that need space, each with volumes of its own; undo
// makes room for another attempt.
var fullOps = []struct {
	op, undo string
	disk     bool
}{
	{"create new", "remove new", false},
	{"create-disk disk", "remove disk", true},
	{"rename v1 w1", "rename w1 v1", false},
	{"label v2", "label-back v2", false},
	{"adopt stranger", "", false},
	{"grow d", "", true},
	{"attach d", "", true},
	{"prune only v3", "", false},
	{"remove v4", "", false},
}

// TestFullDisk: with any number of free blocks, from none to enough, every
// operation succeeds or says that the disk is full and leaves everything as it
// was; at 0 bytes free everything can be listed and removed, also while another
// process takes every block that is freed.
func TestFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	needMkfs(t)
	smallHomes(t, func(t *testing.T, h smallHome) {
		h.must(t, "seed 20")
		for _, op := range fullOps {
			refused := 0
			for free := int64(0); ; free++ {
				h.leave(t, free)
				out, err := h.run(op.op)
				check, checkErr := h.run("check")
				if checkErr != nil {
					t.Fatalf("%s with %d blocks free (%v, %s): %v\n%s", op.op, free, err, out, checkErr, check)
				}
				if err == nil {
					break
				}
				refused++
				if !strings.Contains(out, "no space left on device") || free > 2000 {
					t.Fatalf("%s with %d blocks free: %v\n%s", op.op, free, err, out)
				}
			}
			t.Logf("%s: refused %d times", op.op, refused)
			if op.undo != "" {
				h.must(t, op.undo) // needs no space
			}
		}
		h.underPressure(t)
	})
}

// underPressure removes everything while an eater takes what becomes free.
func (h smallHome) underPressure(t *testing.T) {
	t.Helper()
	h.leave(t, 0)
	eater := h.command("eat " + filepath.Join(h.dir, "home", "eaten"))
	eater.Stderr = os.Stderr
	stdin, err := eater.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := eater.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := eater.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stdin.Close(); _ = eater.Wait() }()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "full\n" {
		t.Fatalf("the eater said %q, %v", line, err)
	}
	names := strings.Fields(h.must(t, "ls-names"))
	if len(names) < 15 {
		t.Fatalf("only %d volumes are left: %q", len(names), names)
	}
	for i, name := range names {
		if got := strings.Fields(h.must(t, "ls-names")); len(got) != len(names)-i {
			t.Fatalf("%d volumes listed, want %d", len(got), len(names)-i)
		}
		h.must(t, "get "+name)
		if out, err := h.run("create greedy"); err == nil {
			h.must(t, "remove greedy")
		} else if !strings.Contains(out, "no space left on device") {
			t.Errorf("create under pressure: %v\n%s", err, out)
		}
		h.must(t, "remove "+name)
		h.must(t, "check")
	}
}

// eat appends to a file whenever there is space, until stdin ends.
func eat(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(path)
	fillUp(f)
	fmt.Println("full")
	ended := make(chan struct{})
	go func() { _, _ = os.Stdin.Read(make([]byte, 1)); close(ended) }()
	block := make([]byte, 4096)
	for pause := time.NewTicker(50 * time.Microsecond); ; {
		for n, err := 1, error(nil); n > 0 && err == nil; {
			n, err = f.Write(block)
		}
		select {
		case <-ended:
			return nil
		case <-pause.C:
		}
	}
}

// seedSmall makes volumes v0, v1 ... with a file each, a disk volume and a stranger.
func seedSmall(s *Store, n int) error {
	var errs []error
	for i := range n {
		v, err := s.Create(context.Background(), Spec{Name: fmt.Sprint("v", i), Labels: map[string]string{"only": fmt.Sprint("v", i)}})
		if err != nil {
			return err
		}
		errs = append(errs, os.WriteFile(filepath.Join(v.Path, marker), []byte(v.Name), 0o600))
	}
	_, err := s.Create(context.Background(), Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	stranger := s.home.Volume("stranger")
	return errors.Join(append(errs, err, os.Mkdir(stranger, 0o700), os.WriteFile(filepath.Join(stranger, "foreign"), []byte("y"), 0o600))...)
}

// checkSmall demands that a home agrees and that no volume has lost its file.
func checkSmall(s *Store) error {
	found, err := s.Check(context.Background())
	if err != nil {
		return err
	}
	for _, f := range found {
		if f.Kind != FoundStranger || f.Name != "stranger" {
			return fmt.Errorf("%+v", f)
		}
	}
	all, err := s.List(context.Background(), Filter{})
	if err != nil {
		return err
	}
	for _, v := range all {
		want, seeded := v.Labels["only"]
		if got, err := os.ReadFile(filepath.Join(v.Path, marker)); seeded && !bytes.Equal(got, []byte(want)) {
			return fmt.Errorf("the file of %s is %q, %v", v.Name, got, err)
		}
	}
	return nil
}

func TestReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	h := home.Dir(t.TempDir())
	v := mustCreate(t, New(h), Spec{Name: "a"})
	storetest.MakeReadonly(t, string(h))
	s := New(h)
	if all, err := s.List(t.Context(), Filter{}); err != nil || len(all) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
	d, err := s.OpenData(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Alive(); err != nil {
		t.Error(err)
	}
	var e *errdefs.Error
	for name, err := range map[string]error{"create": second(s.Create(t.Context(), Spec{Name: "b"})), "remove": s.Remove(t.Context(), "a")} {
		if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
}
