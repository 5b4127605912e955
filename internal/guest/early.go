package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const hardened = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// earlyMounts mounts what finding the port needs. /dev may be there already
// (CONFIG_DEVTMPFS_MOUNT does not apply to an initramfs, but a kernel may vary).
func earlyMounts() error {
	for _, m := range []struct {
		target, fstype string
		flags          uintptr
		data           string
	}{
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"/proc", "proc", hardened, ""},
		{"/sys", "sysfs", hardened, ""},
	} {
		if err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// moduleDir is kernel.ModuleDir; see there for its layout.
const moduleDir = "/m"

// modules are the kernel modules of the initramfs, reachable also after the
// root file system has changed.
type modules struct {
	dir     int // descriptor of moduleDir, -1 if the kernel has no modules
	depends map[string][]string
	loaded  map[string]bool
}

// loadBootModules loads the modules of every boot and returns those that could
// not be loaded, with the reason.
func loadBootModules() (*modules, []string) {
	m := &modules{dir: -1, depends: map[string][]string{}, loaded: map[string]bool{}}
	order, err := os.ReadFile(filepath.Join(moduleDir, "order"))
	if err != nil {
		return m, nil // everything is built in
	}
	if m.dir, err = unix.Open(moduleDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return m, []string{err.Error()}
	}
	var problems []string
	now := true
	for _, line := range strings.Split(string(order), "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case words[0] == "-":
			now = false
		default:
			m.depends[words[0]] = words[1:]
			if !now {
				continue
			}
			if err := m.load(words[0]); err != nil {
				problems = append(problems, err.Error())
			}
		}
	}
	return m, problems
}

// load loads a module and what it depends on. A module that is not in the
// initramfs is taken to be built in.
func (m *modules) load(name string) error {
	deps, ok := m.depends[name]
	if !ok || m.loaded[name] {
		return nil
	}
	m.loaded[name] = true
	for _, d := range deps {
		if err := m.load(d); err != nil {
			return err
		}
	}
	fd, err := unix.Openat(m.dir, name+".ko", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	defer unix.Close(fd)
	if err := unix.FinitModule(fd, "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("module %s: %w", name, err)
	}
	return nil
}

// release frees the memory of modules that were not needed.
func (m *modules) release() {
	if m.dir < 0 {
		return
	}
	for name := range m.depends {
		_ = unix.Unlinkat(m.dir, name+".ko", 0)
	}
	unix.Close(m.dir)
	m.dir, m.depends = -1, nil
}

// openPort finds the virtio-serial port of a name and opens it. Numbers in
// device names depend on the order of devices, names do not.
func openPort(name string, patience time.Duration) (*os.File, error) {
	deadline := time.Now().Add(patience)
	for {
		f, err := findPort(name)
		if err == nil || !errors.Is(err, os.ErrNotExist) || time.Now().After(deadline) {
			return f, err
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func findPort(name string) (*os.File, error) {
	const class = "/sys/class/virtio-ports"
	dir, err := os.ReadDir(class)
	if err != nil {
		return nil, err
	}
	for _, e := range dir {
		b, err := os.ReadFile(filepath.Join(class, e.Name(), "name"))
		if err != nil || string(bytes.TrimSpace(b)) != name {
			continue
		}
		return os.OpenFile("/dev/"+e.Name(), os.O_RDWR, 0)
	}
	return nil, fmt.Errorf("port %s: %w", name, os.ErrNotExist)
}
