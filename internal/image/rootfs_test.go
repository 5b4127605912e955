package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// debugfs runs one command on a file system image and returns what it prints.
func debugfs(t testing.TB, image, command string) string {
	t.Helper()
	bin, err := exec.LookPath("debugfs")
	if err != nil {
		prereq.Missing(t, "debugfs (package e2fsprogs)")
	}
	cmd := exec.Command(bin, "-R", command, image)
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("debugfs %s: %v", command, err)
	}
	return out.String()
}

// acl is a POSIX ACL as setxattr(2) takes it: owner rw, user 7 r, group r, mask r, other none.
func acl() string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range [][3]uint32{{1, 6, 1<<32 - 1}, {2, 4, 7}, {4, 4, 1<<32 - 1}, {16, 4, 1<<32 - 1}, {32, 0, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return string(b)
}

func TestRootImage(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	rich := file("etc/rich", "x")
	rich.Mode, rich.Uid, rich.Gid = 0o4751, 1000, 70000
	rich.PAXRecords = map[string]string{
		paxXattr + "security.capability":    "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		paxXattr + "user.zz":                strings.Repeat("z", 100),
		paxXattr + "user.a":                 strings.Repeat("a", 90),
		paxXattr + "trusted.middle":         strings.Repeat("m", 80),
		paxXattr + aclAccess:                acl(),
		paxXattr + "trusted.overlay.opaque": "y",
		paxXattr + "system.nfs4_acl":        "?",
	}
	s := newStore(t)
	img := mustLoad(t, s, "rich:v1", makeImage(t,
		layerTar(t, dir("etc"), file("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:7:8::/:/bin/sh\n"), link("etc/group", "../g"), file("g", "app:x:8:\n"), rich),
		layerTar(t, file("big", big), hard("big2", "big"), link("long", strings.Repeat("l", 200)), link("run", "/var/run"),
			&tar.Header{Typeflag: tar.TypeChar, Name: "odd", Devmajor: 300, Devminor: 70000, Mode: 0o666}),
	))
	fsck(t, img.RootFS)
	if fi, err := os.Stat(img.RootFS); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("mode of the root image: %v, %v", fi.Mode(), err)
	}
	if uid, gid, err := img.ResolveUser("app"); uid != 7 || gid != 8 || err != nil {
		t.Errorf("ResolveUser(app) = %d, %d, %v", uid, gid, err)
	}
	out := filepath.Join(t.TempDir(), "big")
	debugfs(t, img.RootFS, "dump /big2 "+out)
	if got, err := os.ReadFile(out); err != nil || sha256.Sum256(got) != sha256.Sum256([]byte(big)) {
		t.Errorf("content of /big2 differs (%d bytes, %v)", len(got), err)
	}
	for command, want := range map[string][]string{
		"stat /etc/rich":                {"Mode:  04751", "User:  1000", "Group: 70000", "security.capability (20)", "user.zz (100)", "user.a (90)", "trusted.middle (80)", "system.posix_acl_access (28)", "mtime: 0x6553f100:1d535300"},
		"stat /big":                     {"Links: 2", "Size: 1048576"},
		"stat /odd":                     {"Type: character special", "300:70000"},
		"stat /run":                     {`Fast link dest: "/var/run"`},
		"stat /tmp":                     {"Mode:  01777"},
		"stat /proc":                    {"Type: directory", "Mode:  0555"},
		"stat /sys":                     {"Type: directory"},
		"stat /dev":                     {"Type: directory"},
		"ea_get /etc/rich user.zz":      {strings.Repeat("z", 100)},
		"ea_get /etc/rich user.a":       {strings.Repeat("a", 90)},
		"stats -h":                      {"Filesystem UUID"},
		"cat /long":                     {strings.Repeat("l", 200)},
		"ea_list /etc/rich":             {"user.a"},
		"stat <2>":                      {"Type: directory"},
		"ncheck -c " + strconv.Itoa(11): {"lost+found"},
	} {
		got := debugfs(t, img.RootFS, command)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in:\n%s", command, w, got)
			}
		}
	}
	if got := debugfs(t, img.RootFS, "ea_list /etc/rich"); strings.Contains(got, "overlay") || strings.Contains(got, "nfs4") {
		t.Errorf("attributes that must not be there:\n%s", got)
	}
}

// The kernel is the judge of what the image holds, where it may be asked.
func TestRootImageMounts(t *testing.T) {
	prereq.Root(t, "mount an image")
	f := file("f", "x")
	f.PAXRecords = map[string]string{paxXattr + aclAccess: acl()}
	for _, n := range []string{"user.b", "user.aaaa", "user.c", "trusted.x", "security.y", "user.zzzzzz"} {
		f.PAXRecords[paxXattr+n] = n + strings.Repeat(".", 60)
	}
	img := mustLoad(t, newStore(t), "m:v1", makeImage(t, layerTar(t, f)))
	at := t.TempDir()
	prereq.LoopMount(t, img.RootFS, at, "ro")
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	for name := range f.PAXRecords {
		name = strings.TrimPrefix(name, paxXattr)
		buf := make([]byte, 256)
		n, err := unix.Lgetxattr(filepath.Join(at, "f"), name, buf)
		want := name + strings.Repeat(".", 60)
		if name == aclAccess {
			want = acl()
		}
		if err != nil || string(buf[:max(n, 0)]) != want {
			t.Errorf("%s = %q, %v", name, buf[:max(n, 0)], err)
		}
	}
}

func TestRootImageIsReproducible(t *testing.T) {
	im := makeImage(t, layerTar(t, file("a/b", "1"), file("c", strings.Repeat("x", 10000))))
	var sums [2][32]byte
	for i := range sums {
		raw, err := os.ReadFile(mustLoad(t, newStore(t), "r:v1", im).RootFS)
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = sha256.Sum256(raw)
	}
	if sums[0] != sums[1] {
		t.Error("two builds of one image differ")
	}
}

func TestRootImageIsBuiltOnce(t *testing.T) {
	s := newStore(t)
	img := mustLoad(t, s, "once:v1", makeImage(t, layerTar(t, file("a", "1"))))
	before, err := os.Stat(img.RootFS)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := s.Resolve(context.Background(), "once:v1", PullNever, PullOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	after, err := os.Stat(img.RootFS)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the root image was built again (%v)", err)
	}
}

// A root image that was damaged or that an older version built is made again.
func TestRootImageIsRepaired(t *testing.T) {
	for name, damage := range map[string]func(s *Store, d digest) error{
		"image gone":  func(s *Store, d digest) error { return os.Remove(s.rootPath(d)) },
		"image short": func(s *Store, d digest) error { return os.Truncate(s.rootPath(d), 4096) },
		"description": func(s *Store, d digest) error { return os.WriteFile(s.metaPath(d), []byte("{"), 0o600) },
		"format":      func(s *Store, d digest) error { return os.WriteFile(s.metaPath(d), []byte(`{"format":0}`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			img := mustLoad(t, s, "r:v1", makeImage(t, layerTar(t, file("a", "1"))))
			if err := os.Chmod(img.RootFS, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := damage(s, digest(img.ManifestDigest)); err != nil {
				t.Fatal(err)
			}
			got, err := s.Get(context.Background(), "r:v1")
			if err != nil || got.RootFS != "" {
				t.Errorf("Get() says root image %q, %v", got.RootFS, err)
			}
			got, err = s.Resolve(context.Background(), "r:v1", "", PullOptions{})
			if err != nil {
				t.Fatal(err)
			}
			fsck(t, got.RootFS)
		})
	}
}

// noise is text that does not compress.
func noise(n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return string(b)
}

func TestRootImageNeedsRoom(t *testing.T) {
	s := newStore(t)
	im := makeImage(t, layerTar(t, file("big", strings.Repeat("x", 8<<20))))
	s.free = func(string) (int64, error) { return s.limits.reserve + 1<<20, nil }
	_, err := load(t, s, "big:v1", im)
	wantKind(t, err, errdefs.IO)
	if err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("error %v", err)
	}
	if _, err := s.Get(context.Background(), "big:v1"); !errdefs.Is(err, errdefs.ImageNotFound) {
		t.Errorf("an image that did not fit has a name: %v", err)
	}
	// Space that goes while the image is written.
	asked := 0
	s.free = func(string) (int64, error) {
		if asked++; asked > 2 {
			return s.limits.reserve - 1, nil
		}
		return 1 << 40, nil
	}
	_, err = load(t, s, "big:v1", makeImage(t, layerTar(t, file("big", noise(64<<20)))))
	if err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("error %v after %d looks", err, asked)
	}
}

func TestRootImageCancelled(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(context.Background())
	src := writeDir(t, layoutFiles(t, map[string]*testImage{"c:v1": makeImage(t, layerTar(t, file("big", strings.Repeat("x", 4<<20))))}))
	_, err := s.Load(ctx, src, nil, func(p Progress) {
		if p.Phase == PhaseIndex {
			cancel()
		}
	})
	wantKind(t, err, errdefs.Cancelled)
	if _, err := s.Load(context.Background(), src, nil, nil); err != nil {
		t.Errorf("after a cancelled load: %v", err)
	}
}
