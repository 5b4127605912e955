// Package home names every file of the data directory and opens them. The layout
// is described in docs/on-disk.md.
package home

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// EnvVar overrides the place of the data directory.
const EnvVar = "MSB_HOME"

// Dir is the absolute path of a data directory ("home").
type Dir string

// Resolve returns $MSB_HOME, else ~/.microsandbox, as an absolute path. It
// creates nothing.
func Resolve() (Dir, error) {
	if p := os.Getenv(EnvVar); p != "" {
		abs, err := filepath.Abs(p)
		if err != nil {
			return "", fmt.Errorf("%s=%q: %w", EnvVar, p, err)
		}
		return Dir(abs), nil
	}
	h, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no home directory: %w; set %s", err, EnvVar)
	}
	return Dir(filepath.Join(h, ".microsandbox")), nil
}

// Foreign says why this process must not write in the home: it is the peer's
// (db/msb.db), or root is in the home of somebody else, where its locks and
// volumes would be in the owner's way for good. Reading stays possible.
//
// Errors: InvalidConfig.
func (d Dir) Foreign() error {
	if _, err := os.Lstat(d.PeerDB()); err == nil {
		return errdefs.New(errdefs.InvalidConfig, "%s is the data directory of another microsandbox (it has db/msb.db)", d).
			WithHint("set %s to another directory", EnvVar)
	}
	fi, err := os.Stat(string(d))
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 {
		return errdefs.New(errdefs.InvalidConfig, "%s belongs to uid %d: root would leave files that its owner cannot use", d, st.Uid).
			WithHint("run msb as that user, or set %s to a home of root's", EnvVar)
	}
	return nil
}

// Ensure makes the home (mode 0700) and its fixed directories, unless it is
// foreign.
func (d Dir) Ensure() error {
	if err := d.Foreign(); err != nil {
		return err
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return err
	}
	for _, p := range []string{d.Volumes(), d.States(), d.Staging(), d.Trash(), d.NameLocks(), d.Images(), d.Kernels(), d.Sandboxes(), d.runs()} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (d Dir) join(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

// DB is the SQLite database of records.
func (d Dir) DB() string { return d.join("msb.db") }

// Config is the configuration file, which selects a backend; msb never writes it.
func (d Dir) Config() string { return d.join("config.json") }

// PeerDB is where the peer keeps its records; its presence makes the home foreign.
func (d Dir) PeerDB() string { return d.join("db", "msb.db") }

// Volumes holds one directory per volume and the hidden bookkeeping directories.
func (d Dir) Volumes() string { return d.join("volumes") }

// Volume is the data directory of a volume.
func (d Dir) Volume(name string) string { return d.join("volumes", name) }

// States holds one directory per volume id: volume.json, ledger, attach lock.
func (d Dir) States() string { return d.join("volumes", ".state") }

// State is the bookkeeping directory of a volume id.
func (d Dir) State(id string) string { return d.join("volumes", ".state", id) }

// Staging holds volumes being made.
func (d Dir) Staging() string { return d.join("volumes", ".staging") }

// Trash holds removed volumes until they are reaped.
func (d Dir) Trash() string { return d.join("volumes", ".trash") }

// NameLocks holds the 64 flock files 00..3f.
func (d Dir) NameLocks() string { return d.join("volumes", ".locks") }

// Binds holds the ledgers of host directories that were mounted with a quota.
func (d Dir) Binds() string { return d.join("binds") }

// DiskFile is the image of a disk volume inside its data directory.
const DiskFile = "disk.raw"

// Templates holds what mkfs.ext4 makes, by size, for the next disk of that size.
func (d Dir) Templates() string { return d.join("templates") }

// Images holds blobs and root file systems by digest.
func (d Dir) Images() string { return d.join("images") }

// Kernels holds guest kernels by hash.
func (d Dir) Kernels() string { return d.join("kernels") }

// Sandboxes holds one directory per sandbox.
func (d Dir) Sandboxes() string { return d.join("sandboxes") }

// Sandbox is the directory of a sandbox: config.json, lock, upper.ext4, logs/.
func (d Dir) Sandbox(name string) string { return d.join("sandboxes", name) }

func (d Dir) runs() string { return d.join("run") }

// maxSocketName is the longest socket file name used in a run directory.
const maxSocketName = len("/agent.sock")

// maxSunPath is sizeof(sun_path) of struct sockaddr_un (Linux, unix(7)).
const maxSunPath = 108

// Run is the directory of the sockets of a live sandbox. It lies in the home
// unless that is too long for sun_path; then in $XDG_RUNTIME_DIR if that exists, else in
// /tmp/msb-UID, which EnsureRun makes 0700 and checks the owner of.
func (d Dir) Run(id string) string {
	p := d.join("run", id)
	if len(p)+maxSocketName < maxSunPath {
		return p
	}
	if x := os.Getenv("XDG_RUNTIME_DIR"); x != "" && isDir(x) && len(x)+len("/msb/")+len(id)+maxSocketName < maxSunPath {
		return filepath.Join(x, "msb", id)
	}
	return filepath.Join(fmt.Sprintf("/tmp/msb-%d", os.Getuid()), id)
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// EnsureRun makes Run(id) with mode 0700 and returns it. A fallback parent that
// belongs to somebody else is refused.
func (d Dir) EnsureRun(id string) (string, error) {
	p := d.Run(id)
	parent := filepath.Dir(p)
	if err := os.Mkdir(parent, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	fi, err := os.Lstat(parent)
	if err != nil {
		return "", err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !fi.IsDir() || !ok || int(st.Uid) != os.Getuid() || fi.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("run directory %s is not a private directory of uid %d", parent, os.Getuid())
	}
	if err := os.Mkdir(p, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return p, nil
}
