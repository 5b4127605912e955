package microsandbox

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// fsVolume is a volume made for one test.
func fsVolume(t testing.TB) (*Volume, *VolumeFs) {
	t.Helper()
	useHome(t)
	v, err := CreateVolume(t.Context(), "v")
	check(t, err)
	return v, v.FS()
}

func onHost(v *Volume, rel string) string { return filepath.Join(v.Path(), rel) }

func hostFiles(t testing.TB, v *Volume) (out []string) {
	t.Helper()
	err := filepath.WalkDir(v.Path(), func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != v.Path() {
			rel, _ := filepath.Rel(v.Path(), p)
			out = append(out, rel)
		}
		return err
	})
	check(t, err)
	return out
}

// TestVolumeFsReadWrite: FS-01, FS-02, FS-04, X-01, X-02, V-03, H-03, B-26, B-27, B-30, B-31, F-2.
func TestVolumeFsReadWrite(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	if f.Root() != v.Path() {
		t.Errorf("root %s, path %s", f.Root(), v.Path())
	}
	binary := []byte{0, 1, 0xff, 0xfe, '\n'}
	check(t, f.Write(ctx, "/config/app.bin", binary))
	h, err := GetVolume(ctx, "v")
	check(t, err)
	for _, p := range []string{"config/app.bin", "/config/app.bin", "//config//app.bin"} {
		if b, err := h.FS().Read(ctx, p); err != nil || !bytes.Equal(b, binary) {
			t.Errorf("read %s: %q, %v", p, b, err)
		}
	}
	check(t, f.WriteString(ctx, "note.txt", "a longer text"))
	check(t, f.WriteString(ctx, "note.txt", "shared cache"))
	if s, err := f.ReadString(ctx, "/note.txt"); s != "shared cache" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if b, err := os.ReadFile(onHost(v, "note.txt")); string(b) != "shared cache" || err != nil {
		t.Errorf("on the host: %q, %v", b, err)
	}
	_, err = f.ReadString(ctx, "config/app.bin")
	wantErrKind(t, err, ErrFilesystem)
	_, err = f.Read(ctx, "none")
	wantErrKind(t, err, ErrFilesystem)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v does not match fs.ErrNotExist", err)
	}
	var ve *VolumeError
	if !errors.As(err, &ve) || ve.Op != "read" || ve.Volume != "v" || ve.Path != "none" {
		t.Errorf("%v has no VolumeError", err)
	}
	_, err = f.Read(ctx, "config")
	wantErrKind(t, err, ErrFilesystem)
	if !errors.Is(err, syscall.EISDIR) {
		t.Errorf("%v does not match EISDIR", err)
	}
	_, err = f.Read(ctx, "/etc/hosts") // a file that the volume does not have
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("/etc/hosts: %v", err)
	}
	check(t, f.Durable().WriteString(ctx, "durable", "x"))
}

// TestVolumeFsReadStream: FS-03, T-07 to T-09.
func TestVolumeFsReadStream(t *testing.T) {
	_, f := fsVolume(t)
	ctx := t.Context()
	var _ interface {
		io.ReadCloser
		io.WriterTo
	} = (*VolumeFsReadStream)(nil)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	data = append(data, '!')
	check(t, f.Write(ctx, "f", data))
	before := countDescriptors(t)
	s, err := f.ReadStream(ctx, "f")
	check(t, err)
	var sizes []int
	var got []byte
	for {
		chunk, err := s.Recv(ctx)
		check(t, err)
		if chunk == nil {
			break
		}
		sizes, got = append(sizes, len(chunk)), append(got, chunk...)
	}
	want := append(slicesRepeat(65536, 16), 1)
	if !reflect.DeepEqual(sizes, want) || !bytes.Equal(got, data) {
		t.Errorf("chunks %v", sizes)
	}
	for range 2 {
		if chunk, err := s.Recv(ctx); chunk != nil || err != nil {
			t.Errorf("after the end: %v, %v", chunk, err)
		}
	}
	check(t, s.Close())
	check(t, s.Close())
	if after := countDescriptors(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	s, err = f.ReadStream(ctx, "f")
	check(t, err)
	first, err := s.Recv(ctx)
	check(t, err)
	rest, err := s.Collect(ctx)
	if err != nil || !bytes.Equal(append(first, rest...), data) {
		t.Errorf("collect: %d bytes, %v", len(rest), err)
	}
	check(t, s.Close())
	s, err = f.ReadStream(ctx, "f")
	check(t, err)
	if all, err := io.ReadAll(s); err != nil || !bytes.Equal(all, data) {
		t.Errorf("read: %d bytes, %v", len(all), err)
	}
	check(t, s.Close())
	check(t, f.Write(ctx, "empty", nil))
	s, err = f.ReadStream(ctx, "empty")
	check(t, err)
	if chunk, err := s.Recv(ctx); chunk != nil || err != nil {
		t.Errorf("empty file: %v, %v", chunk, err)
	}
	check(t, s.Close())
	_, err = f.ReadStream(ctx, "none")
	wantErrKind(t, err, ErrFilesystem)
}

func slicesRepeat(v, n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = v
	}
	return out
}

func countDescriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	return len(names)
}

// TestVolumeFsWriteStream: FS-05, T-10 to T-12, B-30.
func TestVolumeFsWriteStream(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	var _ io.WriteCloser = (*VolumeFsWriteSink)(nil)
	w, err := f.WriteStream(ctx, "/new/dir/f")
	check(t, err)
	_, err = w.Write([]byte("one "))
	check(t, err)
	check(t, w.WriteCtx(ctx, []byte("two ")))
	_, err = io.Copy(w, bytes.NewReader([]byte("three")))
	check(t, err)
	if files := hostFiles(t, v); files != nil {
		t.Errorf("before Close there is %v", files)
	}
	check(t, w.Close())
	check(t, w.Close())
	if s, err := f.ReadString(ctx, "new/dir/f"); s != "one two three" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	_, err = w.Write(nil)
	wantErrKind(t, err, ErrFilesystem)

	w, err = f.WriteStream(ctx, "new/dir/f")
	check(t, err)
	_, err = w.Write([]byte("half"))
	check(t, err)
	w.Abort()
	check(t, w.Close())
	ended, cancel := context.WithCancel(ctx)
	w, err = f.WriteStream(ended, "other")
	check(t, err)
	cancel()
	wantErrKind(t, w.Close(), ErrCancelled)
	if s, _ := f.ReadString(ctx, "new/dir/f"); s != "one two three" {
		t.Errorf("an abandoned stream left %q", s)
	}
	if files := hostFiles(t, v); !reflect.DeepEqual(files, []string{"new", "new/dir", "new/dir/f"}) {
		t.Errorf("litter: %v", files)
	}
}

// TestVolumeFsStreamsBounded: B-29. A large file passes through both streams
// without being held in memory.
func TestVolumeFsStreamsBounded(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, os.WriteFile(onHost(v, "big"), nil, 0o644))
	check(t, os.Truncate(onHost(v, "big"), 256<<20))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	r, err := f.ReadStream(ctx, "big")
	check(t, err)
	w, err := f.WriteStream(ctx, "copy")
	check(t, err)
	var most uint64
	total := 0
	for {
		chunk, err := r.Recv(ctx)
		check(t, err)
		if chunk == nil {
			break
		}
		total += len(chunk)
		if total <= 64<<20 { // what is written need not be as long to show it
			_, err = w.Write(chunk)
			check(t, err)
		}
		if total%(16<<20) == 0 {
			runtime.ReadMemStats(&after)
			most = max(most, after.HeapInuse)
		}
	}
	check(t, r.Close())
	check(t, w.Close())
	if total != 256<<20 {
		t.Errorf("read %d bytes", total)
	}
	if grown := int64(most) - int64(before.HeapInuse); grown > 32<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
}

// TestVolumeFsList: FS-06, T-44, B-34, decision 11.5.6.
func TestVolumeFsList(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "d/b", "12345"))
	check(t, f.WriteString(ctx, "d/sub/grandchild", ""))
	check(t, os.Symlink("/etc/passwd", onHost(v, "d/a")))
	check(t, syscall.Mkfifo(onHost(v, "d/c"), 0o600))
	when := time.Date(2021, 2, 3, 4, 5, 6, 789012345, time.UTC)
	check(t, os.Chtimes(onHost(v, "d/b"), when.Add(time.Hour), when))
	check(t, os.Chmod(onHost(v, "d/b"), 0o640))
	list, err := f.List(ctx, "/d/")
	check(t, err)
	var got []string
	for _, e := range list {
		got = append(got, e.Path+" "+string(e.Kind))
	}
	if want := []string{"/d/a symlink", "/d/b file", "/d/c other", "/d/sub directory"}; !reflect.DeepEqual(got, want) {
		t.Fatalf("%q, want %q", got, want)
	}
	want := FsEntry{Path: "/d/b", Kind: FsEntryKindFile, Size: 5, Mode: 0o640, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()),
		AccessTime: when.Add(time.Hour), ModTime: when}
	if list[1] != want {
		t.Errorf("%+v, want %+v", list[1], want)
	}
	_, err = f.List(ctx, "none")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	_, err = f.List(ctx, "d/b")
	wantErrKind(t, err, ErrFilesystem)
}

// TestVolumeFsStat: FS-12, T-45, decision 11.5.7.
func TestVolumeFsStat(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "d/f", "123"))
	check(t, os.Chmod(onHost(v, "d/f"), 0o444))
	when := time.Date(2021, 2, 3, 4, 5, 6, 789012345, time.UTC)
	check(t, os.Chtimes(onHost(v, "d/f"), when, when))
	check(t, os.Symlink("d/f", onHost(v, "link")))
	for _, p := range []string{"d/f", "/link"} {
		s, err := f.Stat(ctx, p)
		check(t, err)
		if s.Kind != FsEntryKindFile || s.IsDir || s.Size != 3 || s.Mode != 0o444 || !s.Readonly || s.UID != uint32(os.Getuid()) ||
			!s.ModTime.Equal(when) || !s.AccessTime.Equal(when) || s.CreateTime.Before(when) {
			t.Errorf("%s: %+v", p, s)
		}
	}
	var s *FsMetadata
	s, err := f.Stat(ctx, "/d")
	check(t, err)
	if s.Kind != FsEntryKindDirectory || !s.IsDir || s.Readonly || s.Path != "/d" {
		t.Errorf("%+v", s)
	}
	_, err = f.Stat(ctx, "none")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

// TestVolumeFsExists: FS-13, B-35.
func TestVolumeFsExists(t *testing.T) {
	_, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "d/f", ""))
	for p, want := range map[string]bool{"d/f": true, "/d": true, "/": true, "none": false, "none/x": false} {
		if got, err := f.Exists(ctx, p); got != want || err != nil {
			t.Errorf("%s: %v, %v", p, got, err)
		}
	}
	_, err := f.Exists(ctx, "../x")
	if !errors.Is(err, ErrPathEscape) {
		t.Errorf("escape: %v", err)
	}
}

// TestVolumeFsMkdir: FS-07, B-30.
func TestVolumeFsMkdir(t *testing.T) {
	v, f := fsVolume(t)
	for range 2 {
		check(t, f.Mkdir(t.Context(), "/data/incoming"))
	}
	if got := hostFiles(t, v); !reflect.DeepEqual(got, []string{"data", "data/incoming"}) {
		t.Errorf("%v", got)
	}
}

// TestVolumeFsRemove: FS-08, FS-09, X-04, B-32, B-33.
func TestVolumeFsRemove(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "f", ""))
	check(t, f.WriteString(ctx, "d/x/y", ""))
	check(t, f.Remove(ctx, "/f"))
	wantErrKind(t, f.Remove(ctx, "d"), ErrFilesystem)
	for _, root := range []string{"", "/", ".", "d/.."} {
		wantErrKind(t, f.RemoveDir(ctx, root), ErrFilesystem)
		wantErrKind(t, f.RemoveAll(ctx, root), ErrFilesystem)
	}
	if got := hostFiles(t, v); !reflect.DeepEqual(got, []string{"d", "d/x", "d/x/y"}) {
		t.Errorf("%v", got)
	}
	wantErrKind(t, f.RemoveDir(ctx, "none"), ErrFilesystem)
	wantErrKind(t, f.RemoveDir(ctx, "d/x/y"), ErrFilesystem)
	check(t, f.RemoveDir(ctx, "/d"))
	check(t, f.RemoveAll(ctx, "none"))
	check(t, f.WriteString(ctx, "f", ""))
	check(t, f.RemoveAll(ctx, "f"))
	check(t, f.WriteString(ctx, "t/x", ""))
	check(t, f.RemoveAll(ctx, "t"))
	if got := hostFiles(t, v); got != nil {
		t.Errorf("%v", got)
	}
}

// TestVolumeFsCopyRename: FS-10, FS-11, B-30, decision 11.5.14.
func TestVolumeFsCopyRename(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "/seed.txt", "seed"))
	check(t, f.Copy(ctx, "/seed.txt", "/backup/seed.txt"))
	for _, p := range []string{"seed.txt", "backup/seed.txt"} {
		if s, err := f.ReadString(ctx, p); s != "seed" || err != nil {
			t.Errorf("%s: %q, %v", p, s, err)
		}
	}
	wantErrKind(t, f.Copy(ctx, "seed.txt", "/seed.txt"), ErrFilesystem)
	wantErrKind(t, f.Copy(ctx, "backup", "b2"), ErrFilesystem)
	check(t, f.Rename(ctx, "seed.txt", "a/b/moved.txt"))
	check(t, f.Rename(ctx, "backup", "a/backup"))
	if got := hostFiles(t, v); !reflect.DeepEqual(got, []string{"a", "a/b", "a/b/moved.txt", "a/backup", "a/backup/seed.txt"}) {
		t.Errorf("%v", got)
	}
	if s, _ := f.ReadString(ctx, "a/b/moved.txt"); s != "seed" {
		t.Errorf("content %q", s)
	}
}

// TestVolumeFsEscape: X-03, B-28: every operation, both arguments of copy and
// rename. The ways out in depth are the tests of internal/volumefs.
func TestVolumeFsEscape(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "ok", "x"))
	check(t, os.Symlink("..", onHost(v, "out")))
	check(t, os.Symlink("../escaped", onHost(v, "dangling")))
	check(t, f.Mkdir(ctx, "present"))
	paths := []string{"../escaped", "/../escaped", "present/../../escaped", "absent/../../escaped", "out/escaped", "dangling/x"}
	calls := map[string]func(p string) error{
		"read":        func(p string) error { _, err := f.Read(ctx, p); return err },
		"readstring":  func(p string) error { _, err := f.ReadString(ctx, p); return err },
		"readstream":  func(p string) error { _, err := f.ReadStream(ctx, p); return err },
		"write":       func(p string) error { return f.Write(ctx, p, nil) },
		"writestring": func(p string) error { return f.WriteString(ctx, p, "") },
		"writestream": func(p string) error { _, err := f.WriteStream(ctx, p); return err },
		"list":        func(p string) error { _, err := f.List(ctx, p); return err },
		"stat":        func(p string) error { _, err := f.Stat(ctx, p); return err },
		"exists":      func(p string) error { _, err := f.Exists(ctx, p); return err },
		"mkdir":       func(p string) error { return f.Mkdir(ctx, p) },
		"remove":      func(p string) error { return f.Remove(ctx, p) },
		"removedir":   func(p string) error { return f.RemoveDir(ctx, p) },
		"removeall":   func(p string) error { return f.RemoveAll(ctx, p) },
		"copy from":   func(p string) error { return f.Copy(ctx, p, "c") },
		"copy to":     func(p string) error { return f.Copy(ctx, "ok", p) },
		"rename from": func(p string) error { return f.Rename(ctx, p, "c") },
		"rename to":   func(p string) error { return f.Rename(ctx, "ok", p) },
	}
	for name, call := range calls {
		for _, p := range paths {
			err := call(p)
			if !errors.Is(err, ErrPathEscape) || !IsKind(err, ErrFilesystem) {
				t.Errorf("%s %s: %v", name, p, err)
			}
		}
	}
	if _, err := os.Lstat(filepath.Join(filepath.Dir(v.Path()), "escaped")); !os.IsNotExist(err) {
		t.Errorf("something escaped: %v", err)
	}
	if got := hostFiles(t, v); !reflect.DeepEqual(got, []string{"dangling", "ok", "out", "present"}) {
		t.Errorf("%v", got)
	}
}

// TestVolumeFsByName: T-06.
func TestVolumeFsByName(t *testing.T) {
	v, f := fsVolume(t)
	ctx := t.Context()
	check(t, f.WriteString(ctx, "f", "x"))
	byName := NewVolumeFs(mustBackend(t), "v")
	if byName.Root() != v.Path() {
		t.Errorf("root %s", byName.Root())
	}
	if s, err := byName.ReadString(ctx, "f"); s != "x" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	_, err := NewVolumeFs(mustBackend(t), "none").Read(ctx, "f")
	wantErrKind(t, err, ErrVolumeNotFound)
}

// TestVolumeFsOnDisk: decision 11.5.4: nothing is read, listed or written beside
// or over the image.
func TestVolumeFsOnDisk(t *testing.T) {
	needMkfs(t)
	useHome(t)
	ctx := t.Context()
	v, err := NewVolumeBuilder("disk").Disk().Size(64).Create(ctx)
	check(t, err)
	image, err := os.ReadFile(*v.DiskPath())
	check(t, err)
	f := v.FS()
	_, readErr := f.Read(ctx, "disk.raw")
	_, listErr := f.List(ctx, "/")
	_, streamErr := f.WriteStream(ctx, "disk.raw")
	_, statErr := f.Stat(ctx, "/")
	_, existsErr := f.Exists(ctx, "disk.raw")
	for i, err := range []error{readErr, listErr, streamErr, statErr, existsErr, f.WriteString(ctx, "disk.raw", "oops"),
		f.WriteString(ctx, "hello", "x"), f.Remove(ctx, "disk.raw"), f.RemoveAll(ctx, "disk.raw"), f.Mkdir(ctx, "d"),
		f.RemoveDir(ctx, "d"), f.Copy(ctx, "disk.raw", "x"), f.Rename(ctx, "disk.raw", "x")} {
		wantErrKind(t, err, ErrUnsupportedOperation)
		var e *Error
		if errors.As(err, &e) && e.Hint == "" {
			t.Errorf("call %d gives no way out", i)
		}
	}
	if got := hostFiles(t, v); !reflect.DeepEqual(got, []string{"disk.raw"}) {
		t.Errorf("%v", got)
	}
	if now, err := os.ReadFile(*v.DiskPath()); err != nil || !bytes.Equal(now, image) {
		t.Errorf("the image changed: %v", err)
	}
}

// TestOpenVolumesBounded: VolumeFs has no Close, yet descriptors stay few.
func TestOpenVolumesBounded(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	before := countDescriptors(t)
	for i := range maxIdleVolumes + 16 {
		v, err := CreateVolume(ctx, "v"+string(rune('a'+i/26))+string(rune('a'+i%26)))
		check(t, err)
		check(t, v.FS().WriteString(ctx, "f", ""))
		if i%4 == 0 {
			check(t, v.Remove(ctx))
			wantErrKind(t, v.FS().WriteString(ctx, "f", ""), ErrVolumeNotFound)
		}
	}
	if after := countDescriptors(t); after > before+6*maxIdleVolumes {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
