package ext4

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

func dir(entries ...Entry) *Inode { return &Inode{Mode: Dir | 0o755, Sec: 1, Entries: entries} }

func file(size int64) *Inode { return &Inode{Mode: Regular | 0o644, Size: size} }

// content is the byte with which a file is filled.
func content(i *Inode) byte { return byte(i.number%255) + 1 }

// write makes an image in a file. Files up to 1 MiB get content, larger ones a
// first and a last byte.
func write(t testing.TB, root *Inode, files ...*Inode) (*Image, string) {
	t.Helper()
	m, err := New(root, files, [16]byte{1, 2, 3})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "ext4")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.WriteMeta(f); err != nil {
		t.Fatal(err)
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil || at != m.Data() {
		t.Fatalf("metadata ends at %d, data begins at %d, %v", at, m.Data(), err)
	}
	for _, i := range files {
		fill := []byte{content(i)}
		if i.Size <= 1<<20 {
			fill = bytes.Repeat(fill, int(i.Size))
		} else if _, err := f.WriteAt(fill, at+i.Size-1); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(fill, at); err != nil {
			t.Fatal(err)
		}
		at += i.Size + Padding(i.Size)
	}
	if at > m.Size() {
		t.Fatalf("data ends at %d, the image at %d", at, m.Size())
	}
	if err := f.Truncate(m.Size()); err != nil {
		t.Fatal(err)
	}
	return m, f.Name()
}

// fsck demands that e2fsck finds nothing at all.
func fsck(t testing.TB, image string) {
	t.Helper()
	bin := prereq.Program(t, "e2fsck", "e2fsprogs")
	if out, err := exec.Command(bin, "-fn", image).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

func debugfs(t testing.TB, image, command string) string {
	t.Helper()
	bin := prereq.Program(t, "debugfs", "e2fsprogs")
	out, err := exec.Command(bin, "-R", command, image).Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", command, err)
	}
	return string(out)
}

// many is a directory with n entries made by one function.
func many(n int, format string, make func() *Inode) *Inode {
	d := dir()
	for k := range n {
		d.Entries = append(d.Entries, Entry{fmt.Sprintf(format, k), make()})
	}
	return d
}

func empty() *Inode { return file(0) }

func TestImages(t *testing.T) {
	big := file(300 << 30 / 4) // 75 GiB: two leaves of extents
	four := file(512<<20 + 1)  // one extent more than the inode holds
	wide := file(200 << 20)    // across groups
	one := file(1)
	linked := file(5000)
	hard := dir()
	for k := range 1000 {
		hard.Entries = append(hard.Entries, Entry{fmt.Sprint(k), linked})
	}
	for name, tt := range map[string]struct {
		root  *Inode
		files []*Inode
		stat  map[string]string // debugfs command to a part of the answer
	}{
		"empty":      {root: dir(), stat: map[string]string{"stat <11>": "Mode:  0700", "stat <2>": "Links: 3"}},
		"lost+found": {root: dir(Entry{"lost+found", dir(Entry{"x", one})}), files: []*Inode{one}, stat: map[string]string{"stat /lost+found": "Inode: 11 "}},
		"big": {root: dir(Entry{"big", big}, Entry{"four", four}, Entry{"wide", wide}), files: []*Inode{wide, big, four},
			stat: map[string]string{"stat /big": "Size: 80530636800", "stat /four": "(ETB0):"}},
		"more inodes than a group":   {root: dir(Entry{"d", many(70000, "%d", empty)})},
		"more directories than fit":  {root: dir(Entry{"d", many(65010, "%d", func() *Inode { return dir() })}), stat: map[string]string{"stat /d": "Links: 1 "}},
		"long names":                 {root: dir(Entry{"d", many(100, strings.Repeat("n", 250)+"%04d", empty)})},
		"hard links":                 {root: dir(Entry{"d", hard}), files: []*Inode{linked}, stat: map[string]string{"stat /d/7": "Links: 1000"}},
		"devices":                    {root: dir(Entry{"c", &Inode{Mode: Char | 0o600, Major: 300, Minor: 70000}}, Entry{"b", &Inode{Mode: Block, Major: 8, Minor: 1}}, Entry{"p", &Inode{Mode: FIFO}}), stat: map[string]string{"stat /c": "300:70000", "stat /b": "08:01", "stat /p": "FIFO"}},
		"times, owners":              {root: dir(Entry{"f", &Inode{Mode: Regular | 0o4755, UID: 70000, GID: 80000, Sec: 1 << 33, Nsec: 5}}, Entry{"old", &Inode{Mode: Regular, Sec: -5}}), stat: map[string]string{"stat /f": "User: 70000", "stat /old": "1969"}},
		"symbolic links":             {root: dir(Entry{"fast", link(59)}, Entry{"slow", link(60)}, Entry{"longest", link(4095)}), stat: map[string]string{"stat /fast": "Fast link dest", "cat /slow": strings.Repeat("t", 60), "cat /longest": strings.Repeat("t", 4095)}},
		"attributes beside the rest": {root: dir(Entry{"l", attrs(link(100), 3)}, Entry{"d", attrs(dir(), 40)}, Entry{"p", attrs(&Inode{Mode: FIFO}, 40)})},
	} {
		t.Run(name, func(t *testing.T) {
			_, image := write(t, tt.root, tt.files...)
			fsck(t, image)
			for command, want := range tt.stat {
				if got := debugfs(t, image, command); !strings.Contains(got, want) {
					t.Errorf("%s: no %q in\n%s", command, want, got)
				}
			}
			for _, i := range tt.files {
				if i.Size > 1<<20 {
					continue
				}
				got := debugfs(t, image, fmt.Sprintf("cat <%d>", i.number))
				if want := strings.Repeat(string([]byte{content(i)}), int(i.Size)); got != want {
					t.Errorf("inode %d has other content", i.number)
				}
			}
		})
	}
}

func link(n int) *Inode { return &Inode{Mode: Symlink | 0o777, Target: strings.Repeat("t", n)} }

func attrs(i *Inode, n int) *Inode {
	i.Xattrs = map[string]string{}
	for k := range n {
		i.Xattrs[fmt.Sprintf("trusted.%0*d", k%9+1, k)] = strings.Repeat("v", 2*k)
	}
	return i
}

func TestRefuses(t *testing.T) {
	twice := dir()
	hard := file(0)
	for name, root := range map[string]*Inode{
		"an empty name":             dir(Entry{"", file(0)}),
		"a long name":               dir(Entry{strings.Repeat("n", 256), file(0)}),
		"a directory twice":         dir(Entry{"a", twice}, Entry{"b", twice}),
		"too many links":            many(65001, "%d", func() *Inode { return hard }),
		"a file lost+found":         dir(Entry{"lost+found", file(0)}),
		"a file too large":          dir(Entry{"f", file(MaxSize + 1)}),
		"a negative size":           dir(Entry{"f", file(-1)}),
		"an empty link":             dir(Entry{"l", link(0)}),
		"a long link":               dir(Entry{"l", link(4096)}),
		"an unknown type":           dir(Entry{"s", &Inode{Mode: 0xc000}}),
		"too many attributes":       dir(Entry{"f", attrs(file(0), 70)}),
		"a strange attribute":       dir(Entry{"f", &Inode{Mode: Regular, Xattrs: map[string]string{"system.x": ""}}}),
		"an attribute without name": dir(Entry{"f", &Inode{Mode: Regular, Xattrs: map[string]string{"user.": ""}}}),
		"a long attribute name":     dir(Entry{"f", &Inode{Mode: Regular, Xattrs: map[string]string{"user." + strings.Repeat("a", 256): ""}}}),
		"a file without its data":   dir(Entry{"f", file(1)}),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(root, nil, [16]byte{}); err == nil {
				t.Error("no error")
			}
		})
	}
	f := file(1)
	if _, err := New(dir(Entry{"f", f}), []*Inode{f, f}, [16]byte{}); err == nil {
		t.Error("no error for data that comes twice")
	}
}

// drawTree makes a tree of every kind of thing.
func drawTree(t *rapid.T, depth int, files *[]*Inode) *Inode {
	d := dir()
	for k := range rapid.IntRange(0, 12).Draw(t, "entries") {
		name := fmt.Sprintf("%d%s", k, strings.Repeat("n", rapid.IntRange(0, 250).Draw(t, "name")))
		var i *Inode
		switch kind := rapid.IntRange(0, 5).Draw(t, "kind"); {
		case kind == 0 && depth > 0:
			i = drawTree(t, depth-1, files)
		case kind == 1:
			i = link(rapid.SampledFrom([]int{1, 59, 60, 4095}).Draw(t, "target"))
		case kind == 2 && len(*files) > 0:
			i = rapid.SampledFrom(*files).Draw(t, "hard link")
		case kind == 3:
			i = &Inode{Mode: Char | 0o600, Major: rapid.Uint32Range(0, 4095).Draw(t, "major"), Minor: rapid.Uint32Range(0, 1<<20-1).Draw(t, "minor")}
		default:
			i = file(rapid.SampledFrom([]int64{1, 4095, 4096, 4097, 70000}).Draw(t, "size"))
			*files = append(*files, i)
		}
		if i.Xattrs == nil {
			attrs(i, rapid.IntRange(0, 30).Draw(t, "attributes"))
		}
		d.Entries = append(d.Entries, Entry{name, i})
	}
	return d
}

func TestAnyTree(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var files []*Inode
		root := drawTree(rt, 3, &files)
		_, image := write(t, root, files...)
		defer os.Remove(image)
		fsck(t, image)
	})
}

func TestEqualTreesGiveEqualBytes(t *testing.T) {
	var sums [2][32]byte
	for n := range sums {
		f := file(70000)
		_, image := write(t, dir(Entry{"d", attrs(dir(Entry{"f", f}), 30)}), f)
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		sums[n] = sha256.Sum256(b)
	}
	if sums[0] != sums[1] {
		t.Error("two images of one tree differ")
	}
}

// The kernel reads what was written, and refuses to write.
func TestKernelReads(t *testing.T) {
	prereq.Root(t, "mount an image")
	big, small := file(600<<20), file(70000)
	big.Xattrs = map[string]string{"user.inline": "x"}
	attrs(small, 30)
	_, image := write(t, dir(Entry{"big", big}, Entry{"d", many(3000, "%d", empty)}, Entry{"l", link(300)}, Entry{"small", small}), small, big)
	at := t.TempDir()
	prereq.LoopMount(t, image, at, "ro")
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	if got, err := os.ReadFile(filepath.Join(at, "small")); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{content(small)}, 70000)) {
		t.Errorf("small has other content (%d bytes, %v)", len(got), err)
	}
	b := make([]byte, 1)
	f, err := os.Open(filepath.Join(at, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(b, 600<<20-1); err != nil || b[0] != content(big) {
		t.Errorf("the last byte of big is %d, %v", b[0], err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if list, err := os.ReadDir(filepath.Join(at, "d")); err != nil || len(list) != 3000 {
		t.Errorf("%d entries, %v", len(list), err)
	}
	if got, err := os.Readlink(filepath.Join(at, "l")); err != nil || got != strings.Repeat("t", 300) {
		t.Errorf("link %q, %v", got, err)
	}
	for name, want := range small.Xattrs {
		v := make([]byte, 256)
		n, err := unix.Lgetxattr(filepath.Join(at, "small"), name, v)
		if err != nil || string(v[:max(n, 0)]) != want {
			t.Errorf("%s = %q, %v", name, v[:max(n, 0)], err)
		}
	}
	if err := unix.Mount("", at, "", unix.MS_REMOUNT, ""); err == nil {
		t.Error("the kernel would write to it")
	}
}
