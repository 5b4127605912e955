package kernel

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strconv"
	"strings"
)

// debFiles are the parts of a linux-image package that matter.
type debFiles struct {
	image   []byte            // boot/vmlinuz-*
	modules map[string][]byte // by kernel name
}

// readDeb takes kernel and modules out of a Debian package. Nothing of it is
// installed or run, and no path of it is used as a path.
func readDeb(f *os.File, zstd unpacker) (*debFiles, error) {
	data, member, err := debData(f)
	if err != nil {
		return nil, err
	}
	r, wait, err := decompress(data, member, zstd)
	if err != nil {
		return nil, err
	}
	files, err := readDebTar(r)
	if err != nil {
		return nil, errors.Join(err, wait())
	}
	return files, wait()
}

// debData finds the member data.tar.* of the ar archive.
func debData(f *os.File) (io.Reader, string, error) {
	head := make([]byte, 8)
	if _, err := io.ReadFull(f, head); err != nil || string(head) != "!<arch>\n" {
		return nil, "", errors.New("not a Debian package (no ar archive)")
	}
	for {
		h := make([]byte, 60)
		if _, err := io.ReadFull(f, h); err != nil {
			return nil, "", errors.New("package has no data.tar")
		}
		name := strings.TrimRight(string(h[:16]), " /")
		size, err := strconv.ParseInt(strings.TrimSpace(string(h[48:58])), 10, 64)
		if err != nil || size < 0 || string(h[58:]) != "`\n" {
			return nil, "", errors.New("corrupt ar header")
		}
		if strings.HasPrefix(name, "data.tar") {
			return io.LimitReader(f, size), name, nil
		}
		if _, err := f.Seek(size+size&1, io.SeekCurrent); err != nil {
			return nil, "", err
		}
	}
}

// decompress unpacks a member by its name. Go has no xz, which Debian 12 uses:
// the program xz does that. wait reports how it ended.
func decompress(r io.Reader, member string, zstd unpacker) (out io.Reader, wait func() error, err error) {
	nothing := func() error { return nil }
	switch path.Ext(member) {
	case ".tar":
		return r, nothing, nil
	case ".gz":
		z, err := gzip.NewReader(r)
		return z, nothing, err
	case ".zst":
		z, err := zstd(r)
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case ".xz":
		return runXZ(r)
	}
	return nil, nil, fmt.Errorf("unknown package member %s", member)
}

func runXZ(r io.Reader) (io.Reader, func() error, error) {
	cmd := exec.Command("xz", "-dc")
	cmd.Stdin = r
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("the package needs the program xz (Debian: xz-utils): %w", err)
	}
	return out, func() error {
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("xz: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
		}
		return nil
	}, nil
}

// readDebTar keeps the kernel and those modules that could be of use.
func readDebTar(r io.Reader) (*debFiles, error) {
	files := &debFiles{modules: map[string][]byte{}}
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("package: %w", err)
		}
		name, isModule := moduleName(h.Name)
		switch {
		case h.Typeflag != tar.TypeReg:
		case strings.HasPrefix(path.Clean("/"+h.Name), "/boot/vmlinuz-"):
			if files.image, err = readMember(t, h, maxImage); err != nil {
				return nil, err
			}
		case isModule && maybeWanted(h.Name):
			if len(files.modules) >= maxModules {
				return nil, errors.New("package: too many modules")
			}
			if files.modules[name], err = readMember(t, h, maxModule); err != nil {
				return nil, err
			}
		}
	}
	if files.image == nil {
		return nil, errors.New("package has no /boot/vmlinuz-*: is it linux-image-VERSION?")
	}
	return files, nil
}

// maybeWanted keeps the parts of the module tree where wanted modules and their
// dependencies are, so that 90 MB of drivers need not be held in memory.
func maybeWanted(name string) bool {
	for _, dir := range []string{"/drivers/virtio/", "/drivers/char/", "/drivers/block/virtio", "/fs/", "/lib/", "/crypto/", "/arch/"} {
		if strings.Contains(name, dir) {
			return true
		}
	}
	return false
}

func readMember(r io.Reader, h *tar.Header, limit int64) ([]byte, error) {
	if h.Size > limit {
		return nil, fmt.Errorf("package: %s is larger than %d bytes", h.Name, limit)
	}
	b := make([]byte, h.Size)
	_, err := io.ReadFull(r, b)
	return b, err
}
