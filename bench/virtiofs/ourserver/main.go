// Command ourserver serves one directory to one front end, without
// confinement: the server under measurement in bench/virtiofs.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"runtime/pprof"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
)

func main() {
	socket := flag.String("socket", "", "listen here")
	dir := flag.String("dir", "", "serve this")
	statVirt := flag.String("stat-virt", "off", "strict, relaxed or off")
	book := flag.String("ledger", "", "charge what is changed to this ledger")
	profile := flag.String("cpuprofile", "", "write a CPU profile")
	flag.Parse()
	if err := run(*socket, *dir, *statVirt, *book, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "ourserver:", err)
		os.Exit(1)
	}
}

func run(socket, dir, statVirt, book, profile string) error {
	root, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Umask(0)
	cfg := fuseserver.Config{Root: root, ProcSelfFd: proc, StatVirt: statVirt, AsRoot: os.Geteuid() == 0}
	if book != "" {
		if cfg.Ledger, err = os.OpenFile(book, os.O_RDWR, 0); err != nil {
			return err
		}
	}
	s, err := fuseserver.New(cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		return err
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	return vhostuser.Serve(context.Background(), conn, s, vhostuser.Options{Logf: func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	}})
}
