package kernel

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxImage bounds an unpacked kernel in bytes.
const maxImage = 256 << 20

// unpacker decompresses zstd.
type unpacker func(io.Reader) (io.ReadCloser, error)

// image is a kernel image ready to boot.
type image struct {
	name    string // "vmlinux" or "bzImage"
	data    []byte
	release string // uname -r
}

// parseImage looks at a kernel image. From a bzImage whose compression it knows
// it takes the ELF inside: booting that directly saves about 200 ms under TCG.
func parseImage(b []byte, zstd unpacker) (*image, error) {
	if isPVH(b) {
		return &image{name: "vmlinux", data: b, release: bannerRelease(b)}, nil
	}
	if bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return nil, errors.New("ELF file without a PVH entry note (CONFIG_PVH=y is needed)")
	}
	if len(b) < 0x260 || string(b[0x202:0x206]) != "HdrS" {
		return nil, errors.New("neither an ELF vmlinux nor a bzImage")
	}
	img := &image{name: "bzImage", data: b, release: headerRelease(b)}
	if vmlinux, err := extractVmlinux(b, zstd); err == nil && isPVH(vmlinux) {
		img.name, img.data = "vmlinux", vmlinux
	}
	if img.release == "" {
		return nil, errors.New("bzImage without a version")
	}
	return img, nil
}

// headerRelease reads the version text that a bzImage's setup header points to
// (Linux Documentation/arch/x86/boot.rst, kernel_version).
func headerRelease(b []byte) string {
	off := int(binary.LittleEndian.Uint16(b[0x20e:])) + 0x200
	if off == 0x200 || off >= len(b) {
		return ""
	}
	word, _, _ := bytes.Cut(b[off:min(len(b), off+256)], []byte(" "))
	if !plausibleRelease(word) {
		return ""
	}
	return string(word)
}

// bannerRelease finds "Linux version RELEASE " in an uncompressed kernel.
func bannerRelease(b []byte) string {
	banner := []byte("Linux version ")
	for {
		i := bytes.Index(b, banner)
		if i < 0 {
			return ""
		}
		b = b[i+len(banner):]
		word, _, _ := bytes.Cut(b[:min(len(b), 256)], []byte(" "))
		if plausibleRelease(word) {
			return string(word)
		}
	}
}

func plausibleRelease(w []byte) bool {
	if len(w) == 0 || len(w) > 64 || w[0] < '0' || w[0] > '9' {
		return false
	}
	for _, c := range w {
		if c <= ' ' || c > '~' || c == '/' {
			return false
		}
	}
	return true
}

// extractVmlinux decompresses the payload of a bzImage.
func extractVmlinux(b []byte, zstd unpacker) ([]byte, error) {
	setup := (int(b[0x1f1]) + 1) * 512
	if b[0x1f1] == 0 {
		setup = 5 * 512 // boot.rst: 0 means 4
	}
	off := uint64(setup) + uint64(binary.LittleEndian.Uint32(b[0x248:]))
	end := off + uint64(binary.LittleEndian.Uint32(b[0x24c:]))
	if end > uint64(len(b)) || end-off < 8 {
		return nil, errors.New("payload outside the image")
	}
	p := b[off:end]
	switch {
	case binary.LittleEndian.Uint32(p) == lz4Legacy:
		return unpackLZ4(p, maxImage)
	case bytes.HasPrefix(p, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		z.Multistream(false)
		return readLimited(z)
	case bytes.HasPrefix(p, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		return readLimited(z)
	case bytes.HasPrefix(p, []byte("BZh")):
		return readLimited(bzip2.NewReader(bytes.NewReader(p)))
	}
	return nil, fmt.Errorf("unknown compression %x", p[:4])
}

// readLimited reads a decompressed kernel. Bytes behind the stream (the length
// the kernel's build appends) may make its reader fail after a whole image.
func readLimited(r io.Reader) ([]byte, error) {
	var out bytes.Buffer
	n, err := io.Copy(&out, io.LimitReader(r, maxImage+1))
	if n > maxImage {
		return nil, errors.New("unpacked kernel beyond 256 MiB")
	}
	if err != nil && !bytes.HasPrefix(out.Bytes(), []byte(elf.ELFMAG)) {
		return nil, err
	}
	return out.Bytes(), nil
}

// xenPhys32Entry is XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point.
const xenPhys32Entry = 18

// isPVH reports whether b is a 64-bit ELF file with a PVH entry note, which is
// what QEMU boots without a boot loader.
func isPVH(b []byte) bool {
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return false
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil || f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err == nil && hasNote(notes, "Xen\x00", xenPhys32Entry) {
			return true
		}
	}
	return false
}

func hasNote(b []byte, name string, typ uint32) bool {
	for len(b) >= 12 {
		namesz, descsz := uint64(binary.LittleEndian.Uint32(b)), uint64(binary.LittleEndian.Uint32(b[4:]))
		t := binary.LittleEndian.Uint32(b[8:])
		next := 12 + (namesz+3)&^3 + (descsz+3)&^3
		if next > uint64(len(b)) {
			return false
		}
		if t == typ && string(b[12:12+namesz]) == name {
			return true
		}
		b = b[next:]
	}
	return false
}
