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
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fileserver"
)

// virtiofsOptions are the flags of msb virtiofs.
type virtiofsOptions struct {
	socket string
	fd     int
	tag    string
	share  fileserver.Share
}

func newVirtiofsCmd() *cobra.Command {
	var o virtiofsOptions
	cmd := &cobra.Command{
		Use:   "virtiofs --dir PATH (--socket PATH | --fd N)",
		Short: "Serve a directory to any VMM over virtio-fs (vhost-user)",
		Long: `Serve one directory as a vhost-user virtio-fs device, from a confined process.

It prints one line when it listens and ends when its one connection has ended.
With QEMU, whose guest memory must be shared:

  msb virtiofs --socket /tmp/fs.sock --dir /srv/data &
  qemu-system-x86_64 ... -object memory-backend-memfd,id=mem,size=1G,share=on \
    -machine memory-backend=mem -chardev socket,id=fs,path=/tmp/fs.sock \
    -device vhost-user-fs-pci,chardev=fs,tag=data`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serveVirtiofs(cmd, &o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.socket, "socket", "", "listen on a new unix socket at `PATH`")
	f.IntVar(&o.fd, "fd", -1, "use descriptor `N`: a connected or listening unix socket")
	f.StringVar(&o.share.Path, "dir", "", "serve the directory `PATH`")
	f.BoolVar(&o.share.Readonly, "readonly", false, "refuse every change")
	f.StringVar(&o.share.Cache, "cache", "auto", "what the guest may cache, a `POLICY`: auto (1 s), none, always")
	f.IntVar(&o.share.Queues, "queues", 1, "`NUMBER` of request queues")
	f.StringVar(&o.share.StatVirt, "stat-virt", "strict", "guest owners and modes, a `POLICY`: strict and relaxed keep them in an extended attribute, off sets the host's")
	f.StringVar(&o.share.HostPerms, "host-perms", "private", "host modes of new files, a `POLICY`: private or mirror (the guest's)")
	f.StringVar(&o.tag, "tag", "", "offer the configuration space with `TAG`, for VMMs that ask for it (not QEMU before 8.1)")
	return cmd
}

func serveVirtiofs(cmd *cobra.Command, o *virtiofsOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := o.lookAtDir(); err != nil {
		return err
	}
	conn, err := o.open()
	if err != nil {
		return err
	}
	if o.socket != "" {
		defer os.Remove(o.socket)
	}
	defer conn.Close()
	msb, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the server dies with the thread that starts it
	p, err := fileserver.Start(cmd.Context(), fileserver.Options{
		MSB: msb, ID: "virtiofs", Log: os.Stderr, Config: o.tag != "",
		Shares: []fileserver.Share{o.share}, Conns: []*os.File{conn},
	})
	if err != nil {
		return err
	}
	for _, f := range p.Findings() {
		fmt.Fprintln(cmd.ErrOrStderr(), "msb: confinement:", f)
	}
	_ = conn.Close() // ours; nobody waits in a queue that is served no more
	fmt.Fprintln(cmd.OutOrStdout(), o.where())
	return waitVirtiofs(cmd.Context(), p)
}

// waitVirtiofs returns when the server has ended. Ctrl-C ends it.
func waitVirtiofs(ctx context.Context, p *fileserver.Process) error {
	select {
	case <-p.Done():
		return p.Err()
	case <-ctx.Done():
		p.Kill()
		<-p.Done()
		return context.Cause(ctx)
	}
}

func (o *virtiofsOptions) check() error {
	switch {
	case o.share.Path == "":
		return usagef("msb virtiofs: --dir is missing")
	case (o.socket == "") == (o.fd < 0):
		return usagef("msb virtiofs: give one of --socket and --fd")
	case o.share.Queues < 1 || o.share.Queues > 16:
		return usagef("msb virtiofs: --queues %d: 1 to 16", o.share.Queues)
	case !slices.Contains([]string{"auto", "none", "always"}, o.share.Cache):
		return usagef("msb virtiofs: --cache %q: auto, none or always", o.share.Cache)
	case !slices.Contains([]string{"strict", "relaxed", "off"}, o.share.StatVirt):
		return usagef("msb virtiofs: --stat-virt %q: strict, relaxed or off", o.share.StatVirt)
	case len(o.tag) > 36:
		return usagef("msb virtiofs: --tag %q is longer than 36 bytes", o.tag)
	}
	o.share.Tag = o.tag
	return nil
}

// lookAtDir makes the directory's path absolute and free of links and
// remembers what it is, so that the server serves that and nothing put there since.
func (o *virtiofsOptions) lookAtDir() error {
	abs, err := filepath.Abs(o.share.Path)
	if err != nil {
		return err
	}
	if o.share.Path, err = filepath.EvalSymlinks(abs); err != nil {
		return errdefs.Wrap(errdefs.PathNotFound, bare(err), "directory %q", abs)
	}
	fi, err := os.Stat(o.share.Path)
	if err != nil {
		return errdefs.Wrap(errdefs.PathNotFound, bare(err), "directory %q", abs)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !fi.IsDir() || !ok {
		return errdefs.New(errdefs.InvalidArgument, "%q is not a directory", abs)
	}
	o.share.Dev, o.share.Ino = uint64(st.Dev), st.Ino
	return nil
}

// bare is the error without the path that the message names anyway.
func bare(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// open returns the socket that the server is given.
func (o *virtiofsOptions) open() (*os.File, error) {
	if o.socket == "" {
		if domain, err := unix.GetsockoptInt(o.fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || domain != unix.AF_UNIX {
			return nil, errdefs.New(errdefs.InvalidArgument, "descriptor %d is not a unix socket", o.fd)
		}
		return os.NewFile(uintptr(o.fd), "front end"), nil
	}
	// An old socket is not tried: a connection would be the one that a live
	// server takes.
	if _, err := os.Lstat(o.socket); err == nil {
		return nil, errdefs.New(errdefs.InvalidArgument, "socket %q exists", o.socket).
			WithHint("remove it if no server uses it any more")
	}
	old := unix.Umask(0o177) // whoever connects gets the directory
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.socket, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		e := errdefs.Wrap(errdefs.IO, err, "socket %s", o.socket)
		if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(o.socket) > most {
			_ = e.WithHint("the path of a socket has at most %d bytes: use a shorter one, or --fd", most)
		}
		return nil, e
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// where is the line that says that the server can be connected to.
func (o *virtiofsOptions) where() string {
	if o.socket == "" {
		return fmt.Sprintf("serving %s on descriptor %d", o.share.Path, o.fd)
	}
	return fmt.Sprintf("serving %s, listening on %s", o.share.Path, o.socket)
}
