package supervisor

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// machineConfig opens the root disks and logs and describes the machine. The
// caller closes the opened files once the machine has started, or not.
func (s *supervisor) machineConfig(k vmm.Kernel) (vmm.Config, []*os.File, error) {
	var opened []*os.File
	open := func(path string, flags int) (*os.File, error) {
		f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			opened = append(opened, f)
		}
		return f, err
	}
	cfg := vmm.Config{
		ID: s.cfg.ID, CPUs: s.cfg.CPUs, MemoryMiB: s.cfg.MemoryMiB, Accel: vmm.Accel(s.cfg.Accel),
		Kernel: k, Shares: s.vmShares, BootTimeout: s.bootTimeout(),
		Inherit: append([]*os.File{s.lock}, s.plan.DiskLocks...),
	}
	for _, share := range s.vmShares {
		opened = append(opened, share.Conn)
	}
	if s.cfg.RootFS != "" {
		root, err := open(s.cfg.RootFS, os.O_RDONLY)
		if err != nil {
			return cfg, opened, errdefs.Wrap(errdefs.ImageNotFound, err, "image %q of sandbox %q", s.cfg.Image, s.cfg.Name).
				WithHint("msb image pull %s, or create the sandbox again", s.cfg.Image)
		}
		cfg.Disks = append(cfg.Disks, vmm.Disk{Serial: serialRoot, File: root, Readonly: true, Format: "raw"})
		if s.cfg.UpperMiB > 0 {
			upper, err := open(filepath.Join(s.h.Sandbox(s.cfg.Name), UpperFile), os.O_RDWR)
			if err != nil {
				return cfg, opened, errdefs.Wrap(errdefs.IO, err, "writable layer of sandbox %q", s.cfg.Name)
			}
			cfg.Disks = append(cfg.Disks, vmm.Disk{Serial: serialUpper, File: upper, Format: "raw"})
		}
	}
	cfg.Disks = append(cfg.Disks, s.plan.Disks...)
	var err error
	if cfg.Console, err = s.openLog(ConsoleLog); err != nil {
		return cfg, opened, err
	}
	opened = append(opened, cfg.Console)
	if cfg.Stderr, err = s.openLog(SupervisorLog); err != nil {
		return cfg, opened, err
	}
	opened = append(opened, cfg.Stderr)
	if s.link, cfg.Agent, err = socketPair("agent link"); err != nil {
		return cfg, opened, err
	}
	link := s.link
	s.undo = append(s.undo, func() { link.Close() })
	return cfg, append(opened, cfg.Agent), nil
}

// openLog opens a log of this run for appending; the console starts anew, so
// that its tail is this boot's.
func (s *supervisor) openLog(name string) (*os.File, error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if name == ConsoleLog {
		flags |= os.O_TRUNC
	}
	return os.OpenFile(s.logPath(name), flags, 0o600)
}
