package kernel

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// ModuleDir is where the agent finds modules in the initramfs. Its file "order"
// has a line per module: "NAME DEPENDENCY ...", each after its dependencies.
// Those before the line "-" are loaded at every boot, the others when a file
// system of that name is wanted.
const ModuleDir = "/m"

// initramfsKept is how long archives for agents other than the wanted one stay.
const initramfsKept = 7 * 24 * time.Hour

// leftoverKept is how long something unfinished may still be somebody's work.
const leftoverKept = time.Hour

// initramfs returns the path of the archive for this agent, writing it if it is
// not there. The name has the hash of all that is in it.
func (i Info) initramfs(h home.Dir, agent []byte) (string, error) {
	sum := sha256.Sum256(append([]byte(i.Hash), agent...))
	name := "initramfs-" + i.Hash + "-" + hex.EncodeToString(sum[:8]) + ".cpio"
	path := filepath.Join(h.Kernels(), name)
	now := time.Now()
	if os.Chtimes(path, now, now) == nil {
		return path, nil
	}
	entries, err := i.entries(agent)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(h.Kernels(), 0o700); err != nil {
		return "", err
	}
	var buf bytes.Buffer
	if err := writeCPIO(&buf, entries); err != nil {
		return "", err
	}
	tmp, err := os.CreateTemp(h.Kernels(), ".initramfs-")
	if err != nil {
		return "", err
	}
	tmp.Close()
	defer os.Remove(tmp.Name())
	if err := writeSynced(tmp.Name(), &buf); err != nil {
		return "", err
	}
	// A confined VMM has another uid.
	if err := os.Chmod(tmp.Name(), 0o644); err != nil {
		return "", err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return "", err
	}
	dropOld(h, name)
	return path, nil
}

// entries lists the archive: the agent, the console it starts with, mount
// points and modules.
func (i Info) entries(agent []byte) ([]entry, error) {
	list := []entry{
		{name: "dev", mode: modeDir | 0o755},
		{name: "dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
		{name: "proc", mode: modeDir | 0o555},
		{name: "sys", mode: modeDir | 0o555},
		{name: "mnt", mode: modeDir | 0o755},
		{name: "root", mode: modeDir | 0o700},
		{name: "tmp", mode: modeDir | 0o1777},
		{name: "etc", mode: modeDir | 0o755},
		{name: "init", mode: modeFile | 0o755, data: agent},
	}
	if len(i.Modules) == 0 {
		return list, nil
	}
	list = append(list, entry{name: "m", mode: modeDir | 0o700})
	var order strings.Builder
	for n, m := range i.Modules {
		if n == i.Boot {
			order.WriteString("-\n")
		}
		fmt.Fprintln(&order, strings.Join(append([]string{m.Name}, m.Depends...), " "))
		data, err := readFile(filepath.Join(i.dir, m.Name+".ko"), maxModule)
		if err != nil {
			return nil, err
		}
		list = append(list, entry{name: "m/" + m.Name + ".ko", mode: modeFile | 0o600, data: data})
	}
	return append(list, entry{name: "m/order", mode: modeFile | 0o600, data: []byte(order.String())}), nil
}

// dropOld removes archives of other agents that nobody has used for a while (a
// VMM reads the archive only while it starts) and what killed writers left.
func dropOld(h home.Dir, keep string) {
	for pattern, age := range map[string]time.Duration{
		"initramfs-*.cpio": initramfsKept, ".initramfs-*": leftoverKept, ".adding-*": leftoverKept,
	} {
		paths, _ := filepath.Glob(filepath.Join(h.Kernels(), pattern))
		for _, p := range paths {
			if fi, err := os.Stat(p); err == nil && filepath.Base(p) != keep && time.Since(fi.ModTime()) > age {
				os.RemoveAll(p)
			}
		}
	}
}

// writeSynced writes a file and makes its bytes durable.
func writeSynced(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
