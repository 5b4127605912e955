package kernel

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// fakeVmlinux is an ELF file with a PVH entry note and a banner.
func fakeVmlinux(release string) []byte {
	note := binary.LittleEndian.AppendUint32(nil, 4)
	note = binary.LittleEndian.AppendUint32(note, 4)
	note = binary.LittleEndian.AppendUint32(note, xenPhys32Entry)
	note = append(note, "Xen\x00\x00\x00\x10\x00"...)
	return buildELF(elf.PT_NOTE, note, "", []byte("noise Linux version "+release+" (builder) #1\x00"))
}

// fakeModule is an object file with a .modinfo section.
func fakeModule(depends string) []byte {
	return buildELF(elf.PT_NULL, nil, ".modinfo", []byte("license=GPL\x00depends="+depends+"\x00name=x\x00"))
}

// buildELF makes a 64-bit x86 ELF file with one segment and one section.
func buildELF(segType elf.ProgType, segment []byte, section string, data []byte) []byte {
	const ehdr, phdr, shdr = 64, 56, 64
	segOff := uint64(ehdr + phdr)
	dataOff := segOff + uint64(len(segment))
	names := "\x00" + section + "\x00.shstrtab\x00"
	nameOff := dataOff + uint64(len(data))
	shOff := nameOff + uint64(len(names))
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	put(elf.Header64{
		Ident:   [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1},
		Type:    uint16(elf.ET_EXEC),
		Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: ehdr, Shoff: shOff,
		Ehsize: ehdr, Phentsize: phdr, Phnum: 1, Shentsize: shdr, Shnum: 3, Shstrndx: 2,
	})
	put(elf.Prog64{Type: uint32(segType), Off: segOff, Filesz: uint64(len(segment)), Memsz: uint64(len(segment))})
	b.Write(segment)
	b.Write(data)
	b.WriteString(names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: dataOff, Size: uint64(len(data))})
	put(elf.Section64{Name: uint32(len(section) + 2), Type: uint32(elf.SHT_STRTAB), Off: nameOff, Size: uint64(len(names))})
	return b.Bytes()
}

// fakeBzImage wraps a payload as the kernel's build does.
func fakeBzImage(release string, payload []byte) []byte {
	const setupSects = 4
	b := make([]byte, (setupSects+1)*512)
	b[0x1f1] = setupSects
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x300)
	copy(b[0x500:], release+" (builder) #1\x00")
	binary.LittleEndian.PutUint32(b[0x248:], 16)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	return append(append(b, make([]byte, 16)...), payload...)
}

// lz4Literals is a legacy lz4 stream of literals only, with the length that
// the kernel's build appends.
func lz4Literals(data []byte) []byte {
	block := []byte{0xf0}
	n := len(data) - 15
	for ; n >= 255; n -= 255 {
		block = append(block, 255)
	}
	block = append(append(block, byte(n)), data...)
	out := binary.LittleEndian.AppendUint32(nil, lz4Legacy)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(block)))
	out = append(out, block...)
	return binary.LittleEndian.AppendUint32(out, uint32(len(data)))
}

func gzipped(data []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(data)
	z.Close()
	return b.Bytes()
}

func TestParseImage(t *testing.T) {
	vmlinux := fakeVmlinux("6.1.9-msb")
	tests := map[string]struct {
		in            []byte
		name, release string
	}{
		"vmlinux":          {vmlinux, "vmlinux", "6.1.9-msb"},
		"lz4":              {fakeBzImage("6.1.0-5-amd64", lz4Literals(vmlinux)), "vmlinux", "6.1.0-5-amd64"},
		"gzip":             {fakeBzImage("6.1.0-5-amd64", append(gzipped(vmlinux), 1, 2, 3, 4)), "vmlinux", "6.1.0-5-amd64"},
		"unknown":          {fakeBzImage("6.1.0-5-amd64", []byte("whatever it may be")), "bzImage", "6.1.0-5-amd64"},
		"payload too long": {fakeBzImage("6.1", vmlinux)[:3000], "bzImage", "6.1"},
		"no PVH":           {buildELF(elf.PT_LOAD, nil, "", nil), "", ""},
		"text":             {[]byte("hello"), "", ""},
		"empty":            {nil, "", ""},
		"no version":       {fakeBzImage("", nil), "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			img, err := parseImage(tt.in, unzstd)
			if (err != nil) != (tt.name == "") {
				t.Fatalf("parseImage: %v", err)
			}
			if err == nil && (img.name != tt.name || img.release != tt.release) {
				t.Errorf("got %s %q, want %s %q", img.name, img.release, tt.name, tt.release)
			}
			if err == nil && tt.name == "vmlinux" && !bytes.Equal(img.data, vmlinux) {
				t.Error("not the kernel that was packed")
			}
		})
	}
}

func TestLZ4Matches(t *testing.T) {
	// "abc", then 9 bytes from 3 back, then the literals "xyzzy".
	block := []byte{0x35, 'a', 'b', 'c', 3, 0, 0x50, 'x', 'y', 'z', 'z', 'y'}
	out, err := appendLZ4Block(nil, block, 100)
	if err != nil || string(out) != "abcabcabcabcxyzzy" {
		t.Errorf("%q, %v", out, err)
	}
	for name, bad := range map[string][]byte{
		"offset 0":          {0x10, 'a', 0, 0},
		"offset too far":    {0x10, 'a', 2, 0, 0},
		"literals cut":      {0xf0, 200, 'a'},
		"length never ends": bytes.Repeat([]byte{0xff}, 50),
		"no final sequence": {0x10, 'a', 1, 0},
		"beyond the limit":  {0x1f, 'a', 1, 0, 255, 0, 0},
	} {
		if out, err := appendLZ4Block(nil, bad, 100); !errors.Is(err, errLZ4) {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
}

// FuzzUnpackLZ4: an image is foreign. Nothing panics, nothing beyond the limit.
func FuzzUnpackLZ4(f *testing.F) {
	f.Add(lz4Literals(bytes.Repeat([]byte("kernel"), 100)))
	f.Add([]byte("\x02\x21\x4c\x18\x0c\x00\x00\x00\x35abc\x03\x00\x50xyzzy"))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 16
		if out, err := unpackLZ4(b, limit); err == nil && len(out) > limit {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

// FuzzParseImage: nothing panics on any file a user may name.
func FuzzParseImage(f *testing.F) {
	f.Add(fakeVmlinux("6.1"))
	f.Add(fakeBzImage("6.1", lz4Literals(fakeVmlinux("6.1"))))
	f.Add(fakeModule("a,b"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseImage(b, unzstd)
		_, _ = parseModule("m", b)
	})
}

func TestCollectModules(t *testing.T) {
	files := map[string][]byte{
		"virtio_ring": fakeModule(""), "virtio": fakeModule("virtio_ring"), "virtio_mmio": fakeModule("virtio,virtio-ring"),
		"virtio_console": fakeModule("virtio,virtio_ring"), "fuse": fakeModule(""), "virtiofs": fakeModule("fuse,virtio"),
		"fat": fakeModule(""), "vfat": fakeModule("fat"), "nls_cp437": fakeModule(""),
		"xfs": fakeModule("libcrc32c"), // which is built in
	}
	mods, boot, err := collectModules(memModules(files))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, m := range mods {
		got = append(got, m.name)
		for _, d := range m.depends {
			if _, exists := files[d]; exists && !slices.Contains(got[:i], d) {
				t.Errorf("%s comes before %s, which it needs", m.name, d)
			}
		}
	}
	if boot != 6 || len(mods) != len(files) {
		t.Errorf("%d of %d at boot: %q", boot, len(mods), got)
	}
	if vfat := mods[slices.Index(got, "vfat")]; !slices.Contains(vfat.depends, "nls_cp437") {
		t.Error("vfat would be loaded without its code page")
	}
	if _, _, err := collectModules(memModules(map[string][]byte{"virtiofs": []byte("junk")})); err == nil {
		t.Error("a module that is none was accepted")
	}
}

// readCPIO is the kernel's view of an archive.
func readCPIO(t *testing.T, b []byte) map[string]entry {
	t.Helper()
	out := map[string]entry{}
	for {
		if len(b) < 110 || string(b[:6]) != "070701" {
			t.Fatalf("no header in %d bytes", len(b))
		}
		field := func(i int) uint32 {
			v, err := strconv.ParseUint(string(b[6+8*i:14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return uint32(v)
		}
		align := func(n int) int { return (n + 3) &^ 3 }
		size, nameLen := int(field(6)), int(field(11))
		name := string(b[110 : 110+nameLen-1])
		start := align(110 + nameLen)
		if name == "TRAILER!!!" {
			return out
		}
		out[name] = entry{name: name, mode: field(1), major: field(9), minor: field(10), data: b[start : start+size]}
		b = b[align(start+size):]
	}
}

// deb makes a package; compression is "", ".gz".
func deb(t *testing.T, compression string, files map[string][]byte) string {
	t.Helper()
	var tb bytes.Buffer
	w := tar.NewWriter(&tb)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: "./" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	data := tb.Bytes()
	if compression == ".gz" {
		data = gzipped(data)
	}
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar.gz", []byte("odd")}, {"data.tar" + compression, data}} {
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", m.name, 0, 0, 0, 0o644, len(m.data))
		b.Write(m.data)
		if len(m.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	path := filepath.Join(t.TempDir(), "linux-image.deb")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func stockFiles() map[string][]byte {
	dir := "lib/modules/6.1.0-5-amd64/kernel/"
	return map[string][]byte{
		"boot/vmlinuz-6.1.0-5-amd64":           fakeBzImage("6.1.0-5-amd64", lz4Literals(fakeVmlinux("6.1.0-5-amd64"))),
		dir + "drivers/virtio/virtio.ko":       fakeModule(""),
		dir + "drivers/char/virtio_console.ko": fakeModule("virtio"),
		dir + "fs/squashfs/squashfs.ko":        fakeModule(""),
		dir + "drivers/gpu/huge.ko":            fakeModule(""),
	}
}

func TestAddFindRemove(t *testing.T) {
	t.Setenv(EnvVar, "")
	ctx, h := context.Background(), home.Dir(t.TempDir())
	agent := []byte("the agent")
	if _, err := Find(h, agent); !errdefs.Is(err, errdefs.LibraryNotLoaded) || !strings.Contains(hint(err), "make kernel-stock") {
		t.Errorf("Find in an empty home: %v (%s)", err, hint(err))
	}
	stock, err := Add(ctx, h, fetcher.InProcess{}, deb(t, ".gz", stockFiles()), "")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Add(ctx, h, fetcher.InProcess{}, deb(t, "", stockFiles()), ""); err != nil || again != stock {
		t.Errorf("the same kernel again: %q, %v", again, err)
	}
	k, err := Find(h, agent)
	if err != nil || k.Hash != stock || k.Own || k.Release != "6.1.0-5-amd64" || filepath.Base(k.Image) != "vmlinux" {
		t.Fatalf("Find = %+v, %v", k, err)
	}
	b, err := os.ReadFile(k.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	files := readCPIO(t, b)
	if got := string(files["m/order"].data); got != "virtio\nvirtio_console virtio\n-\nsquashfs\n" {
		t.Errorf("m/order = %q", got)
	}
	if c := files["dev/console"]; c.mode != modeChar|0o600 || c.major != 5 || c.minor != 1 {
		t.Errorf("dev/console = %+v", c)
	}
	if i := files["init"]; string(i.data) != "the agent" || i.mode != modeFile|0o755 {
		t.Errorf("init = %+v", i)
	}

	own := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(own, fakeVmlinux("6.1.9-msb"), 0o600); err != nil {
		t.Fatal(err)
	}
	hash, err := Add(ctx, h, fetcher.InProcess{}, own, "")
	if err != nil {
		t.Fatal(err)
	}
	if k, err = Find(h, agent); err != nil || k.Hash != hash || !k.Own {
		t.Errorf("an own build is not preferred: %+v, %v", k, err)
	}
	t.Setenv(EnvVar, stock[:6])
	if k, err = Find(h, agent); err != nil || k.Hash != stock {
		t.Errorf("%s=%s: %+v, %v", EnvVar, stock[:6], k, err)
	}
	t.Setenv(EnvVar, own)
	if k, err = Find(h, agent); err != nil || k.Image != own || !k.Own {
		t.Errorf("%s=%s: %+v, %v", EnvVar, own, k, err)
	}
	t.Setenv(EnvVar, "nosuch")
	if _, err = Find(h, agent); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("%s=nosuch: %v", EnvVar, err)
	}
	if err := Remove(h, stock); err != nil {
		t.Fatal(err)
	}
	if list, err := List(h); err != nil || len(list) != 1 || list[0].Hash != hash {
		t.Errorf("after Remove: %+v, %v", list, err)
	}
}

func hint(err error) string {
	var e *errdefs.Error
	errors.As(err, &e)
	return e.Hint
}

func TestFindKeepsOneArchivePerAgent(t *testing.T) {
	t.Setenv(EnvVar, "")
	h := home.Dir(t.TempDir())
	if _, err := Add(context.Background(), h, fetcher.InProcess{}, deb(t, "", stockFiles()), ""); err != nil {
		t.Fatal(err)
	}
	first, err := Find(h, []byte("one"))
	if err != nil {
		t.Fatal(err)
	}
	before, _ := os.Stat(first.Initrd)
	again, err := Find(h, []byte("one"))
	if err != nil || again.Initrd != first.Initrd {
		t.Fatalf("%+v, %v", again, err)
	}
	if after, _ := os.Stat(first.Initrd); !os.SameFile(before, after) {
		t.Error("the archive was written again")
	}
	// Leftovers of a killed writer and archives long unused go with the next one.
	old := time.Now().Add(-30 * 24 * time.Hour)
	junk := filepath.Join(h.Kernels(), ".adding-123")
	if err := os.Mkdir(junk, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{junk, first.Initrd} {
		if err := os.Chtimes(p, old, old); err != nil {
			t.Fatal(err)
		}
	}
	second, err := Find(h, []byte("two"))
	if err != nil || second.Initrd == first.Initrd {
		t.Fatalf("%+v, %v", second, err)
	}
	for _, p := range []string{junk, first.Initrd} {
		if _, err := os.Stat(p); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
	if _, err := Find(h, nil); !errdefs.Is(err, errdefs.LibraryNotLoaded) {
		t.Errorf("Find without an agent: %v", err)
	}
}

func TestAddRefuses(t *testing.T) {
	h := home.Dir(t.TempDir())
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	for name, path := range map[string]string{
		"missing":        filepath.Join(dir, "none"),
		"a directory":    dir,
		"text":           write("text", "hello"),
		"no ar archive":  write("a.deb", "hello"),
		"no data member": write("b.deb", "!<arch>\n"),
		"bad ar header":  write("c.deb", "!<arch>\n"+strings.Repeat("x", 60)),
		"no kernel":      deb(t, "", map[string][]byte{"usr/share/doc/x": nil}),
		"unknown member": deb(t, ".lzma", nil),
	} {
		if _, err := Add(context.Background(), h, fetcher.InProcess{}, path, ""); !errdefs.Is(err, errdefs.InvalidConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, _ := os.ReadDir(h.Kernels()); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// FuzzReadDeb: a package may be anything; xz is not run by the fuzzer.
func FuzzReadDeb(f *testing.F) {
	f.Add([]byte("!<arch>\n" + strings.Repeat(" ", 58) + "`\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.Contains(b, []byte(".xz")) {
			return
		}
		file, err := os.CreateTemp(t.TempDir(), "deb")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		_, _ = file.Write(b)
		_, _ = file.Seek(0, io.SeekStart)
		_, _ = readDeb(file, unzstd)
	})
}

func unzstd(r io.Reader) (io.ReadCloser, error) {
	return fetcher.InProcess{}.Decompress(context.Background(), fetch.Zstd, r)
}
