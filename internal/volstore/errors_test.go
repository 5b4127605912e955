package volstore

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestFullDiskNamesVolume: whoever runs out of space, the error says what was to
// be done with which volume.
func TestFullDiskNamesVolume(t *testing.T) {
	s := New(home.Dir("/h"))
	for name, err := range map[string]error{
		"plain":   unix.ENOSPC,
		"mkfs":    errdefs.Wrap(errdefs.IO, unix.ENOSPC, "format the disk image"),
		"records": errdefs.Wrap(errdefs.IO, unix.ENOSPC, "change the record"),
	} {
		got := s.wrap("create", "data", err)
		if !strings.HasPrefix(got.Error(), `create volume "data": no space left in /h`) || !errors.Is(got, unix.ENOSPC) || !errdefs.Is(got, errdefs.IO) {
			t.Errorf("%s: %v", name, got)
		}
	}
	var e *errdefs.Error
	if got := s.wrap("remove", "data", unix.ENOSPC); !errors.As(got, &e) || strings.Contains(e.Hint, "msb volume rm") || !strings.Contains(e.Hint, "free some space") {
		t.Errorf("a removal without space: %v, hint %q", got, e.Hint)
	}
	if got := s.wrap("create", "data", errdefs.New(errdefs.InvalidConfig, "no")); got.Error() != "no" {
		t.Errorf("another error became %v", got)
	}
}

// TestNoAccess: what cannot be read is not called "not writable".
func TestNoAccess(t *testing.T) {
	for _, tt := range []struct {
		mode       os.FileMode
		err        error
		says, hint string
	}{
		{0o700, fs.ErrPermission, "permission denied", "give yourself access"},
		{0o700, unix.EROFS, "is not writable", "MSB_HOME"},
		{0o500, fs.ErrPermission, "is not writable", "MSB_HOME"},
		{0o300, fs.ErrPermission, "is not readable", "MSB_HOME"},
		{0o600, unix.EACCES, "is not readable", "MSB_HOME"},
	} {
		dir := t.TempDir()
		if os.Getuid() == 0 {
			if err := os.Chown(dir, somebody, somebody); err != nil {
				prereq.Missing(t, "a user but root: %v", err)
			}
		}
		if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, tt.mode)); err != nil {
			t.Fatal(err)
		}
		var got error
		asSomebody(func() {
			got = New(home.Dir(dir)).wrap("get", "data", &fs.PathError{Op: "open", Path: "there", Err: tt.err})
		})
		var e *errdefs.Error
		if !errors.As(got, &e) || !strings.HasPrefix(e.Error(), `get volume "data": `) || !strings.Contains(e.Error(), tt.says) || !strings.Contains(e.Hint, tt.hint) {
			t.Errorf("%03o, %v: %v (hint %q)", tt.mode, tt.err, got, e.Hint)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

// asSomebody calls fn as an ordinary user, if it can become one, on a thread that
// ends with it.
func asSomebody(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if os.Getuid() == 0 {
			runtime.LockOSThread() // and never unlock: nobody else is to get this thread
			_, _, _ = unix.RawSyscall(unix.SYS_SETRESUID, somebody, somebody, somebody)
		}
		fn()
	}()
	<-done
}
