package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
)

var (
	small = make([]byte, 4096)
	large = make([]byte, 256<<20)
)

// ours plays the same batches through our Go API in this process.
type ours struct {
	b    *microsandbox.LocalBackend
	fs   *microsandbox.VolumeFs
	next int
	made []string
}

func startOurs(home string) (*ours, error) {
	b, err := microsandbox.NewLocalBackend(home)
	return &ours{b: b}, err
}

func (s *ours) stop() error { return s.b.Close() }

func (s *ours) name() string { s.next++; return fmt.Sprint("c", s.next) }

func (s *ours) create(ctx context.Context, name string) error {
	_, err := s.b.CreateVolume(ctx, microsandbox.VolumeSpec{Name: name})
	return err
}

func (s *ours) play(op string, n int) (time.Duration, error) {
	ctx := context.Background()
	start := time.Now()
	err := s.batch(ctx, op, n)
	return time.Since(start), err
}

// repeat does something n times.
func repeat(n int, do func() error) error {
	for range n {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

func (s *ours) batch(ctx context.Context, op string, n int) error {
	switch op {
	case "setup":
		return s.setup(ctx)
	case "fill volumes":
		for i := range n {
			if err := s.create(ctx, fmt.Sprint("v", i)); err != nil {
				return err
			}
		}
		return nil
	case "create":
		return repeat(n, func() error {
			s.made = append(s.made, s.name())
			return s.create(ctx, s.made[len(s.made)-1])
		})
	case "create 8":
		return repeat(n/8, func() error { return s.createTogether(ctx, 8) })
	case "remove":
		for _, name := range s.made {
			if err := s.b.RemoveVolume(ctx, name); err != nil {
				return err
			}
		}
		s.made = nil
		return nil
	case "get":
		return repeat(n, func() error { _, err := s.b.GetVolume(ctx, "v7"); return err })
	case "list":
		return repeat(n, func() error { _, err := s.b.ListVolumes(ctx); return err })
	}
	return s.files(ctx, op, n)
}

func (s *ours) createTogether(ctx context.Context, n int) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		name := s.name()
		s.made = append(s.made, name)
		wg.Go(func() { errs[i] = s.create(ctx, name) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *ours) setup(ctx context.Context) error {
	v, err := s.b.CreateVolume(ctx, microsandbox.VolumeSpec{Name: "files"})
	if err != nil {
		return err
	}
	s.fs = v.FS()
	return errors.Join(s.fs.Write(ctx, "small", small), s.fs.Write(ctx, "large", large), s.fs.Mkdir(ctx, "many"))
}

func (s *ours) files(ctx context.Context, op string, n int) error {
	fs := s.fs
	once := map[string]func() error{
		"read":             func() error { _, err := fs.Read(ctx, "small"); return err },
		"overwrite":        func() error { return fs.Write(ctx, "small", small) },
		"write new":        func() error { return fs.Write(ctx, "many/"+s.name(), small) },
		"stat":             func() error { _, err := fs.Stat(ctx, "small"); return err },
		"exists":           func() error { _, err := fs.Exists(ctx, "small"); return err },
		"mkdir":            func() error { return fs.Mkdir(ctx, "many/"+s.name()) },
		"rename":           func() error { return s.renameTwice(ctx) },
		"list 10k":         func() error { _, err := fs.List(ctx, "listed"); return err },
		"read stream":      func() error { return s.readStream(ctx) },
		"read chunks":      func() error { return s.readChunks(ctx) },
		"write stream 64K": func() error { return s.writeStream(ctx, 64<<10) },
		"write stream 1M":  func() error { return s.writeStream(ctx, 1<<20) },
		"read whole":       func() error { _, err := fs.Read(ctx, "large"); return err },
		"write whole":      func() error { return fs.Write(ctx, "whole", large) },
		"copy":             func() error { return fs.Copy(ctx, "large", "copy") },
	}[op]
	if once == nil {
		return fmt.Errorf("no operation %q", op)
	}
	if op == "rename" {
		n /= 2
	}
	return repeat(n, once)
}

func (s *ours) renameTwice(ctx context.Context) error {
	return errors.Join(s.fs.Rename(ctx, "small", "moved"), s.fs.Rename(ctx, "moved", "small"))
}

// readStream reads as Go programs do, into a buffer of theirs.
func (s *ours) readStream(ctx context.Context) error {
	r, err := s.fs.ReadStream(ctx, "large")
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for err == nil {
		_, err = r.Read(b)
	}
	if err == io.EOF {
		err = nil
	}
	return errors.Join(err, r.Close())
}

// readChunks reads as programs for the peer's SDK do: every chunk is the caller's.
func (s *ours) readChunks(ctx context.Context) error {
	r, err := s.fs.ReadStream(ctx, "large")
	if err != nil {
		return err
	}
	for {
		b, err := r.Recv(ctx)
		if err != nil || b == nil {
			return errors.Join(err, r.Close())
		}
	}
}

func (s *ours) writeStream(ctx context.Context, chunk int) error {
	w, err := s.fs.WriteStream(ctx, "stream")
	if err != nil {
		return err
	}
	for off := 0; off < len(large); off += chunk {
		if _, err := w.Write(large[off : off+chunk]); err != nil {
			return errors.Join(err, w.Close())
		}
	}
	return w.Close()
}

// plain plays the operations on files with the calls a program would make
// without any of this. It is a floor, not a rival: nothing of it is contained. What
// it writes is as safe as ours, see replace.
type plain struct{ dir string }

func (s *plain) play(op string, n int) (time.Duration, error) {
	path := func(name string) string { return filepath.Join(s.dir, name) }
	once := map[string]func() error{
		"setup": func() error {
			return errors.Join(os.WriteFile(path("small"), small, 0o644), os.WriteFile(path("large"), large, 0o644), os.MkdirAll(path("many"), 0o755))
		},
		"read":      func() error { _, err := os.ReadFile(path("small")); return err },
		"overwrite": func() error { return replaceBytes(path("small"), small, len(small)) },
		"stat":      func() error { _, err := os.Lstat(path("small")); return err },
		"list 10k": func() error {
			list, err := os.ReadDir(path("listed"))
			for _, e := range list {
				if _, err := e.Info(); err != nil {
					return err
				}
			}
			return err
		},
		"read stream": func() error {
			f, err := os.Open(path("large"))
			if err != nil {
				return err
			}
			b := make([]byte, 1<<20)
			for err == nil {
				_, err = f.Read(b)
			}
			if err == io.EOF {
				err = nil
			}
			return errors.Join(err, f.Close())
		},
		"write stream 64K": func() error { return replaceBytes(path("stream"), large, 64<<10) },
		"write stream 1M":  func() error { return replaceBytes(path("stream"), large, 1<<20) },
		"read whole":       func() error { _, err := os.ReadFile(path("large")); return err },
		"write whole":      func() error { return replaceBytes(path("whole"), large, len(large)) },
		"copy":             func() error { return copyFile(path("large"), path("copy")) },
	}[op]
	if once == nil {
		return 0, errNoFloor
	}
	start := time.Now()
	err := repeat(n, once)
	return time.Since(start), err
}

var errNoFloor = errors.New("no floor")

func (s *plain) stop() error { return nil }

// flush writes out what the others left dirty, so that nobody pays for it.
func flush() { unix.Sync() }

// replace replaces a file as a careful program does: readers and a power cut find
// the old content or the new one.
func replace(path string, fill func(f *os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), "new-")
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = unix.Fdatasync(int(f.Fd()))
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return os.Rename(f.Name(), path)
}

func replaceBytes(path string, data []byte, chunk int) error {
	return replace(path, func(f *os.File) (err error) {
		for off := 0; off < len(data) && err == nil; off += chunk {
			_, err = f.Write(data[off : off+chunk])
		}
		return err
	})
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	return replace(to, func(f *os.File) error {
		_, err := io.Copy(f, in) // copy_file_range
		return err
	})
}
