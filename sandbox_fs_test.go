package microsandbox_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// fsBench is one sandbox whose files are worked on through SandboxFSOps.
type fsBench struct {
	ctx context.Context
	sb  *msb.Sandbox
	fs  *msb.SandboxFSOps
}

// TestSandboxFS works on a guest's files from the host.
func TestSandboxFS(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	sb := boot(ctx, t, "fs", msb.WithMounts(map[string]msb.MountConfig{
		"/small": msb.Mount.Tmpfs(msb.TmpfsOptions{SizeMiB: 4}),
		"/vol":   msb.Mount.NamedWith("vol", msb.MountOptions{}, msb.NamedVolumeOptions{Mode: msb.NamedVolumeModeCreate}),
	}))
	b := &fsBench{ctx, sb, sb.FS()}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"write and read", b.testWriteRead},
		{"list and stat", b.testListStat},
		{"make, copy, rename, remove", b.testTree},
		{"missing files", b.testMissing},
		{"names that are not UTF-8", b.testNames},
		{"streams", b.testStreams},
		{"a stream to a full file system fails at Close", b.testFull},
		{"a cancelled stream", b.testCancelled},
		{"copies from and to the host", b.testHostCopies},
		{"what is not a file", b.testNotFiles},
	} {
		t.Run(test.name, test.run)
	}
	ok(t, sb.Stop(ctx))
	t.Run("a stopped sandbox", func(t *testing.T) {
		_, err := b.fs.Read(ctx, "/etc/passwd")
		wantKind(t, err, msb.ErrSandboxNotRunning, "fs")
	})
}

func (b *fsBench) testWriteRead(t *testing.T) {
	for _, dir := range []string{"/root", "/vol", "/small"} {
		path := dir + "/new/parents/file"
		ok(t, b.fs.WriteString(b.ctx, path, "a longer text"))
		ok(t, b.fs.Write(b.ctx, path, []byte("short")))
		if got := must(b.fs.ReadString(b.ctx, path))(t); got != "short" {
			t.Errorf("%s: read %q", path, got)
		}
		if got := sh(t, b.sb, "cat "+path+"; stat -c ' %a %u:%g' "+path); got != "short 644 0:0" {
			t.Errorf("the guest sees %q", got)
		}
		ok(t, b.fs.Write(b.ctx, path, nil))
		if got := must(b.fs.Read(b.ctx, path))(t); len(got) != 0 {
			t.Errorf("%s: emptied, read %q", path, got)
		}
	}
	// Files of the kernel have no size and are read all the same.
	if got := must(b.fs.ReadString(b.ctx, "/proc/sys/kernel/ostype"))(t); got != "Linux\n" {
		t.Errorf("ostype = %q", got)
	}
}

func (b *fsBench) testListStat(t *testing.T) {
	before := time.Now().Add(-time.Minute)
	sh(t, b.sb, `mkdir -p /root/list/dir/deep && cd /root/list && printf 12345 > file && chown 7:8 file && chmod 4640 file && ln -s file link && ln -s nowhere dangling && mkfifo fifo && mknod dev c 1 3`)
	list := must(b.fs.List(b.ctx, "/root/list"))(t)
	var got []string
	for _, e := range list {
		got = append(got, fmt.Sprintf("%s %s", strings.TrimPrefix(e.Path, "/root/list/"), e.Kind))
		if e.ModTime.Before(before) || e.AccessTime.Before(before) {
			t.Errorf("%s: times %v, %v", e.Path, e.ModTime, e.AccessTime)
		}
	}
	if want := "[dangling symlink dev other dir directory fifo other file file link symlink]"; fmt.Sprint(got) != want {
		t.Errorf("list = %v, want %s", got, want)
	}
	if e := list[4]; e.Path != "/root/list/file" || e.Size != 5 || e.Mode != 0o4640 || e.UID != 7 || e.GID != 8 {
		t.Errorf("entry = %+v", e)
	}
	st := must(b.fs.Stat(b.ctx, "/root/list/link"))(t) // followed
	if st.Kind != msb.FsEntryKindFile || st.Size != 5 || st.Mode != 0o4640 || st.UID != 7 || st.GID != 8 || st.IsDir || st.Readonly || st.ModTime.Before(before) {
		t.Errorf("stat = %+v", st)
	}
	sh(t, b.sb, "chmod 440 /root/list/file")
	if st := must(b.fs.Stat(b.ctx, "/root/list/file"))(t); !st.Readonly {
		t.Errorf("stat of a file with mode 0440 = %+v", st)
	}
	if st := must(b.fs.Stat(b.ctx, "/root/list/dir"))(t); !st.IsDir || st.Kind != msb.FsEntryKindDirectory {
		t.Errorf("stat = %+v", st)
	}
	if list := must(b.fs.List(b.ctx, "/root/list/dir/deep"))(t); list == nil || len(list) != 0 {
		t.Errorf("empty directory: %v", list)
	}
	// More entries than one frame of the link carries.
	sh(t, b.sb, `mkdir /root/many && cd /root/many && seq -f 'file-with-a-name-of-some-length-%05g' 5000 | xargs touch`)
	if n := len(must(b.fs.List(b.ctx, "/root/many"))(t)); n != 5000 {
		t.Errorf("%d entries of 5000", n)
	}
}

func (b *fsBench) testTree(t *testing.T) {
	ok(t, b.fs.Mkdir(b.ctx, "/root/tree/a/b"))
	ok(t, b.fs.Mkdir(b.ctx, "/root/tree/a/b"))
	ok(t, b.fs.WriteString(b.ctx, "/root/tree/a/file", "text"))
	sh(t, b.sb, "chmod 750 /root/tree/a/file")
	ok(t, b.fs.Copy(b.ctx, "/root/tree/a/file", "/root/tree/a/b/copy"))
	ok(t, b.fs.Rename(b.ctx, "/root/tree/a/b/copy", "/root/tree/moved"))
	if got := sh(t, b.sb, "cd /root/tree; cat moved; stat -c ' %a' moved; ls a/b"); got != "text 750" {
		t.Errorf("after copy and rename: %q", got)
	}
	ok(t, b.fs.Rename(b.ctx, "/root/tree/a", "/root/tree/z"))
	if err := b.fs.Copy(b.ctx, "/root/tree/moved", "/root/tree/moved"); err == nil {
		t.Error("a file was copied onto itself")
	}
	wantKind(t, b.fs.Remove(b.ctx, "/root/tree/z"), msb.ErrFilesystem)
	wantKind(t, b.fs.RemoveDir(b.ctx, "/root/tree/moved"), msb.ErrFilesystem)
	wantKind(t, b.fs.RemoveDir(b.ctx, "/"), msb.ErrFilesystem)
	ok(t, b.fs.Remove(b.ctx, "/root/tree/moved"))
	ok(t, b.fs.RemoveDir(b.ctx, "/root/tree/z"))
	if got := sh(t, b.sb, "ls -A /root/tree"); got != "" {
		t.Errorf("left: %q", got)
	}
	// A link is removed itself.
	sh(t, b.sb, "mkdir /root/target && touch /root/target/kept && ln -s /root/target /root/link")
	wantKind(t, b.fs.RemoveDir(b.ctx, "/root/link"), msb.ErrFilesystem)
	ok(t, b.fs.Remove(b.ctx, "/root/link"))
	sh(t, b.sb, "test -e /root/target/kept")
}

func (b *fsBench) testMissing(t *testing.T) {
	for path, want := range map[string]bool{"/etc/passwd": true, "/etc": true, "/absent": false, "/absent/file": false, "/etc/passwd/file": false} {
		got, err := b.fs.Exists(b.ctx, path)
		if path == "/etc/passwd/file" { // ENOTDIR is no absence to errors.Is
			if got {
				t.Errorf("Exists(%s) = %t, %v", path, got, err)
			}
			continue
		}
		if got != want || err != nil {
			t.Errorf("Exists(%s) = %t, %v", path, got, err)
		}
	}
	for what, do := range map[string]func() error{
		"Read":       func() error { _, err := b.fs.Read(b.ctx, "/absent"); return err },
		"ReadStream": func() error { _, err := b.fs.ReadStream(b.ctx, "/absent"); return err },
		"List":       func() error { _, err := b.fs.List(b.ctx, "/absent"); return err },
		"Stat":       func() error { _, err := b.fs.Stat(b.ctx, "/absent"); return err },
		"Remove":     func() error { return b.fs.Remove(b.ctx, "/absent") },
		"RemoveDir":  func() error { return b.fs.RemoveDir(b.ctx, "/absent") },
		"Copy":       func() error { return b.fs.Copy(b.ctx, "/absent", "/root/x") },
		"Rename":     func() error { return b.fs.Rename(b.ctx, "/absent", "/root/x") },
		"CopyToHost": func() error { return b.fs.CopyToHost(b.ctx, "/absent", filepath.Join(t.TempDir(), "x")) },
	} {
		err := do()
		wantKind(t, err, msb.ErrFilesystem, "/absent")
		if !errors.Is(err, fs.ErrNotExist) || !errors.Is(err, syscall.ENOENT) {
			t.Errorf("%s: %v does not match fs.ErrNotExist", what, err)
		}
	}
	err := b.fs.WriteString(b.ctx, "/proc/absent", "x")
	wantKind(t, err, msb.ErrFilesystem, "/proc/absent")
}

func (b *fsBench) testNames(t *testing.T) {
	name := "/root/names/\xff\xfe latin \xe4 ü \n\t'\"\\"
	ok(t, b.fs.WriteString(b.ctx, name, "text"))
	list := must(b.fs.List(b.ctx, "/root/names"))(t)
	if len(list) != 1 || list[0].Path != name {
		t.Fatalf("list = %+v", list)
	}
	if got := must(b.fs.ReadString(b.ctx, name))(t); got != "text" {
		t.Errorf("read %q", got)
	}
	ok(t, b.fs.Rename(b.ctx, name, name+"\x80"))
	if yes := must(b.fs.Exists(b.ctx, name+"\x80"))(t); !yes {
		t.Error("after the rename the name is missing")
	}
	ok(t, b.fs.Remove(b.ctx, name+"\x80"))
	long := "/root/names/" + strings.Repeat("n", 255)
	ok(t, b.fs.WriteString(b.ctx, long, ""))
	if err := b.fs.WriteString(b.ctx, long+"n", ""); !errors.Is(err, syscall.ENAMETOOLONG) {
		t.Errorf("a name of 256 bytes: %v", err)
	}
	wantKind(t, b.fs.WriteString(b.ctx, "/root/names/nul\x00", ""), msb.ErrFilesystem)
}

func (b *fsBench) testStreams(t *testing.T) {
	data := make([]byte, 8<<20+1)
	_, _ = rand.Read(data)
	w := must(b.fs.WriteStream(b.ctx, "/vol/stream"))(t)
	for p := data; len(p) > 0; {
		n := min(len(p), 300_000)
		if m, err := w.Write(p[:n]); m != n || err != nil {
			t.Fatalf("write %d bytes: %d, %v", n, m, err)
		}
		p = p[n:]
	}
	ok(t, w.Close(b.ctx))
	ok(t, w.Close(b.ctx))
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("a closed stream took data")
	}
	r := must(b.fs.ReadStream(b.ctx, "/vol/stream"))(t)
	first := must(r.Recv(b.ctx))(t)
	sum := sha256.New()
	sum.Write(first)
	must(r.WriteTo(sum))(t)
	for range 2 { // the end stays the end
		if p, err := r.Recv(b.ctx); p != nil || err != nil {
			t.Errorf("after the end: %d bytes, %v", len(p), err)
		}
	}
	ok(t, r.Close())
	if want := sha256.Sum256(data); !bytes.Equal(sum.Sum(nil), want[:]) {
		t.Errorf("%d bytes differ", len(data))
	}
	host := must(must(msb.GetVolume(b.ctx, "vol"))(t).FS().Read(b.ctx, "/stream"))(t)
	if !bytes.Equal(host, data) {
		t.Error("the volume has other bytes")
	}
	// A stream that is not read to its end leaves the guest with nothing open.
	r = must(b.fs.ReadStream(b.ctx, "/vol/stream"))(t)
	must(r.Recv(b.ctx))(t)
	ok(t, r.Close())
	vmtest.Eventually(t, 5*time.Second, "the agent has closed the file", func() bool {
		return !strings.Contains(sh(t, b.sb, "ls -l /proc/1/fd"), "/vol/stream")
	})
}

func (b *fsBench) testFull(t *testing.T) {
	w := must(b.fs.WriteStream(b.ctx, "/small/big"))(t)
	chunk := make([]byte, 1<<20)
	for range 16 { // four times what fits
		if err := w.WriteCtx(b.ctx, chunk); err != nil {
			break // allowed: the guest has answered already
		}
	}
	err := w.Close(b.ctx)
	wantKind(t, err, msb.ErrFilesystem, "/small/big")
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v does not match ENOSPC", err)
	}
	err = b.fs.Write(b.ctx, "/small/other", make([]byte, 8<<20))
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Write: %v does not match ENOSPC", err)
	}
	ok(t, b.fs.Remove(b.ctx, "/small/big"))
	ok(t, b.fs.Remove(b.ctx, "/small/other"))
	ok(t, b.fs.Write(b.ctx, "/small/fits", make([]byte, 1<<20)))
}

func (b *fsBench) testCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(b.ctx)
	r := must(b.fs.ReadStream(ctx, "/vol/stream"))(t) // of testStreams
	must(r.Recv(ctx))(t)
	cancel()
	for { // what has arrived by then may still be received
		if _, err := r.Recv(ctx); err != nil {
			wantKind(t, err, msb.ErrCancelled)
			break
		}
	}
	ok(t, r.Close())
	_, err := b.fs.Read(ctx, "/etc/passwd")
	wantKind(t, err, msb.ErrCancelled)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not match context.Canceled", err)
	}
}

func (b *fsBench) testHostCopies(t *testing.T) {
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	data := make([]byte, 1<<20+7)
	_, _ = rand.Read(data)
	ok(t, os.WriteFile(in, data, 0o600))
	ok(t, os.Chmod(in, 0o776))
	ok(t, b.fs.CopyFromHost(b.ctx, in, "/root/from/host"))
	ok(t, b.fs.WriteString(b.ctx, "/root/from/there", "already"))
	ok(t, b.fs.CopyFromHost(b.ctx, in, "/root/from/there"))
	if got := sh(t, b.sb, "stat -c '%a %s' /root/from/there"); got != fmt.Sprintf("776 %d", len(data)) {
		t.Errorf("mode and size of a file that was there: %s", got)
	}
	if got := sh(t, b.sb, "stat -c '%a %s' /root/from/host"); got != fmt.Sprintf("776 %d", len(data)) {
		t.Errorf("mode and size in the guest: %s", got)
	}
	ok(t, b.fs.CopyToHost(b.ctx, "/root/from/host", out))
	if got := must(os.ReadFile(out))(t); !bytes.Equal(got, data) {
		t.Error("the copy of the copy differs")
	}
	if left := must(filepath.Glob(filepath.Join(dir, "*")))(t); len(left) != 2 {
		t.Errorf("files on the host: %v", left)
	}
	// A failed copy leaves what was there.
	if err := b.fs.CopyToHost(b.ctx, "/root", out); err == nil {
		t.Error("a directory was copied")
	}
	if got := must(os.ReadFile(out))(t); !bytes.Equal(got, data) {
		t.Error("a failed copy changed the file")
	}
	err := b.fs.CopyFromHost(b.ctx, filepath.Join(dir, "absent"), "/root/x")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v does not match fs.ErrNotExist", err)
	}
	if err := b.fs.CopyFromHost(b.ctx, dir, "/root/x"); err == nil {
		t.Error("a directory of the host was copied")
	}
}

// testNotFiles: what would block or never end is refused.
func (b *fsBench) testNotFiles(t *testing.T) {
	sh(t, b.sb, "mkfifo /root/fifo")
	for _, path := range []string{"/root/fifo", "/dev/zero", "/root"} {
		_, err := b.fs.Read(b.ctx, path)
		wantKind(t, err, msb.ErrFilesystem, path)
		wantKind(t, b.fs.WriteString(b.ctx, path, "x"), msb.ErrFilesystem, path)
	}
	_, err := b.fs.List(b.ctx, "/etc/passwd")
	if !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("List of a file: %v", err)
	}
}
