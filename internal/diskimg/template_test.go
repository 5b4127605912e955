package diskimg

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// readImage is all that an image holds.
func readImage(t testing.TB, path string) []extent {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	extents, err := readExtents(f, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return extents
}

func sameExtents(a, b []extent) bool {
	return slices.EqualFunc(a, b, func(a, b extent) bool { return a.off == b.off && bytes.Equal(a.data, b.data) })
}

// only returns the name of the only template.
func only(t testing.TB, templates string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(templates, "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("templates %q, %v", names, err)
	}
	return names[0]
}

var longAgo = time.Unix(1, 0)

// age makes a file look old: one made anew does not.
func age(t testing.TB, path string) {
	t.Helper()
	if err := os.Chtimes(path, longAgo, longAgo); err != nil {
		t.Fatal(err)
	}
}

func isAged(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.ModTime().Equal(longAgo)
}

// TestTemplateIsWhatMkfsMakes: an image made from a template is, byte for byte,
// the one that mkfs.ext4 makes with that UUID, for every size.
func TestTemplateIsWhatMkfsMakes(t *testing.T) {
	e2fsck := needTools(t)
	sizes := []int64{
		MinSizeMiB * mib, 3 * mib, 4*mib - 1, 5*mib + 512, 9 * mib, 17 * mib, 33*mib + 1, 63 * mib, 64 * mib, 68*mib - 1, 129 * mib, 131*mib + 4095,
		1000 * mib, 1 << 30, 4 << 30, 17<<30 + 1, 100 << 30, maxTemplateSize,
	}
	const seed = 1
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, most := range []int64{64 * mib, 1 << 30, 64 << 30} {
		for range 6 {
			sizes = append(sizes, MinSizeMiB*mib+rnd.Int64N(most))
		}
	}
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := storetest.Memory(t)
			opt := FormatOptions{Label: "data", Templates: filepath.Join(dir, "templates")}
			for i := range 2 {
				if err := FormatExt4(t.Context(), filepath.Join(dir, fmt.Sprint("first", i)), size, opt); err != nil {
					t.Fatal(err)
				}
				age(t, only(t, opt.Templates))
			}
			if b, err := os.ReadFile(only(t, opt.Templates)); err != nil || len(b) < 4096 {
				t.Fatalf("the template has %d bytes, %v", len(b), err)
			}
			opt.UUID = randomUUID()
			path, plain := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "plain.raw")
			if err := FormatExt4(t.Context(), path, size, opt); err != nil {
				t.Fatal(err)
			}
			if !isAged(only(t, opt.Templates)) {
				t.Error("the template was not used")
			}
			opt.Templates = ""
			if err := FormatExt4(t.Context(), plain, size, opt); err != nil {
				t.Fatal(err)
			}
			if !sameExtents(readImage(t, path), readImage(t, plain)) {
				t.Error("the image is not what mkfs.ext4 makes")
			}
			if fi, err := os.Stat(path); err != nil || fi.Size() != size || fi.Mode() != 0o600 {
				t.Errorf("%v, %v", fi, err)
			}
			if out, err := exec.Command(e2fsck, "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
}

// TestTemplateTakesFewExtents: what the host has to allocate, and to free when
// the volume goes.
func TestTemplateTakesFewExtents(t *testing.T) {
	needTools(t)
	dir := t.TempDir()
	opt := FormatOptions{Templates: filepath.Join(dir, "templates")}
	for i := range 2 {
		if err := FormatExt4(t.Context(), filepath.Join(dir, fmt.Sprint(i)), 1<<30, opt); err != nil {
			t.Fatal(err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "1"), &st); err != nil || st.Blocks*512 > 256<<10 {
		t.Errorf("%d bytes allocated, %v", st.Blocks*512, err)
	}
	// Group 0, its directories, the journal
	// and the copies of the superblock in groups 1, 3, 5 and 7.
	if extents := joined(readImage(t, filepath.Join(dir, "1")), 4096); len(extents) != 7 {
		t.Errorf("%d extents", len(extents))
	}
}

// TestTemplateUUIDs: no two images have the same, nor the same seed of hashes.
func TestTemplateUUIDs(t *testing.T) {
	needTools(t)
	dir := storetest.Memory(t)
	seen := map[string]bool{}
	const images = 20
	for i := range images {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := FormatExt4(t.Context(), path, 8*mib, FormatOptions{Templates: filepath.Join(dir, "templates")}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sb := b[superAt:]
		seen["uuid "+string(sb[superUUID:][:16])], seen["seed "+string(sb[superHashSeed:][:16])] = true, true
	}
	if len(seen) != 2*images {
		t.Errorf("%d different ones in %d images", len(seen), images)
	}
}

// TestUnusableTemplates: what is not the template of this size, made by this
// mkfs.ext4, and whole, is never used, and replaced.
func TestUnusableTemplates(t *testing.T) {
	needTools(t)
	const size = 8 * mib
	rewrite := func(change func(b []byte) []byte) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, change(b), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(at func(n int) int) func(b []byte) []byte {
		return func(b []byte) []byte { b[at(len(b))] ^= 4; return b }
	}
	instead := func(place func(path string) error) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), place(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, spoil := range map[string]func(t *testing.T, path string){
		"missing":        instead(func(string) error { return nil }),
		"empty":          rewrite(func([]byte) []byte { return nil }),
		"zeroes":         rewrite(func(b []byte) []byte { return make([]byte, len(b)) }),
		"cut":            rewrite(func(b []byte) []byte { return b[:len(b)/2] }),
		"longer":         rewrite(func(b []byte) []byte { return append(b, 0) }),
		"flipped magic":  rewrite(flip(func(int) int { return 1 })),
		"flipped key":    rewrite(flip(func(int) int { return templateHead + 10 })),
		"flipped middle": rewrite(flip(func(n int) int { return n / 2 })),
		"flipped end":    rewrite(flip(func(n int) int { return n - 1 })),
		"zeroed page":    rewrite(func(b []byte) []byte { clear(b[4096:8192]); return b }),
		"fifo":           instead(func(path string) error { return unix.Mkfifo(path, 0o600) }),
		"symlink":        instead(func(path string) error { return os.Symlink("/dev/zero", path) }),
		"of another key": rewrite(func(b []byte) []byte {
			b[templateHead+10] ^= 4
			le.PutUint32(b[len(templateMagic):], crc32.Checksum(b[templateHead:], castagnoli()))
			return b
		}),
	} {
		t.Run(name, func(t *testing.T) {
			dir := storetest.Memory(t)
			opt := FormatOptions{Templates: filepath.Join(dir, "templates")}
			if err := FormatExt4(t.Context(), filepath.Join(dir, "first"), size, opt); err != nil {
				t.Fatal(err)
			}
			template := only(t, opt.Templates)
			good, err := os.ReadFile(template)
			if err != nil {
				t.Fatal(err)
			}
			spoil(t, template)
			opt.UUID = randomUUID()
			path, plain := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "plain.raw")
			err = FormatExt4(t.Context(), path, size, opt)
			if err := errors.Join(err, FormatExt4(t.Context(), plain, size, FormatOptions{UUID: opt.UUID})); err != nil {
				t.Fatal(err)
			}
			if !sameExtents(readImage(t, path), readImage(t, plain)) {
				t.Error("a bad template was used")
			}
			if now, err := os.ReadFile(only(t, opt.Templates)); err != nil || len(now) != len(good) {
				t.Errorf("the template was not made again: %d bytes, %v", len(now), err)
			}
			if left, _ := filepath.Glob(path + ".*"); len(left) != 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// TestTemplateOfAnotherMkfs: a template is of one program, known by its identity,
// and of one set of arguments.
func TestTemplateOfAnotherMkfs(t *testing.T) {
	dir := t.TempDir()
	tool := filepath.Join(dir, "mkfs.ext4")
	if err := os.WriteFile(tool, []byte("1"), 0o700); err != nil {
		t.Fatal(err)
	}
	opt := FormatOptions{Templates: dir, UUID: randomUUID()}
	first := templateFor(tool, mib, opt)
	if again := templateFor(tool, mib, FormatOptions{Templates: dir, UUID: randomUUID()}); *again != *first {
		t.Error("the template depends on the UUID")
	}
	labelled := opt
	labelled.Label = "l"
	others := map[string]*template{"other size": templateFor(tool, 2*mib, opt), "label": templateFor(tool, mib, labelled)}
	if err := os.WriteFile(tool, []byte("22"), 0o700); err != nil {
		t.Fatal(err)
	}
	others["upgraded"] = templateFor(tool, mib, opt)
	for what, other := range others {
		if other.key == first.key || other.path == first.path {
			t.Errorf("%s: the same template", what)
		}
	}
	for what, none := range map[string]*template{
		"no directory": templateFor(tool, mib, FormatOptions{UUID: opt.UUID}), "too large": templateFor(tool, maxTemplateSize+1, opt),
		"no tool": templateFor(tool+"x", mib, opt), "bad UUID": templateFor(tool, mib, FormatOptions{Templates: dir, UUID: "x"}),
	} {
		if none != nil {
			t.Errorf("%s: %v", what, none)
		}
	}
}

// TestTemplateThatIsNotRight: where a template would not give what mkfs.ext4
// makes, none is used, and nobody tries again.
func TestTemplateThatIsNotRight(t *testing.T) {
	needTools(t)
	dir := storetest.Memory(t)
	opt := FormatOptions{Templates: filepath.Join(dir, "templates"), UUID: randomUUID()}
	if err := FormatExt4(t.Context(), filepath.Join(dir, "first"), 8*mib, opt); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "first"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 7*mib); err != nil { // as a newer mkfs.ext4 might
		t.Fatal(err)
	}
	mkfs, err := findTool("mkfs.ext4")
	if err != nil {
		t.Fatal(err)
	}
	if err := templateFor(mkfs, 8*mib, opt).learn(t.Context(), f, filepath.Join(dir, "scratch"), mkfs, opt); err != nil {
		t.Fatal(err)
	}
	age(t, only(t, opt.Templates))
	for i := range 2 {
		path, plain := filepath.Join(dir, fmt.Sprint("disk", i)), filepath.Join(dir, fmt.Sprint("plain", i))
		err := FormatExt4(t.Context(), path, 8*mib, opt)
		if err := errors.Join(err, FormatExt4(t.Context(), plain, 8*mib, FormatOptions{UUID: opt.UUID})); err != nil {
			t.Fatal(err)
		}
		if !sameExtents(readImage(t, path), readImage(t, plain)) {
			t.Error("not what mkfs.ext4 makes")
		}
	}
	if !isAged(only(t, opt.Templates)) {
		t.Error("the template was made again")
	}
}

// TestTemplateMakersAtOnce: many at once make whole images of one size and of
// others, and leave the templates and nothing else.
func TestTemplateMakersAtOnce(t *testing.T) {
	e2fsck := needTools(t)
	dir := storetest.Memory(t)
	opt := FormatOptions{Templates: filepath.Join(dir, "templates")}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			path := filepath.Join(dir, fmt.Sprint(i))
			if err := FormatExt4(t.Context(), path, (8+int64(i%2))*mib, opt); err != nil {
				t.Error(err)
				return
			}
			if out, err := exec.Command(e2fsck, "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	templates, err := os.ReadDir(opt.Templates)
	if err != nil || len(templates) != 2 {
		t.Errorf("templates: %v, %v", templates, err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 12+1 {
		t.Errorf("left behind: %v, %v", all, err)
	}
}

// TestTemplatesAreFew: the newest stay.
func TestTemplatesAreFew(t *testing.T) {
	needTools(t)
	dir := storetest.Memory(t)
	opt := FormatOptions{Templates: filepath.Join(dir, "templates")}
	for i := range int64(maxTemplates + 3) {
		if err := FormatExt4(t.Context(), filepath.Join(dir, fmt.Sprint(i)), (8+i)*mib, opt); err != nil {
			t.Fatal(err)
		}
	}
	left, err := filepath.Glob(filepath.Join(opt.Templates, "*"))
	if err != nil || len(left) != maxTemplates {
		t.Errorf("%d templates, %v", len(left), err)
	}
	if oldest, _ := filepath.Glob(filepath.Join(opt.Templates, fmt.Sprintf("ext4-%d-*", 8*mib))); len(oldest) != 0 {
		t.Error("the oldest is left")
	}
}

// TestTemplateCannotBeKept: the image is made all the same, and nothing is left.
func TestTemplateCannotBeKept(t *testing.T) {
	e2fsck := needTools(t)
	dir := t.TempDir()
	blocked := filepath.Join(dir, "file")
	if err := os.WriteFile(blocked, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, templates := range map[string]string{
		"a file in the way": blocked, "no parent": filepath.Join(dir, "none", "templates"), "another file system": filepath.Join(storetest.Memory(t), "templates"),
	} {
		path := filepath.Join(dir, "disk.raw")
		for range 2 {
			if err := FormatExt4(t.Context(), path, 8*mib, FormatOptions{Templates: templates}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if out, err := exec.Command(e2fsck, "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("%s: e2fsck: %v\n%s", name, err, out)
			}
			if left, _ := os.ReadDir(dir); len(left) != 2 {
				t.Errorf("%s: left %v", name, left)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestTemplateOnAFullDisk: an image for which there is no room is refused, and
// nothing of it left.
func TestTemplateOnAFullDisk(t *testing.T) {
	needTools(t)
	if !storetest.Isolated(t) {
		return
	}
	opt := FormatOptions{Templates: filepath.Join(t.TempDir(), "templates")}
	if err := FormatExt4(t.Context(), filepath.Join(t.TempDir(), "first"), 1<<30, opt); err != nil {
		t.Fatal(err)
	}
	dir := storetest.Tmpfs(t, "1m")
	storetest.Fill(t, dir)
	age(t, only(t, opt.Templates))
	path := filepath.Join(dir, "disk.raw")
	if err := FormatExt4(t.Context(), path, 1<<30, opt); !errdefs.Is(err, errdefs.IO) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) || !isAged(only(t, opt.Templates)) {
		t.Errorf("image left: %v", err)
	}
}

// FuzzTemplate: whatever a template holds, it is refused or makes an image; the
// checksum is made right, which nothing but our own code does.
func FuzzTemplate(f *testing.F) {
	key := "key"
	if mkfs, err := findTool("mkfs.ext4"); err == nil {
		for _, size := range []int64{2 * mib, 64 * mib} {
			path := filepath.Join(f.TempDir(), "disk.raw")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				f.Fatal(err)
			}
			if err := errors.Join(os.Truncate(path, size), runMkfs(f.Context(), mkfs, path, size, FormatOptions{UUID: randomUUID()})); err != nil {
				f.Fatal(err)
			}
			f.Add(encodeTemplate(readImage(f, path), key))
		}
	}
	f.Add(encodeTemplate(nil, key))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= templateHead {
			le.PutUint32(b[len(templateMagic):], crc32.Checksum(b[templateHead:], castagnoli()))
		}
		extents, err := decodeTemplate(b, key)
		if err != nil {
			return
		}
		if again, err := decodeTemplate(encodeTemplate(extents, key), key); err != nil || !sameExtents(extents, again) {
			t.Fatalf("round trip: %v", err)
		}
		if len(extents) > 0 && extents[len(extents)-1].off > maxTemplateSize {
			return
		}
		_, _ = instance(extents, randomUUID())
	})
}
