package supervisor

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestSilentSupervisor asks one that takes no request, and has it killed: a
// process that cannot be the sandbox's supervisor is left alone.
func TestSilentSupervisor(t *testing.T) {
	h, ctx := home.Dir(t.TempDir()), context.Background()
	if err := KillSilent(ctx, h, "id", "k"); !errdefs.Is(err, errdefs.SandboxNotRunning) {
		t.Errorf("nobody listens: %v", err)
	}
	dir, err := h.EnsureRun("id")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, ControlSocket)) // by this process, which accepts nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if err := RequestStop(short, h, "id", 0); err == nil || !strings.Contains(err.Error(), ErrSilent.Error()) {
		t.Errorf("request: %v", err)
	}
	if short.Err() != nil {
		t.Error("the request took all the time there was")
	}
	if err := KillSilent(ctx, h, "id", "k"); !errdefs.Is(err, errdefs.UnsupportedOperation) || !strings.Contains(err.Error(), `"k"`) {
		t.Errorf("own process: %v", err)
	}
	lock := filepath.Join(t.TempDir(), lockName)
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := killHolder(os.Getppid(), lock); err == nil {
		t.Error("a process that does not hold the lock was killed")
	}
}
