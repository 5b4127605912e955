package microsandbox_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// mountKinds are the kinds of mounts; named mounts have volumes of either kind.
var mountKinds = []string{"bind", "dir", "disk", "tmpfs", "image"}

// mountBench is one sandbox with every kind of mount in four variants:
//
//	/m/KIND/rw     no option set
//	/m/KIND/ro     readonly
//	/m/KIND/noexec noexec
//	/m/KIND/safe   nosuid and nodev
//
// and beside them /m/off, a bind mount with stat virtualization off, and
// /m/dirty, a read-only image whose journal was not replayed.
type mountBench struct {
	sb   *msb.Sandbox
	dir  string            // of the host, for bind mounts and images
	vols map[string]string // volume name to host path
}

func (b *mountBench) bind(variant string) string  { return filepath.Join(b.dir, "bind-"+variant) }
func (b *mountBench) image(variant string) string { return filepath.Join(b.dir, variant+".img") }

func newMountBench(ctx context.Context, t *testing.T) *mountBench {
	t.Helper()
	b := &mountBench{dir: t.TempDir(), vols: map[string]string{}}
	ok(t, os.Chmod(b.dir, 0o755))
	opts := []msb.SandboxOption{}
	for _, v := range []struct {
		name    string
		options msb.MountOptions
	}{
		{"rw", msb.MountOptions{}},
		{"ro", msb.MountOptions{Readonly: true}},
		{"noexec", msb.MountOptions{Noexec: true}},
		{"safe", msb.MountOptions{Nosuid: true, Nodev: true}},
	} {
		b.makeSources(ctx, t, v.name)
		o := v.options
		opts = append(opts, msb.WithMounts(map[string]msb.MountConfig{
			"/m/bind/" + v.name:  msb.Mount.Bind(b.bind(v.name), o),
			"/m/dir/" + v.name:   msb.Mount.Named("dir-"+v.name, o),
			"/m/disk/" + v.name:  msb.Mount.Named("disk-"+v.name, o),
			"/m/tmpfs/" + v.name: msb.Mount.Tmpfs(msb.TmpfsOptions{SizeMiB: 8, Readonly: o.Readonly, Noexec: o.Noexec, Nosuid: o.Nosuid, Nodev: o.Nodev}),
		}))
		if v.name != "rw" {
			opts = append(opts, msb.WithMounts(map[string]msb.MountConfig{
				"/m/image/" + v.name: msb.Mount.Disk(b.image(v.name), msb.DiskOptions{Format: msb.DiskImageFormatRaw, Fstype: "ext4",
					Readonly: o.Readonly, Noexec: o.Noexec, Nosuid: o.Nosuid, Nodev: o.Nodev}),
			}))
		}
	}
	// Built by hand; neither format nor fstype is given.
	built := must(msb.NewMountBuilder("/m//image/rw/").Disk(b.image("rw")).Build())(t)
	b.makeImage(t, "dirty")
	host(t, "debugfs", "-w", "-R", "feature needs_recovery", b.image("dirty"))
	ok(t, os.Mkdir(b.bind("off"), 0o755))
	b.seed(t, b.bind("off"))
	b.sb = boot(ctx, t, "mounts", append(opts,
		msb.WithVolumeMounts(built),
		msb.WithVolume("/m/off", func(m *msb.MountBuilder) *msb.MountBuilder {
			return m.Bind(b.bind("off")).StatVirtualization(msb.StatVirtualizationOff)
		}),
		msb.WithVolume("/m/dirty", func(m *msb.MountBuilder) *msb.MountBuilder { return m.Disk(b.image("dirty")).Readonly() }),
	)...)
	return b
}

// makeSources makes what one variant of each kind mounts.
func (b *mountBench) makeSources(ctx context.Context, t *testing.T, variant string) {
	t.Helper()
	ok(t, os.Mkdir(b.bind(variant), 0o755))
	b.seed(t, b.bind(variant))
	dir := must(msb.CreateVolume(ctx, "dir-"+variant))(t)
	ok(t, dir.FS().WriteString(ctx, "/hello", "seeded\n"))
	disk := must(msb.CreateVolume(ctx, "disk-"+variant, msb.WithVolumeKind(msb.VolumeKindDisk), msb.WithVolumeSize(16)))(t)
	b.vols[dir.Name()], b.vols[disk.Name()] = dir.Path(), *disk.DiskPath()
	b.makeImage(t, variant)
}

func (b *mountBench) seed(t *testing.T, dir string) {
	t.Helper()
	ok(t, os.WriteFile(filepath.Join(dir, "hello"), []byte("seeded\n"), 0o644))
}

// makeImage makes an ext4 image without a label, with the file hello in it.
func (b *mountBench) makeImage(t *testing.T, variant string) {
	t.Helper()
	content := t.TempDir()
	b.seed(t, content)
	ok(t, os.WriteFile(b.image(variant), nil, 0o600))
	ok(t, os.Truncate(b.image(variant), 16<<20))
	host(t, "mkfs.ext4", "-q", "-F", "-d", content, b.image(variant))
}

// TestMountsInGuest looks at every kind of mount from inside one guest.
func TestMountsInGuest(t *testing.T) {
	vmtest.Home(t)
	ctx := testContext(t)
	b := newMountBench(ctx, t)
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"T-16 T-17 B-50 B-67 transports", b.testTransports},
		{"T-24 B-63 no option set", b.testNoOption},
		{"MB-08 T-25 B-54 readonly", b.testReadonly},
		{"MB-09 T-26 B-55 noexec", b.testNoexec},
		{"MB-10 T-27 B-56 nosuid", b.testNosuid},
		{"MB-11 T-28 B-57 nodev", b.testNodev},
		{"MB-14 tmpfs size", b.testTmpfsSize},
		{"MB-01 B-36 B-41 changes are seen on both sides", b.testCoherence},
		{"B-09 no quota", b.testNoQuota},
		{"MB-15 T-51 B-68 mount built by hand", b.testBuiltByHand},
		{"T-30 T-34 B-59 stat virtualization strict", b.testStrict},
		{"T-32 stat virtualization off", b.testOff},
		{"image with a dirty journal, read-only", b.testDirtyImage},
		{"MB-05 T-38 B-52 what was written stays in the image", b.testImageKeeps}, // stops the sandbox
	} {
		t.Run(test.name, test.run)
	}
}

// mountLine is a line of the guest's /proc/mounts.
type mountLine struct {
	source, fstype string
	options        []string
}

func (b *mountBench) mounts(t *testing.T) map[string]mountLine {
	t.Helper()
	lines := map[string]mountLine{}
	for line := range strings.Lines(sh(t, b.sb, "cat /proc/mounts")) {
		f := strings.Fields(line)
		lines[f[1]] = mountLine{f[0], f[2], strings.Split(f[3], ",")}
	}
	return lines
}

func (b *mountBench) testTransports(t *testing.T) {
	lines := b.mounts(t)
	for _, kind := range mountKinds {
		m := lines["/m/"+kind+"/rw"]
		fstype, device := "virtiofs", false
		switch kind {
		case "tmpfs":
			fstype = "tmpfs"
		case "disk", "image":
			fstype, device = "ext4", true
		}
		if m.fstype != fstype || strings.HasPrefix(m.source, "/dev/vd") != device {
			t.Errorf("%s: mounted %s of type %s", kind, m.source, m.fstype)
		}
		if device { // a block device of the virtio bus
			sh(t, b.sb, `readlink -f /sys/class/block/$(basename `+m.source+`) | grep -q /virtio`)
		}
	}
}

func (b *mountBench) testNoOption(t *testing.T) {
	lines := b.mounts(t)
	for _, kind := range mountKinds {
		for variant, want := range map[string][]string{"rw": nil, "ro": {"ro"}, "noexec": {"noexec"}, "safe": {"nosuid", "nodev"}} {
			var got []string
			for _, o := range []string{"ro", "noexec", "nosuid", "nodev"} {
				if slices.Contains(lines["/m/"+kind+"/"+variant].options, o) {
					got = append(got, o)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s %s: options %v, want %v", kind, variant, got, want)
			}
		}
		t.Run(kind, func(t *testing.T) {
			dir := "/m/" + kind + "/rw"
			got := sh(t, b.sb, setUp(dir)+`
`+dir+`/script
setpriv --reuid 65534 --regid 65534 --clear-groups `+dir+`/setuid -u
echo gone > `+dir+`/null && echo written`)
			if want := "ran\n0\nwritten"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

// setUp is a script that puts a script, a setuid program and a device into dir.
func setUp(dir string) string {
	return `set -e
cd ` + dir + `
chmod 755 .
printf '#!/bin/sh\necho ran\n' > script; chmod 755 script
cp /usr/bin/id setuid; chmod 4755 setuid
mknod null c 1 3; chmod 666 null`
}

func (b *mountBench) testReadonly(t *testing.T) {
	for _, kind := range mountKinds {
		t.Run(kind, func(t *testing.T) {
			dir := "/m/" + kind + "/ro"
			const erofs = "Read-only file system"
			for _, op := range []string{"touch new", "mkdir sub", "chmod 700 .", "mkfifo fifo"} {
				refuses(t, b.sb, "cd "+dir+" && "+op, erofs)
			}
			switch kind {
			case "bind", "dir", "image":
				refuses(t, b.sb, "echo changed > "+dir+"/hello", erofs)
				refuses(t, b.sb, "rm "+dir+"/hello", erofs)
				if got := sh(t, b.sb, "cat "+dir+"/hello"); got != "seeded" {
					t.Errorf("read %q", got)
				}
			case "tmpfs":
				return // nothing of the host is behind it: the guest's root may change it
			}
			// The guest's root can take the flag away, not what the host refuses.
			out := run(t, b.sb, "mount -o remount,rw "+dir+" && touch "+dir+"/new")
			if out.Success() {
				t.Errorf("after a remount the guest can write")
			}
			sh(t, b.sb, "test ! -e "+dir+"/new")
		})
	}
	if got := must(os.ReadFile(filepath.Join(b.bind("ro"), "hello")))(t); string(got) != "seeded\n" {
		t.Errorf("host file behind a read-only mount = %q", got)
	}
}

func (b *mountBench) testNoexec(t *testing.T) {
	for _, kind := range mountKinds {
		t.Run(kind, func(t *testing.T) {
			dir := "/m/" + kind + "/noexec"
			got := sh(t, b.sb, `cd `+dir+` && printf '#!/bin/sh\necho ran\n' > script && cp /bin/true program && chmod 755 script program && sh script`)
			if got != "ran" {
				t.Errorf("sh script printed %q", got)
			}
			refuses(t, b.sb, dir+"/script", "Permission denied")
			_, err := b.sb.Exec(testContext(t), dir+"/program", nil)
			wantKind(t, err, msb.ErrExecFailed)
			if f := failure(err); f == nil || f.Kind != "permission_denied" {
				t.Errorf("failure = %+v", f)
			}
		})
	}
}

func (b *mountBench) testNosuid(t *testing.T) {
	for _, kind := range mountKinds {
		dir := "/m/" + kind + "/safe"
		got := sh(t, b.sb, setUp(dir)+`
./script
setpriv --reuid 65534 --regid 65534 --clear-groups ./setuid -u`)
		if got != "ran\n65534" {
			t.Errorf("%s: got %q", kind, got)
		}
	}
}

func (b *mountBench) testNodev(t *testing.T) {
	for _, kind := range mountKinds {
		refuses(t, b.sb, "echo x > /m/"+kind+"/safe/null", "Permission denied")
	}
}

func (b *mountBench) testTmpfsSize(t *testing.T) {
	refuses(t, b.sb, "dd if=/dev/zero of=/m/tmpfs/rw/big bs=1M count=9", "No space left on device")
	if got := sh(t, b.sb, "stat -c %s /m/tmpfs/rw/big; rm /m/tmpfs/rw/big"); must(strconv.Atoi(got))(t) > 8<<20 {
		t.Errorf("%s bytes in a tmpfs of 8 MiB", got)
	}
}

// testCoherence changes files on either side and looks for that on the other,
// where it has to be seen within a second.
func (b *mountBench) testCoherence(t *testing.T) {
	for _, dir := range []struct{ guest, host string }{
		{"/m/bind/rw", b.bind("rw")}, {"/m/dir/rw", b.vols["dir-rw"]},
	} {
		guest := func(script string) func() bool {
			return func() bool { return run(t, b.sb, "cd "+dir.guest+" && "+script).Success() }
		}
		file := filepath.Join(dir.host, "shared")
		// A name that the guest has just missed, contents it has just read.
		sh(t, b.sb, "test ! -e "+dir.guest+"/shared")
		ok(t, os.WriteFile(file, []byte("one"), 0o644))
		vmtest.Eventually(t, time.Second, "file of the host in the guest", guest(`test "$(cat shared)" = one`))
		ok(t, os.WriteFile(file, []byte("two, longer"), 0o644))
		vmtest.Eventually(t, time.Second, "contents of the host in the guest", guest(`test "$(cat shared)" = "two, longer"`))
		ok(t, os.Rename(file, file+"2"))
		vmtest.Eventually(t, time.Second, "rename of the host in the guest", guest(`test ! -e shared && test -e shared2`))

		sh(t, b.sb, "cd "+dir.guest+" && echo guest >> shared2 && mkdir sub && echo new > sub/file")
		if got := must(os.ReadFile(file + "2"))(t); string(got) != "two, longerguest\n" {
			t.Errorf("the host reads %q", got)
		}
		if got := must(os.ReadFile(filepath.Join(dir.host, "sub/file")))(t); string(got) != "new\n" {
			t.Errorf("the host reads %q", got)
		}
		sh(t, b.sb, "rm -r "+dir.guest+"/sub")
		if _, err := os.Stat(filepath.Join(dir.host, "sub")); !os.IsNotExist(err) {
			t.Errorf("what the guest removed: %v", err)
		}
	}
}

func (b *mountBench) testNoQuota(t *testing.T) {
	h := must(msb.GetVolume(testContext(t), "dir-rw"))(t)
	if h.QuotaMiB() != nil {
		t.Errorf("quota = %d", *h.QuotaMiB())
	}
	sum := sh(t, b.sb, "head -c 64M /dev/urandom > /m/dir/rw/big && sync /m/dir/rw/big && sha256sum < /m/dir/rw/big")
	if got := host(t, "sha256sum", filepath.Join(b.vols["dir-rw"], "big")); got[:64] != sum[:64] {
		t.Errorf("64 MiB differ: %s in the guest, %s here", sum, got)
	}
	ok(t, h.FS().Remove(testContext(t), "/big"))
}

func (b *mountBench) testBuiltByHand(t *testing.T) {
	if got := sh(t, b.sb, "cat /m/image/rw/hello"); got != "seeded" {
		t.Errorf("read %q", got)
	}
}

// testStrict: owners, modes and types are the guest's own affair.
func (b *mountBench) testStrict(t *testing.T) {
	for _, dir := range []struct{ guest, host string }{
		{"/m/bind/rw", b.bind("rw")}, {"/m/dir/rw", b.vols["dir-rw"]},
	} {
		file := filepath.Join(dir.host, "hello")
		var before, after unix.Stat_t
		ok(t, unix.Stat(file, &before))
		got := sh(t, b.sb, `cd `+dir.guest+` && chown 1000:1001 hello && chmod 4710 hello && mkfifo fifo && ln -s ../target link && mknod dev b 8 1 &&
stat -c '%u:%g %a' hello && stat -c %F fifo dev && readlink link && stat -c %t:%T dev`)
		if want := "1000:1001 4710\nfifo\nblock special file\n../target\n8:1"; got != want {
			t.Errorf("guest sees %q, want %q", got, want)
		}
		ok(t, unix.Stat(file, &after))
		if before.Uid != after.Uid || before.Gid != after.Gid || before.Mode != after.Mode {
			t.Errorf("host file changed: %d:%d %o to %d:%d %o", before.Uid, before.Gid, before.Mode, after.Uid, after.Gid, after.Mode)
		}
		for _, name := range []string{"fifo", "link", "dev"} {
			if fi := must(os.Lstat(filepath.Join(dir.host, name)))(t); !fi.Mode().IsRegular() || fi.Mode()&os.ModeSetuid != 0 {
				t.Errorf("%s is %v on the host", name, fi.Mode())
			}
		}
	}
	list := must(must(msb.GetVolume(testContext(t), "dir-rw"))(t).FS().List(testContext(t), "/"))(t)
	for _, e := range list {
		if e.Path == "/link" && e.Kind != msb.FsEntryKindSymlink {
			t.Errorf("VolumeFs lists the guest's link as %s", e.Kind)
		}
	}
}

// testOff: the guest sees and changes what the host has.
func (b *mountBench) testOff(t *testing.T) {
	file := filepath.Join(b.bind("off"), "hello")
	override := make([]byte, 20)
	override[0], override[4], override[12], override[13] = 1, 99, 0o600&0xff, 0x81
	if err := unix.Setxattr(file, "user.msb.override_stat", override, 0); err != nil {
		prereq.Missing(t, "user attributes in %s: %v", filepath.Dir(file), err)
	}
	uid := os.Getuid()
	if uid == 0 {
		ok(t, os.Chown(file, 4321, 4321))
		uid = 4321
	}
	if got, want := sh(t, b.sb, "stat -c '%u %a' /m/off/hello"), fmt.Sprintf("%d 644", uid); got != want && uid == 4321 {
		t.Errorf("guest sees %q, want %q", got, want)
	}
	sh(t, b.sb, `cd /m/off && chmod 640 hello && ln -s hello link && mkfifo fifo`)
	fi := must(os.Stat(file))(t)
	if fi.Mode().Perm() != 0o640 {
		t.Errorf("guest's chmod gave %v on the host", fi.Mode())
	}
	if got, err := os.Readlink(filepath.Join(b.bind("off"), "link")); got != "hello" {
		t.Errorf("guest's link is %q, %v on the host", got, err)
	}
	if fi := must(os.Lstat(filepath.Join(b.bind("off"), "fifo")))(t); fi.Mode()&os.ModeNamedPipe == 0 {
		t.Errorf("guest's FIFO is %v on the host", fi.Mode())
	}
	refuses(t, b.sb, "mknod /m/off/dev c 1 3", "Operation not permitted")
	if os.Getuid() == 0 {
		sh(t, b.sb, "chown 77:78 /m/off/hello")
		if st, okay := must(os.Stat(file))(t).Sys().(*syscall.Stat_t); !okay || st.Uid != 77 || st.Gid != 78 {
			t.Errorf("guest's chown gave %d:%d on the host", st.Uid, st.Gid)
		}
	}
}

func (b *mountBench) testDirtyImage(t *testing.T) {
	if got := sh(t, b.sb, "cat /m/dirty/hello"); got != "seeded" {
		t.Errorf("read %q", got)
	}
	refuses(t, b.sb, "touch /m/dirty/x", "Read-only file system")
}

func (b *mountBench) testImageKeeps(t *testing.T) {
	sh(t, b.sb, "echo from the guest > /m/image/rw/result")
	ok(t, b.sb.Stop(testContext(t)))
	if got := host(t, "debugfs", "-R", "cat /result", b.image("rw")); !strings.HasSuffix(got, "from the guest") {
		t.Errorf("the image has %q", got)
	}
	host(t, "e2fsck", "-fn", b.image("rw"))
}
