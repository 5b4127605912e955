package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CheckMappings maps a file in dir, privately and shared, and runs a copy of
// this program from there, called with args, which must print want. Without
// shared, shared mappings must fail with ENODEV and everything else must work.
func CheckMappings(dir string, shared bool, args []string, want string) error {
	path := filepath.Join(dir, "mapped")
	content := bytes.Repeat([]byte("0123456789abcdef"), 1000)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := checkPrivate(f, content); err != nil {
		return fmt.Errorf("private mapping: %w", err)
	}
	for _, prot := range []int{unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE} {
		m, err := unix.Mmap(int(f.Fd()), 0, len(content), prot, unix.MAP_SHARED)
		switch {
		case !shared && !errors.Is(err, unix.ENODEV):
			return fmt.Errorf("shared mapping with protection %d: %w, want ENODEV", prot, err)
		case shared && err != nil:
			return fmt.Errorf("shared mapping with protection %d: %w", prot, err)
		case err == nil:
			if !bytes.Equal(m, content) {
				return errors.New("a shared mapping shows something else")
			}
			_ = unix.Munmap(m)
		}
	}
	return runCopy(filepath.Join(dir, "program"), args, want)
}

// checkPrivate maps the file, changes the mapping and finds the file unchanged.
func checkPrivate(f *os.File, content []byte) error {
	m, err := unix.Mmap(int(f.Fd()), 0, len(content), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(m)
	if !bytes.Equal(m, content) {
		return errors.New("it shows something else")
	}
	copy(m, "changed")
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err == nil && !bytes.Equal(got, content) {
		err = errors.New("what was written to it is in the file")
	}
	return err
}

func runCopy(path string, args []string, want string) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, self, 0o755); err != nil {
		return err
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil || string(out) != want {
		return fmt.Errorf("a program that was copied here: %w, prints %q, want %q", err, out, want)
	}
	return nil
}
