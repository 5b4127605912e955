package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/bench/machine"
	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/fuseclient"
)

// figures measures what is not a ratio to C virtiofsd, each on fresh servers.
func (b *bench) figures(r *report) error {
	if !b.o.rows.MatchString("figures") {
		if b.o.rows.MatchString("quota") {
			return b.quota(r)
		}
		return nil
	}
	for _, f := range []func(*report) error{b.overlay, b.kicks, b.allocations, b.quota, b.idleAndMemory} {
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) ours(kind string) (*server, error) {
	return launch("figure-"+kind, b.o.dir, b.argv(kind))
}

// overlay compares GETATTR of a file with virtual owner and mode, cached, with
// a plain one, in alternating rounds.
func (b *bench) overlay(r *report) (err error) {
	plain, err := b.ours("off")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.stop()) }()
	virt, err := b.ours("strict")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, virt.stop()) }()
	node, err := virt.walk("known", "file-000")
	if err != nil {
		return err
	}
	if _, err := virt.fs.Setattr(node, fusewire.SetattrIn{Valid: fusewire.FattrMode | fusewire.FattrUID, Mode: 0o100640, UID: 1000}); err != nil {
		return fmt.Errorf("SETATTR of an overlay: %w", err)
	}
	row := row{Depth: 64, load: getattr}
	var a, c []float64
	for range b.o.rounds {
		for _, s := range []struct {
			s  *server
			to *[]float64
		}{{plain, &a}, {virt, &c}} {
			one, err := b.round(s.s, row)
			if err != nil {
				return err
			}
			*s.to = append(*s.to, one.cpuPerOp())
		}
	}
	med, best := ratios(a, c, slices.Min[[]float64])
	r.Figures = append(r.Figures, figure{
		Name: "getattr with overlay, warm, CPU to plain", Must: "≤ 1.15x",
		Value: fmt.Sprintf("%.2fx (best %.2fx)", med, best), OK: med <= 1.15 || best <= 1.15,
	})
	return nil
}

// kicks counts kicks per operation at depth 1.
func (b *bench) kicks(r *report) (err error) {
	s, err := b.ours("off")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	var per []float64
	for range b.o.rounds {
		one, err := b.round(s, row{Depth: 1, load: getattr})
		if err != nil {
			return err
		}
		per = append(per, float64(one.Kicks)/float64(one.Ops))
	}
	r.Figures = append(r.Figures, figure{
		Name: "kicks per getattr d1", Must: "≤ 0.5",
		Value: fmt.Sprintf("%.2f (%.2f-%.2f)", machine.Median(per), slices.Min(per), slices.Max(per)),
		OK:    machine.Median(per) <= 0.5 || slices.Min(per) <= 0.5,
	})
	return nil
}

// allocations counts heap allocations per request of a server in this process
// in its steady state.
func (b *bench) allocations(r *report) (err error) {
	s, stop, err := inProcess(b.tree)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	for _, row := range allRows() {
		if !slices.Contains([]string{"getattr d64", "lookup known d64", "read 4K d64", "write 4K d64"}, row.Name) {
			continue
		}
		if _, err := b.round(s, row); err != nil { // let everything grow to its size
			return err
		}
		p, err := row.load(s, row.Depth)
		if err != nil {
			return err
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		one, err := play(s, p, row.Depth, b.o.each)
		runtime.ReadMemStats(&after)
		if err := errors.Join(err, p.close()); err != nil {
			return err
		}
		per := float64(after.Mallocs-before.Mallocs) / float64(one.Ops)
		r.Figures = append(r.Figures, figure{
			Name: "allocations per request, " + row.Name, Must: "0",
			Value: fmt.Sprintf("%.4f", per), OK: per < 0.01,
		})
	}
	return nil
}

// inProcess starts our server in this process.
func inProcess(tree string) (*server, func() error, error) {
	root, err := unix.Open(tree, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(root)
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(proc)
	h, err := fuseserver.New(fuseserver.Config{Root: root, ProcSelfFd: proc, StatVirt: "off", AsRoot: true})
	if err != nil {
		return nil, nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "vhost-user socket")
		if conns[i], err = vhostuser.FileConn(f); err != nil {
			return nil, nil, err
		}
		_ = f.Close()
	}
	result := make(chan error, 1)
	go func() { result <- vhostuser.Serve(context.Background(), conns[1], h, vhostuser.Options{}) }()
	s := &server{name: "in process", pid: os.Getpid()}
	if s.c, err = frontend.Connect(conns[0], frontend.Options{MemMiB: 160}); err != nil {
		return nil, nil, err
	}
	if s.fs, err = fuseclient.Mount(s.c); err != nil {
		return nil, nil, err
	}
	return s, func() error { return errors.Join(s.c.Close(), <-result, h.Close()) }, nil
}

// idleAndMemory looks at a server that was busy and then has nothing to do.
func (b *bench) idleAndMemory(r *report) (err error) {
	s, err := b.ours("strict")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if _, err := b.round(s, row{Depth: 64, load: getattr}); err != nil {
		return err
	}
	empty := s.rss()
	dir, err := s.walk("many")
	if err != nil {
		return err
	}
	for i := range dirFiles {
		if _, err := s.fs.Lookup(dir, manyName(i)); err != nil {
			return fmt.Errorf("lookup %s: %w", filepath.Join("many", manyName(i)), err)
		}
	}
	full := s.rss()
	perInode := float64(max(full-empty, 0)) / dirFiles
	r.Figures = append(r.Figures, figure{
		Name: "memory, RSS without guest memory", Must: "≤ 20 MiB + 200 B per live inode",
		Value: fmt.Sprintf("%.1f MiB; with %d inodes %.1f MiB, %.0f B each", float64(empty)/(1<<20), dirFiles, float64(full)/(1<<20), perInode),
		OK:    full <= 20<<20+200*dirFiles,
	})
	return b.idle(r, s)
}

// idle counts wake-ups once the server has come to rest.
func (b *bench) idle(r *report, s *server) error {
	const span = 2 * time.Second
	time.Sleep(span) // what the run before left behind: timers, the collector
	before := s.wakeups()
	time.Sleep(span)
	per := float64(s.wakeups()-before) / span.Seconds()
	r.Figures = append(r.Figures, figure{
		Name: "wake-ups per second when idle", Must: "0", Value: fmt.Sprintf("%.1f", per), OK: per == 0,
	})
	return nil
}
