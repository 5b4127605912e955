// Command volumes compares our volume commands and file access with the peer's:
// its CLI and its Node SDK 0.6.18 from npm, with mkfs.ext4 and with plain os
// calls, all in one run and in turns. Every bound is a ratio to the peer.
//
//	go run ./bench/volumes -out FILE
//
// It needs go, node, npm (for the first run, which installs the peer into
// build/peer), e2fsprogs and about 2 GiB in the temporary directory. What is
// missing fails.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"github.com/microsandbox-go/microsandbox/bench/machine"
)

type options struct {
	rounds  int
	batches int
	rows    *regexp.Regexp
	out     string
	peer    string
	dir     string
	msb     string
	profile string
	budget  time.Duration
	many    int
}

func main() {
	var o options
	rows := flag.String("rows", ".", "only rows whose name matches this `regexp`")
	flag.IntVar(&o.rounds, "rounds", 20, "alternating rounds of commands")
	flag.IntVar(&o.batches, "batches", 9, "alternating batches of calls")
	flag.StringVar(&o.out, "out", "", "write everything measured to this JSON `file`")
	flag.StringVar(&o.peer, "peer", "build/peer", "where the peer is, or is to be, installed")
	flag.StringVar(&o.msb, "msb", "", "our command, instead of building it")
	flag.DurationVar(&o.budget, "budget", 8*time.Second, "a row that takes longer gets fewer rounds, but at least five")
	flag.IntVar(&o.many, "many", 10000, "volumes in the homes with many")
	flag.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile of our calls")
	flag.Parse()
	var err error
	if o.rows, err = regexp.Compile(*rows); err == nil {
		err = run(&o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench/volumes:", err)
		os.Exit(1)
	}
}

// enough tells whether a row that began at start has had its rounds.
func (o *options) enough(start time.Time, round int) bool {
	return round >= 5 && time.Since(start) > o.budget
}

// installOurs builds msb and copies it, as whoever installs it does, and as npm has
// done with the peer: the linker writes by mmap, after which the page cache has the
// program in pages of 4 KiB, and a start takes a fifth longer.
func installOurs(dir string) (path string, err error) {
	built, path := filepath.Join(dir, "built"), filepath.Join(dir, "msb")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", built, "./cmd/msb")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return "", err
	}
	text, err := os.ReadFile(built)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, text, 0o755)
}

func run(o *options) (err error) {
	for _, tool := range []string{"node", "/usr/sbin/mkfs.ext4"} {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	if o.peer, err = filepath.Abs(o.peer); err != nil {
		return err
	}
	if err := installPeer(o.peer); err != nil {
		return err
	}
	if o.dir, err = os.MkdirTemp("", "bench-volumes"); err != nil {
		return err
	}
	defer os.RemoveAll(o.dir)
	if o.msb == "" {
		if o.msb, err = installOurs(o.dir); err != nil {
			return fmt.Errorf("build msb: %w", err)
		}
	}
	r := newReport(o)
	for _, part := range []func(*options, *report) error{commands, allocated, calls, callsAmongMany, lastCommands} {
		if err := part(o, r); err != nil {
			return err
		}
	}
	r.print(os.Stdout)
	if o.out != "" {
		return machine.WriteJSON(o.out, r)
	}
	return nil
}
