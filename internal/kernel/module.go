package kernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// bootModules are loaded at every boot, fsModules when a disk needs them. A
// kernel may have any of them built in.
var (
	bootModules = []string{"virtio_mmio", "virtio_console", "virtio_blk", "virtio_balloon", "virtiofs", "overlay", "virtio_rng"}
	fsModules   = []string{"nls_cp437", "nls_ascii", "ext4", "squashfs", "erofs", "xfs", "btrfs", "vfat", "isofs"}
)

// maxModule bounds one module, maxModules their number while searching.
const (
	maxModule  = 16 << 20
	maxModules = 20000
)

// module is one kernel module file.
type module struct {
	name    string // with underscores, as the kernel says it
	data    []byte
	depends []string
}

// moduleName is the kernel's name of a module file: virtio-rng.ko is virtio_rng.
func moduleName(path string) (string, bool) {
	base, ok := strings.CutSuffix(filepath.Base(path), ".ko")
	return strings.ReplaceAll(base, "-", "_"), ok
}

// parseModule reads what a module says of itself in its .modinfo section.
func parseModule(name string, data []byte) (*module, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	s := f.Section(".modinfo")
	if s == nil || s.Size > 1<<20 {
		return nil, fmt.Errorf("module %s has no .modinfo", name)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	m := &module{name: name, data: data}
	for _, field := range strings.Split(string(info), "\x00") {
		if d, ok := strings.CutPrefix(field, "depends="); ok && d != "" {
			m.depends = strings.Split(strings.ReplaceAll(d, "-", "_"), ",")
		}
	}
	return m, nil
}

// source finds modules by name; it returns nil without error for one it lacks.
type source func(name string) ([]byte, error)

// collectModules returns the wanted modules and what they depend on, each after
// its dependencies. boot counts those to load at every boot, which come first.
func collectModules(src source) (mods []*module, boot int, err error) {
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		data, err := src(name)
		if data == nil || err != nil {
			return err
		}
		m, err := parseModule(name, data)
		if err != nil {
			return err
		}
		for _, d := range m.depends {
			if err := add(d); err != nil {
				return err
			}
		}
		mods = append(mods, m)
		return nil
	}
	for _, name := range bootModules {
		if err := add(name); err != nil {
			return nil, 0, err
		}
	}
	boot = len(mods)
	for _, name := range fsModules {
		if err := add(name); err != nil {
			return nil, 0, err
		}
	}
	for _, m := range mods {
		if m.name == "vfat" { // asked for by name at mount time, not a symbol dependency
			for _, n := range []string{"nls_cp437", "nls_ascii"} {
				if slices.ContainsFunc(mods, func(m *module) bool { return m.name == n }) {
					m.depends = append(m.depends, n)
				}
			}
		}
	}
	return mods, boot, nil
}

// dirModules searches a tree such as /lib/modules/RELEASE for .ko files.
func dirModules(dir string) (source, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := moduleName(p); ok && d.Type().IsRegular() {
			paths[name] = p
		}
		if len(paths) > maxModules {
			return fmt.Errorf("%s: more than %d modules", dir, maxModules)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return func(name string) ([]byte, error) {
		p, ok := paths[name]
		if !ok {
			return nil, nil
		}
		return readFile(p, maxModule)
	}, nil
}

// memModules serves modules read from a package.
func memModules(files map[string][]byte) source {
	return func(name string) ([]byte, error) { return files[name], nil }
}

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > limit {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes", path, limit)
	}
	return os.ReadFile(path)
}
