package home

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestOpenFile: only a file is opened; a pipe is not waited for, and nothing is
// left open.
func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	err := errors.Join(os.WriteFile(at("file"), []byte("x"), 0o600), os.Symlink("file", at("link")), os.Symlink("loop", at("loop")),
		unix.Mkfifo(at("pipe"), 0o600), os.Mkdir(at("dir"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, flags := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_RDWR | unix.O_CREAT, unix.O_WRONLY | unix.O_CREAT} {
			for name, want := range map[string]string{"file": "", "link": "a symbolic link", "loop": "a symbolic link", "pipe": "a pipe", "dir": "a directory"} {
				f, err := OpenFile(at(name), flags)
				if f != nil {
					_ = f.Close()
				}
				if want == "" && err != nil || want != "" && (!errors.Is(err, ErrNotRegular) || !strings.Contains(err.Error(), at(name)+": it is "+want)) {
					t.Errorf("%s with %#x: %v", name, flags, err)
				}
			}
		}
		for name, ok := range map[string]bool{"file": true, "link": true, "loop": false, "pipe": false, "dir": false} {
			if b, err := ReadFile(at(name)); ok != (err == nil && string(b) == "x") {
				t.Errorf("read %s: %q, %v", name, b, err)
			}
			if err := CheckRegular(at(name)); ok != (err == nil) {
				t.Errorf("check %s: %v", name, err)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("waits for a pipe")
	}
	if err := CheckRegular(at("nothing")); err != nil {
		t.Error(err)
	}
	if _, err := OpenFile(at("nothing"), unix.O_RDONLY); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestCheckHome says what is wrong with a home.
func TestCheckHome(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	err := errors.Join(os.WriteFile(at("file"), nil, 0o600), os.Symlink("loop", at("loop")), os.Symlink("gone", at("dangling")),
		os.Symlink("home", at("link")), os.Mkdir(at("home"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"file": "is no directory", "file/below": "cannot be reached", "loop": "cannot be reached", "dangling": "is a link to nothing",
		"link": "", "home": "", "nothing": "", "nothing/below": "",
	} {
		err := Dir(at(name)).Check()
		var e *errdefs.Error
		if want == "" && err != nil || want != "" && (!errors.As(err, &e) || e.Hint == "" || !strings.Contains(err.Error(), "the home "+at(name)) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

const checkVar = "MSB_TEST_HOME_TO_CHECK"

// TestMain lets the test binary check a home as another user.
func TestMain(m *testing.M) {
	if path := os.Getenv(checkVar); path != "" {
		fmt.Print(Dir(path).Check())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestHomeOfAnotherUser: the error says whose it is.
func TestHomeOfAnotherUser(t *testing.T) {
	prereq.Root(t, "be two users")
	dir := t.TempDir()
	if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"": " belongs to uid 0 and may not be used by uid 65534 (mode 0700)", "below": " cannot be reached: permission denied"} {
		path := filepath.Join(dir, name)
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), checkVar+"="+path)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		cmd.Dir = "/"
		if out, err := cmd.Output(); err != nil || string(out) != "the home "+path+want {
			t.Errorf("%s, %v", out, err)
		}
	}
}
