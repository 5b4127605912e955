package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/microsandbox-go/microsandbox/cmd/msb/agentbin"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

//go:embed bareinit/init.c
var initSource []byte

// truePath is the static program that rows without an image run first. It is
// in every initramfs of this benchmark and is the bare init's binary.
const truePath = "/true"

// guestKernel is a kernel under measurement, twice in the benchmark's home:
// with all its modules and our agent, and with the few that the bare init
// needs and the bare init.
type guestKernel struct {
	Name    string // own, stock
	Hash    string
	Release string
	agent   vmm.Kernel
	floor   vmm.Kernel
}

// floorModules are those the bare init loads, in its order.
var floorModules = []string{"virtio_ring", "virtio", "virtio_mmio", "virtio_console"}

// buildInit compiles the bare init.
func buildInit(ctx context.Context, dir string) (string, error) {
	src, out := filepath.Join(dir, "init.c"), filepath.Join(dir, "init")
	if err := os.WriteFile(src, initSource, 0o600); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "gcc", "-O2", "-Wall", "-s", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-o", out, src)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the bare init: %w: %s", err, text)
	}
	return out, nil
}

// homes are where guest kernels are looked for.
func homes() []home.Dir {
	var list []home.Dir
	if p := os.Getenv(home.EnvVar); p != "" {
		list = append(list, home.Dir(p))
	}
	list = append(list, home.Dir(filepath.Join("build", "home")))
	if user, err := os.UserHomeDir(); err == nil {
		list = append(list, home.Dir(filepath.Join(user, ".microsandbox")))
	}
	return list
}

// findKernels takes the newest kernel of our own build and the newest other one.
func (b *bench) findKernels() ([]*guestKernel, error) {
	var found []*guestKernel
	for _, h := range homes() {
		infos, err := kernel.List(h)
		if err != nil {
			return nil, err
		}
		for _, i := range infos {
			k := &guestKernel{Name: "stock", Hash: i.Hash, Release: i.Release}
			if i.Own {
				k.Name = "own"
			}
			have := func(other *guestKernel) bool { return other.Name == k.Name }
			if slices.ContainsFunc(found, have) || !b.o.kernels.MatchString(k.Name) {
				continue
			}
			if err := b.take(k, filepath.Join(h.Kernels(), i.Hash)); err != nil {
				return nil, fmt.Errorf("kernel %s: %w", i.Hash, err)
			}
			found = append(found, k)
		}
	}
	slices.SortFunc(found, func(a, b *guestKernel) int {
		return slices.Index([]string{"own", "stock"}, a.Name) - slices.Index([]string{"own", "stock"}, b.Name)
	})
	return found, nil
}

// take puts a kernel into the benchmark's home and makes both initramfs.
func (b *bench) take(k *guestKernel, dir string) (err error) {
	if err := linkTree(dir, filepath.Join(b.h.Kernels(), k.Hash), nil); err != nil {
		return err
	}
	bare, err := os.ReadFile(b.init)
	if err != nil {
		return err
	}
	if k.agent, err = b.initramfs(k.Hash, agentbin.Bytes(), bare); err != nil {
		return err
	}
	hash := "floor" + k.Hash[:11]
	if err := linkTree(dir, filepath.Join(b.h.Kernels(), hash), asFloor(hash)); err != nil {
		return err
	}
	k.floor, err = b.initramfs(hash, bare, bare)
	return err
}

// asFloor leaves only the modules of the bare init in a kernel.json.
func asFloor(hash string) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		var i kernel.Info
		if err := json.Unmarshal(b, &i); err != nil {
			return nil, err
		}
		i.Hash = hash
		i.Modules = slices.DeleteFunc(i.Modules, func(m kernel.Module) bool { return !slices.Contains(floorModules, m.Name) })
		i.Boot = len(i.Modules)
		return json.Marshal(i)
	}
}

// linkTree makes hard links or copies of a kernel's files; its kernel.json goes
// through edit.
func linkTree(from, to string, edit func([]byte) ([]byte, error)) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		src, dst := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		if edit != nil && e.Name() == "kernel.json" {
			b, err := os.ReadFile(src)
			if err == nil {
				b, err = edit(b)
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(dst, b, 0o600); err != nil {
				return err
			}
			continue
		}
		if err := linkOrCopy(src, dst); err != nil {
			return err
		}
	}
	return nil
}

func linkOrCopy(src, dst string) error {
	if err := os.Link(src, dst); err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// initramfs makes the archive that msb will use for this kernel and PID 1, and
// adds truePath to it: a second archive behind the first (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst).
func (b *bench) initramfs(hash string, pid1, bare []byte) (vmm.Kernel, error) {
	if err := os.Setenv(kernel.EnvVar, hash); err != nil {
		return vmm.Kernel{}, err
	}
	defer os.Unsetenv(kernel.EnvVar)
	k, err := kernel.Find(b.h, pid1)
	if err != nil {
		return k, err
	}
	f, err := os.OpenFile(k.Initrd, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return k, err
	}
	_, err = f.Write(cpioFile(truePath[1:], bare))
	return k, errors.Join(err, f.Close())
}

// cpioFile is a newc archive of one executable file.
func cpioFile(name string, data []byte) []byte {
	var out []byte
	add := func(name string, mode int, data []byte) {
		out = append(out, "070701"...)
		for _, v := range []int{1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0} {
			out = fmt.Appendf(out, "%08x", v)
		}
		out = append(append(out, name...), 0)
		out = append(out, make([]byte, -len(out)&3)...)
		out = append(out, data...)
		out = append(out, make([]byte, -len(out)&3)...)
	}
	add(name, 0o100755, data)
	add("TRAILER!!!", 0, nil)
	return out
}
