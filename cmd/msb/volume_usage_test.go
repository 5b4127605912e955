package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// TestUsageIsRead: of a volume of 200 000 files, inspect and ls tell what it uses
// without one system call that names the volume's directory or anything in it,
// and opening its ledger for a sandbox reads no directory.
func TestUsageIsRead(t *testing.T) {
	strace := prereq.Program(t, "strace", "strace")
	const files = 200_000
	h := home.Dir(filepath.Join(storetest.Memory(t), "home"))
	s := volstore.New(h)
	defer s.Close()
	v, err := s.Create(context.Background(), volstore.Spec{Name: "big"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range files {
		dir := filepath.Join(v.Path, fmt.Sprint(i/1000))
		if i%1000 == 0 {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := s.Recount(context.Background(), v.ID)
	if err != nil || c.Found.Inodes != files+files/1000 {
		t.Fatalf("recount: %+v, %v", c, err)
	}
	msb := filepath.Join(t.TempDir(), "msb")
	if self, err := os.Executable(); err != nil || os.Symlink(self, msb) != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		args []string
		want string
		deny func(call string) bool
	}{
		"inspect": {[]string{"volume", "inspect", "big", "--format", "json"}, fmt.Sprint(`"used_bytes": `, c.Found.Bytes), namesVolume},
		"ls":      {[]string{"volume", "ls", "--usage", "--format", "json"}, fmt.Sprint(`"used_bytes": `, c.Found.Bytes), namesVolume},
		"attach":  {[]string{"volume", "set-quota", "big", "20G"}, "20GiB", readsDirectory},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "calls")
			cmd := exec.Command(strace, append([]string{"-f", "-y", "-qq", "-s", "4096", "-e", "signal=none", "-o", log, msb}, tt.args...)...)
			cmd.Env = append(os.Environ(), home.EnvVar+"="+string(h))
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tt.want) {
				t.Fatalf("%v\n%s", err, out)
			}
			calls, err := os.ReadFile(log)
			if err != nil || len(calls) == 0 {
				t.Fatal("no calls", err)
			}
			for call := range strings.Lines(string(calls)) {
				if tt.deny(call) {
					t.Errorf("%.200s", call)
				}
			}
		})
	}
}

// namesVolume: output may name the volume, nothing else may.
func namesVolume(call string) bool {
	return strings.Contains(call, "/volumes/big") && !strings.Contains(call, " write(1<")
}

func readsDirectory(call string) bool {
	return strings.Contains(call, " getdents") && strings.Contains(call, "/volumes/big") || strings.Contains(call, "/volumes/big/")
}
