package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// Places in the initramfs where the parts of the root are mounted. They stay
// reachable through rootFS.initramfs after the root has changed.
const (
	lowerDir = "/mnt/lower"
	upperDir = "/mnt/upper"
	rootDir  = "/mnt/root"
)

// rootFS is the root file system of the sandbox.
type rootFS struct {
	initramfs int  // descriptor of the initramfs' root; -1: it is the root
	disk      bool // the upper layer is a disk, to be unmounted at the end
}

// enter mounts the root and moves the agent, and so all programs, into it.
func (r *rootFS) enter(spec agentproto.Root, mods *modules) error {
	if spec.Lower == "" {
		return bareRoot()
	}
	if err := r.mountLayers(spec, mods); err != nil {
		return err
	}
	var err error
	if r.initramfs, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	// Not pivot_root(2): it refuses to leave an initramfs. The new root is moved
	// over "/", after which programs may make user namespaces as usual.
	if err := unix.Chdir(rootDir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// bareRoot makes the initramfs itself fit for programs.
func bareRoot() error {
	for _, d := range []string{"/etc", "/tmp", "/run", "/root", "/var"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// mountLayers mounts the image read-only, the upper layer, and the overlay.
func (r *rootFS) mountLayers(spec agentproto.Root, mods *modules) error {
	for _, d := range []string{lowerDir, upperDir, rootDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	lower := agentproto.Mount{Kind: "disk", Source: spec.Lower, Fstype: spec.Fstype, Guest: lowerDir, Readonly: true}
	if err := mountDisk(lower, mods); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	if spec.Upper == "" {
		if err := unix.Mount("tmpfs", upperDir, "tmpfs", 0, "mode=0755"); err != nil {
			return fmt.Errorf("upper layer: %w", err)
		}
	} else {
		upper := agentproto.Mount{Kind: "disk", Source: spec.Upper, Fstype: "ext4", Guest: upperDir}
		if err := mountDisk(upper, mods); err != nil {
			return fmt.Errorf("upper layer: %w", err)
		}
		r.disk = true
	}
	for _, d := range []string{upperDir + "/upper", upperDir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil && !os.IsExist(err) {
			return fmt.Errorf("upper layer: %w", err)
		}
	}
	opts := "lowerdir=" + lowerDir + ",upperdir=" + upperDir + "/upper,workdir=" + upperDir + "/work"
	if err := unix.Mount("overlay", rootDir, "overlay", 0, opts); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	return nil
}

// diskPatience bounds the wait for a disk to appear: drivers probe in parallel.
const diskPatience = 2 * time.Second

// findDisk returns the device of the disk with a serial.
func findDisk(serial string) (string, error) {
	deadline := time.Now().Add(diskPatience)
	for {
		names, _ := filepath.Glob("/sys/block/vd*")
		for _, p := range names {
			b, err := os.ReadFile(filepath.Join(p, "serial"))
			if err == nil && strings.TrimRight(string(b), "\x00\n") == serial {
				return "/dev/" + filepath.Base(p), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk with serial %q among %d", serial, len(names))
		}
		time.Sleep(2 * time.Millisecond)
	}
}
