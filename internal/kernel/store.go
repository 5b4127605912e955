package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// EnvVar names a kernel to use: a hash (or the start of one) of the home, or
// the path of a vmlinux or bzImage that needs no modules.
const EnvVar = "MSB_KERNEL"

// infoVersion is the version of kernel.json.
const infoVersion = 1

// ownSuffix ends the release of kernels built by make kernel.
const ownSuffix = "-msb"

// Info describes a kernel of the home, as stored in kernel.json.
type Info struct {
	Version int       `json:"version"`
	Hash    string    `json:"hash"`
	Release string    `json:"release"`
	Image   string    `json:"image"` // file name in the kernel's directory
	Own     bool      `json:"own"`   // built by make kernel
	Modules []Module  `json:"modules,omitempty"`
	Boot    int       `json:"boot_modules"` // how many of Modules are loaded at every boot
	AddedAt time.Time `json:"added_at"`
	Source  string    `json:"source"` // base name of the file it came from

	dir string
}

// Module names a module and those it needs.
type Module struct {
	Name    string   `json:"name"`
	Depends []string `json:"depends,omitempty"`
}

const infoFile = "kernel.json"

// Add takes a kernel into the home and returns its hash: src is a linux-image
// package (.deb), a vmlinux or a bzImage; modulesDir, if not "", is searched for
// the modules the latter two need. Adding the same kernel again changes nothing.
// tools decompress zstd.
func Add(ctx context.Context, h home.Dir, tools fetch.Tools, src, modulesDir string) (hash string, err error) {
	zstd := func(r io.Reader) (io.ReadCloser, error) { return tools.Decompress(ctx, fetch.Zstd, r) }
	img, mods, boot, err := load(src, modulesDir, zstd)
	if err != nil {
		return "", errdefs.Wrap(errdefs.InvalidConfig, err, "kernel %s", src).
			WithHint("give a linux-image-*-amd64 package (.deb), a vmlinux or a bzImage")
	}
	if err := ctx.Err(); err != nil {
		return "", errdefs.Wrap(errdefs.Cancelled, err, "kernel %s", src)
	}
	info := Info{
		Version: infoVersion, Hash: hashOf(img, mods), Release: img.release, Image: img.name,
		Own: strings.HasSuffix(img.release, ownSuffix), Boot: boot, AddedAt: time.Now().UTC(), Source: filepath.Base(src),
	}
	for _, m := range mods {
		info.Modules = append(info.Modules, Module{Name: m.name, Depends: m.depends})
	}
	if err := store(h, info, img, mods); err != nil {
		return "", errdefs.Wrap(errdefs.IO, err, "kernel %s", src)
	}
	return info.Hash, nil
}

// load reads image and modules from src.
func load(src, modulesDir string, zstd unpacker) (*image, []*module, int, error) {
	f, err := os.Open(src)
	if err != nil {
		return nil, nil, 0, err
	}
	defer f.Close()
	var data []byte
	mods := memModules(nil)
	if strings.HasSuffix(src, ".deb") {
		files, err := readDeb(f, zstd)
		if err != nil {
			return nil, nil, 0, err
		}
		data, mods = files.image, memModules(files.modules)
	} else {
		if data, err = readFile(src, maxImage); err != nil {
			return nil, nil, 0, err
		}
		if modulesDir != "" {
			if mods, err = dirModules(modulesDir); err != nil {
				return nil, nil, 0, err
			}
		}
	}
	img, err := parseImage(data, zstd)
	if err != nil {
		return nil, nil, 0, err
	}
	list, boot, err := collectModules(mods)
	return img, list, boot, err
}

func hashOf(img *image, mods []*module) string {
	d := sha256.New()
	add := func(name string, b []byte) {
		sum := sha256.Sum256(b)
		fmt.Fprintf(d, "%s %x\n", name, sum)
	}
	add(img.name, img.data)
	for _, m := range mods {
		add(m.name, m.data)
	}
	return hex.EncodeToString(d.Sum(nil))[:16]
}

// store writes a kernel's directory under another name and renames it.
func store(h home.Dir, info Info, img *image, mods []*module) error {
	final := filepath.Join(h.Kernels(), info.Hash)
	if _, err := readInfo(final); err == nil {
		return nil
	}
	if err := os.MkdirAll(h.Kernels(), 0o700); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(h.Kernels(), ".adding-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	meta, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return err
	}
	files := map[string][]byte{info.Image: img.data, infoFile: append(meta, '\n')}
	for _, m := range mods {
		files[m.name+".ko"] = m.data
	}
	for name, data := range files {
		if err := writeSynced(filepath.Join(tmp, name), bytes.NewReader(data)); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(h.Kernels())
}

// readInfo reads and checks kernel.json of a directory.
func readInfo(dir string) (Info, error) {
	b, err := readFile(filepath.Join(dir, infoFile), 1<<20)
	if err != nil {
		return Info{}, err
	}
	var i Info
	if err := json.Unmarshal(b, &i); err != nil {
		return Info{}, fmt.Errorf("%s: %w", dir, err)
	}
	if i.Version != infoVersion {
		return Info{}, fmt.Errorf("%s: version %d of kernel.json, this msb knows %d", dir, i.Version, infoVersion)
	}
	if i.Image != filepath.Base(i.Image) || i.Boot < 0 || i.Boot > len(i.Modules) {
		return Info{}, fmt.Errorf("%s: impossible kernel.json", dir)
	}
	i.dir = dir
	return i, nil
}

// List returns the kernels of the home, the preferred one first: own builds
// before others, then the newest. Directories that are no kernels are skipped.
func List(h home.Dir) ([]Info, error) {
	entries, err := os.ReadDir(h.Kernels())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errdefs.Wrap(errdefs.IO, err, "kernels")
	}
	var out []Info
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !e.IsDir() {
			continue
		}
		if i, err := readInfo(filepath.Join(h.Kernels(), e.Name())); err == nil {
			out = append(out, i)
		}
	}
	sort.Slice(out, func(a, b int) bool {
		if out[a].Own != out[b].Own {
			return out[a].Own
		}
		if !out[a].AddedAt.Equal(out[b].AddedAt) {
			return out[a].AddedAt.After(out[b].AddedAt)
		}
		return out[a].Hash < out[b].Hash
	})
	return out, nil
}

// Remove deletes a kernel from the home.
func Remove(h home.Dir, hash string) error {
	i, err := byHash(h, hash)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(i.dir); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "kernel %s", hash)
	}
	return nil
}

// Find returns the kernel to boot with the given agent (an ELF binary) and
// makes its initramfs if need be: $MSB_KERNEL, else an own build, else any.
func Find(h home.Dir, agent []byte) (vmm.Kernel, error) {
	if len(agent) == 0 {
		return vmm.Kernel{}, errdefs.New(errdefs.LibraryNotLoaded, "the guest agent is not built into this program").
			WithHint("build msb with `make build`")
	}
	i, err := choose(h)
	if err != nil {
		return vmm.Kernel{}, err
	}
	initrd, err := i.initramfs(h, agent)
	if err != nil {
		return vmm.Kernel{}, errdefs.Wrap(errdefs.IO, err, "initramfs of kernel %s", i.Hash)
	}
	return vmm.Kernel{
		Hash: i.Hash, Image: filepath.Join(i.dir, i.Image), Initrd: initrd, Release: i.Release, Own: i.Own,
	}, nil
}

func choose(h home.Dir) (Info, error) {
	switch want := os.Getenv(EnvVar); {
	case strings.Contains(want, "/"):
		return outsideKernel(want)
	case want != "":
		return byHash(h, want)
	}
	all, err := List(h)
	if err != nil {
		return Info{}, err
	}
	if len(all) == 0 {
		return Info{}, errdefs.New(errdefs.LibraryNotLoaded, "no guest kernel in %s", h.Kernels()).
			WithHint("run `make kernel-stock` (a minute) or `make kernel` (faster guests), or give one: msb kernel add FILE.deb|vmlinux|bzImage")
	}
	return all[0], nil
}

// envHint is the way out of a wrong EnvVar.
const envHint = "set " + EnvVar + " to a kernel of msb kernel ls, a vmlinux or a bzImage, or unset it"

// outsideKernel describes a kernel file that is not of the home.
func outsideKernel(path string) (Info, error) {
	b, err := readFile(path, maxImage)
	if err != nil {
		return Info{}, errdefs.Wrap(errdefs.InvalidConfig, err, "%s=%s", EnvVar, path).WithHint(envHint)
	}
	// It is booted as it is: what is inside of a bzImage need not be known.
	img, err := parseImage(b, func(io.Reader) (io.ReadCloser, error) { return nil, errors.ErrUnsupported })
	if err != nil {
		return Info{}, errdefs.Wrap(errdefs.InvalidConfig, err, "%s=%s", EnvVar, path).WithHint(envHint)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return Info{}, errdefs.Wrap(errdefs.IO, err, "%s", EnvVar)
	}
	return Info{
		Hash: hashOf(&image{name: "file", data: b}, nil), Release: img.release, Image: filepath.Base(abs),
		Own: strings.HasSuffix(img.release, ownSuffix), dir: filepath.Dir(abs),
	}, nil
}

func byHash(h home.Dir, hash string) (Info, error) {
	all, err := List(h)
	if err != nil {
		return Info{}, err
	}
	for _, i := range all {
		if len(hash) >= 4 && strings.HasPrefix(i.Hash, hash) {
			return i, nil
		}
	}
	return Info{}, errdefs.New(errdefs.InvalidConfig, "kernel %q is not in %s", hash, h.Kernels()).
		WithHint("msb kernel ls lists them")
}
