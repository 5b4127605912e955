package guest

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// mountAll performs the mounts of Boot, parents first whatever the order given.
func (a *agent) mountAll(list []agentproto.Mount) error {
	list = append([]agentproto.Mount(nil), list...)
	sort.SliceStable(list, func(i, j int) bool {
		di, dj := strings.Count(list[i].Guest, "/"), strings.Count(list[j].Guest, "/")
		return di < dj || di == dj && list[i].Guest < list[j].Guest
	})
	for _, m := range list {
		if err := a.mount(m); err != nil {
			return &stepError{"mount " + m.Guest, err}
		}
	}
	return nil
}

func (a *agent) mount(m agentproto.Mount) error {
	if err := makeMountPoint(m.Guest); err != nil {
		return err
	}
	switch m.Kind {
	case "virtiofs":
		if err := a.modules.load("virtiofs"); err != nil {
			return err
		}
		if err := unix.Mount(m.Source, m.Guest, "virtiofs", mountFlags(m), ""); err != nil {
			if err == unix.EINVAL {
				return fmt.Errorf("virtiofs %s: no device with this tag (%w)", m.Source, err)
			}
			return fmt.Errorf("virtiofs %s: %w", m.Source, err)
		}
		if !m.Readonly {
			a.waits.add(m.Guest)
		}
		return nil
	case "disk":
		return a.mountVolume(m)
	case "tmpfs":
		return mountTmpfs(m)
	}
	return fmt.Errorf("unknown kind of mount %q", m.Kind)
}

// mountVolume mounts a disk and lets its file system fill it, if that is asked.
func (a *agent) mountVolume(m agentproto.Mount) error {
	if err := mountDisk(m, a.modules); err != nil {
		return err
	}
	if m.Grow && !m.Readonly && m.Fstype == "ext4" {
		dev, err := findDisk(m.Source)
		if err != nil {
			return err
		}
		a.growth.add(dev, m.Guest)
	}
	return nil
}

// makeMountPoint makes the directory to mount on, in the upper layer.
func makeMountPoint(path string) error {
	err := os.MkdirAll(path, 0o755)
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("mount point %s does not exist and its parent is read-only: %w", path, err)
	}
	return err
}

// mountFlags are the flags every kind of mount has.
func mountFlags(m agentproto.Mount) uintptr {
	flags := uintptr(unix.MS_RELATIME)
	for _, f := range []struct {
		on   bool
		flag uintptr
	}{
		{m.Readonly, unix.MS_RDONLY}, {m.Noexec, unix.MS_NOEXEC}, {m.Nosuid, unix.MS_NOSUID}, {m.Nodev, unix.MS_NODEV},
	} {
		if f.on {
			flags |= f.flag
		}
	}
	return flags
}

func mountTmpfs(m agentproto.Mount) error {
	mode := "0755"
	if m.Guest == "/tmp" || m.Guest == "/var/tmp" {
		mode = "1777"
	}
	data := "mode=" + mode
	if m.Size > 0 {
		data += fmt.Sprintf(",size=%d", m.Size)
	}
	if err := unix.Mount("tmpfs", m.Guest, "tmpfs", mountFlags(m), data); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	return nil
}

// mountDisk mounts the disk with serial m.Source on m.Guest.
func mountDisk(m agentproto.Mount, mods *modules) error {
	dev, err := findDisk(m.Source)
	if err != nil {
		return err
	}
	types := []string{m.Fstype}
	if m.Fstype == "" {
		if types, err = fstypesOf(dev); err != nil {
			return fmt.Errorf("disk %s: %w", m.Source, err)
		}
	}
	var problems []string
	for _, fstype := range types {
		if err = mods.load(moduleOf(fstype)); err == nil {
			err = mountFS(dev, m, fstype)
		}
		if err == nil {
			return nil
		}
		problems = append(problems, fmt.Sprintf("%s: %v", fstype, err))
	}
	if len(problems) == 0 {
		return fmt.Errorf("disk %s: no file system found on it", m.Source)
	}
	return fmt.Errorf("disk %s: no file system that can be mounted (%s)", m.Source, strings.Join(problems, "; "))
}

func moduleOf(fstype string) string {
	switch fstype {
	case "iso9660":
		return "isofs"
	case "ext2", "ext3":
		return "ext4"
	}
	return fstype
}

// mountFS mounts a device as one type. A read-only ext4 (or XFS) whose journal
// is dirty cannot replay it: it is mounted without.
func mountFS(dev string, m agentproto.Mount, fstype string) error {
	flags := mountFlags(m)
	err := unix.Mount(dev, m.Guest, fstype, flags, "")
	if err == nil || !m.Readonly {
		return err
	}
	switch fstype {
	case "ext3", "ext4":
		return unix.Mount(dev, m.Guest, fstype, flags, "noload")
	case "xfs":
		return unix.Mount(dev, m.Guest, fstype, flags, "norecovery")
	}
	return err
}
