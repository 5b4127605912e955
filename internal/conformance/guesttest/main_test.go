package guesttest

import (
	"bufio"
	"fmt"
	"os"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/conformance"
)

// commands are what the binary does when its first argument names one.
var commands = map[string]func(args []string) error{
	"appends":  appends,
	"digest":   digest,
	"exchange": exchange,
	"mappings": mappings,
	"swap":     swap,
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		if err := commands[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// digest prints the digest list of a tree.
func digest(args []string) error {
	entries, err := conformance.Scan(args[0])
	if err != nil {
		return err
	}
	w := bufio.NewWriter(os.Stdout)
	for _, line := range conformance.Digest(entries) {
		fmt.Fprintln(w, line)
	}
	return w.Flush()
}

// workDir returns an empty directory for a test, which is removed at its end.
func workDir(t *testing.T) string {
	t.Helper()
	base := os.Getenv(DirEnv)
	if base == "" {
		t.Skipf("%s is not set: this runs in a guest, started by package conformance", DirEnv)
	}
	d, err := os.MkdirTemp(base, "t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d); err != nil {
			t.Error(err)
		}
	})
	return d
}
