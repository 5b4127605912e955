package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func named(name, kind string, o microsandbox.MountOptions, size, quota uint32) microsandbox.MountConfig {
	return microsandbox.Mount.NamedWith(name, o, microsandbox.NamedVolumeOptions{
		Mode: microsandbox.NamedVolumeModeEnsureExists, Kind: kind, SizeMiB: size, QuotaMiB: quota,
	})
}

func bind(path string, o microsandbox.MountOptions) microsandbox.MountConfig {
	return microsandbox.Mount.Bind(path, o)
}

// TestParseMount is the grammar of the mount flags.
func TestParseMount(t *testing.T) {
	none := microsandbox.MountOptions{}
	ro := microsandbox.MountOptions{Readonly: true}
	tests := []struct {
		flag  mountFlag
		text  string
		guest string
		want  microsandbox.MountConfig
	}{
		// -v: what begins like a path is one.
		{flagVolume, "/src:/app", "/app", bind("/src", none)},
		{flagVolume, "./src:/app", "/app", bind("./src", none)},
		{flagVolume, "../src:/app", "/app", bind("../src", none)},
		{flagVolume, ".:/app", "/app", bind(".", none)},
		{flagVolume, "..:/app", "/app", bind("..", none)},
		{flagVolume, "/:/app", "/app", bind("/", none)},
		{flagVolume, "src:/app", "/app", named("src", "", none, 0, 0)},
		{flagVolume, ".src:/app", "/app", named(".src", "", none, 0, 0)},
		{flagVolume, "~/src:/app", "/app", named("~/src", "", none, 0, 0)},
		{flagVolume, "pip-cache:/root/.cache/pip", "/root/.cache/pip", named("pip-cache", "", none, 0, 0)},
		// The source ends at ":/", the guest path at the next ":".
		{flagVolume, "/a:b:/app", "/app", bind("/a:b", none)},
		{flagVolume, "/src:/app:ro", "/app", bind("/src", ro)},
		{flagVolume, "/src:/app:", "/app", bind("/src", none)},
		{flagVolume, "/src:/app: ro , ,nodev,", "/app", bind("/src", microsandbox.MountOptions{Readonly: true, Nodev: true})},
		{flagVolume, "/src:/app:rw", "/app", bind("/src", none)},
		{flagVolume, "/src:/app:noexec,nosuid,nodev", "/app", bind("/src", microsandbox.MountOptions{Noexec: true, Nosuid: true, Nodev: true})},
		{flagVolume, "/src:/app:stat-virt=off,host-perms=private", "/app", bind("/src", microsandbox.MountOptions{StatVirtualization: "off", HostPermissions: "private"})},
		{flagVolume, "/src:/app:cache=none", "/app", bind("/src", microsandbox.MountOptions{Cache: "none"})},
		{flagVolume, "vol:/c:cache=always,ro", "/c", named("vol", "", microsandbox.MountOptions{Cache: "always", Readonly: true}, 0, 0)},
		{flagDir, "/src:/app:cache=auto", "/app", bind("/src", microsandbox.MountOptions{Cache: "auto"})},
		{flagNamed, "vol:/c:cache=none,kind=dir", "/c", named("vol", "dir", microsandbox.MountOptions{Cache: "none"}, 0, 0)},
		{flagVolume, "/src:/app:follow-root-symlinks", "/app", bind("/src", none)},
		{flagVolume, "/src:/app:quota=1G", "/app", bind("/src", microsandbox.MountOptions{QuotaMiB: 1024})},
		{flagVolume, "cache:/c:quota=1.5G,ro", "/c", named("cache", "", ro, 0, 1536)},
		// --mount-dir: always a path.
		{flagDir, "src:/app", "/app", bind("src", none)},
		{flagDir, "/src:/app:ro,stat-virt=relaxed", "/app", bind("/src", microsandbox.MountOptions{Readonly: true, StatVirtualization: "relaxed"})},
		// --mount-named
		{flagNamed, "cache:/c", "/c", named("cache", "", none, 0, 0)},
		{flagNamed, "cache:/c:kind=dir,quota=512", "/c", named("cache", "dir", none, 0, 512)},
		{flagNamed, "cache:/c:kind=directory", "/c", named("cache", "dir", none, 0, 0)},
		{flagNamed, "db:/db:kind=disk,size=20G", "/db", named("db", "disk", none, 20<<10, 0)},
		{flagNamed, "db:/db:size=64M,kind=disk,ro", "/db", named("db", "disk", ro, 64, 0)},
		{flagNamed, "db:/db:create=existing", "/db", microsandbox.Mount.NamedWith("db", none, microsandbox.NamedVolumeOptions{Mode: "existing"})},
		{flagNamed, "db:/db:create=create,kind=disk,size=64", "/db", microsandbox.Mount.NamedWith("db", none, microsandbox.NamedVolumeOptions{Mode: "create", Kind: "disk", SizeMiB: 64})},
		{flagNamed, "c:/c:label.team=ml,label.env=,label.a=b=c", "/c", microsandbox.Mount.NamedWith("c", none, microsandbox.NamedVolumeOptions{
			Mode: "ensure-exists", Labels: map[string]string{"team": "ml", "env": "", "a": "b=c"}})},
		// --mount-disk
		{flagDisk, "a.qcow2:/d", "/d", microsandbox.Mount.Disk("a.qcow2", microsandbox.DiskOptions{})},
		{flagDisk, "/a.img:/d:format=raw,fstype=ext4,ro", "/d", microsandbox.Mount.Disk("/a.img", microsandbox.DiskOptions{Format: "raw", Fstype: "ext4", Readonly: true})},
		// --tmpfs
		{flagTmpfs, "/t", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{})},
		{flagTmpfs, "/t:64M", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{SizeMiB: 64})},
		{flagTmpfs, "/t:64", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{SizeMiB: 64})},
		{flagTmpfs, "/t:64M:ro,noexec", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{SizeMiB: 64, Readonly: true, Noexec: true})},
		{flagTmpfs, "/t:size=1G,nosuid", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{SizeMiB: 1024, Nosuid: true})},
		{flagTmpfs, "/t:nodev", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{Nodev: true})},
		{flagTmpfs, "/t:ro,nodev", "/t", microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{Readonly: true, Nodev: true})},
	}
	for _, tt := range tests {
		t.Run(tt.flag.String()+" "+tt.text, func(t *testing.T) {
			guest, got, err := parseMount(tt.flag, tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if guest != tt.guest || got != tt.want {
				t.Errorf("got %q %+v\nwant %q %+v", guest, got, tt.guest, tt.want)
			}
		})
	}
}

// TestParseMountRefuses: every wrong flag is a usage error that says what is
// wrong with it.
func TestParseMountRefuses(t *testing.T) {
	tests := []struct {
		flag mountFlag
		text string
		want string
	}{
		{flagVolume, "", "SOURCE:GUEST"},
		{flagVolume, "/src", "SOURCE:GUEST"},
		{flagVolume, "/src:app", "SOURCE:GUEST"},
		{flagVolume, ":/app", "SOURCE:GUEST"},
		{flagVolume, "/src:/app,ro", `did you mean "/src:/app:ro"`},
		{flagVolume, "/src:/app:size=1G", `"size" is not valid with --volume, only with --mount-named, --tmpfs`},
		{flagVolume, "/src:/app:kind=disk", `"kind" is not valid`},
		{flagVolume, "/src:/app:fstype=ext4", `"fstype" is not valid`},
		{flagVolume, "/src:/app:format=raw", `"format" is not valid`},
		{flagVolume, "cache:/c:label.a=b", "labels are not valid"},
		{flagVolume, "/src:/app:ro,ro", `"ro/rw" is given more than once`},
		{flagVolume, "/src:/app:ro,rw", `"ro/rw" is given more than once`},
		{flagVolume, "/src:/app:noexec,noexec", `"noexec" is given more than once`},
		{flagVolume, "/src:/app:stat-virt=off,stat-virt=off", `"stat-virt" is given more than once`},
		{flagVolume, "/src:/app:suid", `"suid" is not supported`},
		{flagVolume, "/src:/app:exec", `"exec" is not supported`},
		{flagVolume, "/src:/app:dev", `"dev" is not supported`},
		{flagVolume, "/src:/app:z", "must be a flag"},
		{flagVolume, "/src:/app:Z=1", `unknown mount option "Z"`},
		{flagVolume, "/src:/app:RO", "must be a flag"},
		{flagVolume, "/src:/app:ro=1", `"ro" takes no value`},
		{flagVolume, "/src:/app:quota", `"quota" needs a value`},
		{flagVolume, "/src:/app:quota=", "empty"},
		{flagVolume, "/src:/app:quota=1K", "not a size"},
		{flagVolume, "/src:/app:stat-virt=lax", `"lax" is none of strict, relaxed, off`},
		{flagVolume, "/src:/app:host-perms=off", `"off" is none of private, mirror`},
		{flagVolume, "/src:/app:cache=writeback", `"writeback" is none of auto, none, always`},
		{flagVolume, "/src:/app:cache", `"cache" needs a value`},
		{flagVolume, "/src:/app:cache=none,cache=none", `"cache" is given more than once`},
		{flagVolume, "/src:/app:ro:nodev", "must be a flag"},
		{flagDir, "/src:/app:size=1", "not valid with --mount-dir"},
		{flagFile, "/src", "SOURCE:GUEST"},
		{flagFile, "/src:/app:quota=1", `"quota" is not valid with --mount-file`},
		{flagNamed, "./a:/c", "is a path"},
		{flagNamed, "/a:/c", "is a path"},
		{flagNamed, "db:/db:kind=disk", "size=SIZE"},
		{flagNamed, "db:/db:size=1G", "kind=disk"},
		{flagNamed, "db:/db:kind=dir,size=1G", "kind=disk"},
		{flagNamed, "db:/db:kind=disk,size=1G,quota=1G", "quota"},
		{flagNamed, "db:/db:kind=disk,size=1G,stat-virt=strict", "stat-virt"},
		{flagNamed, "db:/db:kind=disk,size=1G,host-perms=private", "host-perms"},
		{flagNamed, "db:/db:kind=disk,size=1G,cache=none", "cache is not valid with kind=disk"},
		{flagNamed, "db:/db:kind=tape", `"tape" is none of`},
		{flagNamed, "db:/db:kind=disk,size=0", "less than 1 MiB"},
		{flagNamed, "db:/db:create=maybe", `"maybe" is none of`},
		{flagNamed, "db:/db:create=existing,quota=1G", "makes no volume"},
		{flagNamed, "db:/db:create=existing,label.a=b", "makes no volume"},
		{flagNamed, "db:/db:label.=x", "needs a key"},
		{flagNamed, "db:/db:label.a=1,label.a=2", `label "a" is given more than once`},
		{flagNamed, "db:/db:label.a", "must be a flag"},
		{flagNamed, "db:/db:format=raw", "not valid with --mount-named"},
		{flagDisk, "a:/d:format=vdi", `"vdi" is none of`},
		{flagDisk, "a:/d:fstype=", "empty"},
		{flagDisk, "a:/d:stat-virt=off", "not valid with --mount-disk"},
		{flagDisk, "a:/d:cache=none", "not valid with --mount-disk"},
		{flagTmpfs, "/t:cache=none", "not valid with --tmpfs"},
		{flagDisk, "a:/d:size=1", "not valid with --mount-disk"},
		{flagTmpfs, "", "GUEST"},
		{flagTmpfs, "t", "GUEST"},
		{flagTmpfs, "src:/t", "GUEST"},
		{flagTmpfs, "/t,ro", `did you mean "/t:ro"`},
		{flagTmpfs, "/t:", "empty"},
		{flagTmpfs, "/t:big", "not a size"},
		{flagTmpfs, "/t:0", "less than 1 MiB"},
		{flagTmpfs, "/t:ro:64M", "not a size"},
		{flagTmpfs, "/t:64M:size=1G", "the size of the tmpfs is given more than once"},
		{flagTmpfs, "/t:size=1G,size=1G", "the size of the tmpfs is given more than once"},
		{flagTmpfs, "/t:64M:128M", "must be a flag"},
		{flagTmpfs, "/t:suid", `"suid" is not supported`},
		{flagTmpfs, "/t:quota=1G", "not valid with --tmpfs"},
	}
	for _, tt := range tests {
		t.Run(tt.flag.String()+" "+tt.text, func(t *testing.T) {
			_, _, err := parseMount(tt.flag, tt.text)
			var usage usageError
			if !errors.As(err, &usage) {
				t.Fatalf("got %v, want a usage error", err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not say %q", err, tt.want)
			}
		})
	}
}

func TestMountFileNotYet(t *testing.T) {
	_, _, err := parseMount(flagFile, "/etc/hosts:/etc/hosts:ro")
	if !errors.Is(err, microsandbox.ErrUnsupportedOperation) {
		t.Errorf("got %v", err)
	}
}

func TestParseMiB(t *testing.T) {
	tests := map[string]uint32{
		"0": 0, "1": 1, "512": 512, "512M": 512, "512m": 512, "1G": 1024, "1g": 1024, "1.5G": 1536,
		"0.5G": 512, "1T": 1 << 20, "1.5t": 3 << 19, "2P": 1 << 31, "512MiB": 512, "512miB": 512, "1.5GiB": 1536, "16TiB": 16 << 20, "2PiB": 1 << 31, "1.0009765625G": 1025, "1.0009765624G": 1024, "4294967295": 1<<32 - 1, "0001": 1, "4194303.999G": 1<<32 - 2,
	}
	for text, want := range tests {
		if got, err := parseMiB(text); err != nil || got != want {
			t.Errorf("parseMiB(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "M", "1K", "1KiB", "4P", "4PiB", "1E", "iB", "1iB", "1B", "1Gi", "1GB", "1GIB", "MiB", "1MiBiB", "1.5MiB", "1 GiB", "1MB", "-1", "+1", "1.5", "1.5M", ".5G", "1.G", "1.5.5G", "1e3", "0x10", " 1", "1 ",
		"4294967296", "4194304G", "0.0009G", "1_000", "١", strings.Repeat("9", 41), "1/2", "1/2G"} {
		if got, err := parseMiB(text); err == nil {
			t.Errorf("parseMiB(%q) = %d, want an error", text, got)
		}
	}
}

// mountCommand parses a command line with the mount flags.
func mountCommand(t *testing.T, args ...string) (*mountFlags, error) {
	t.Helper()
	cmd := &cobra.Command{Use: "run", RunE: func(*cobra.Command, []string) error { return nil }, SilenceErrors: true, SilenceUsage: true}
	f := addMountFlags(cmd)
	cmd.SetArgs(args)
	return f, cmd.Execute()
}

// TestMountFlagsOrder: mounts keep the order of the command line, across flags.
func TestMountFlagsOrder(t *testing.T) {
	f, err := mountCommand(t, "--tmpfs", "/t", "-v", "a:/a", "--volume=./b:/b:ro", "--mount-disk", "d.img:/d", "--mount-dir", "e:/e", "--mount-named", "f:/f", "-vg:/g")
	if err != nil {
		t.Fatal(err)
	}
	opts, err := f.options()
	if err != nil {
		t.Fatal(err)
	}
	var guests []string
	for _, o := range opts {
		c := &microsandbox.SandboxConfig{}
		o(c)
		for guest, m := range c.Volumes {
			guests = append(guests, guest+" "+m.Kind().String())
		}
	}
	want := []string{"/t tmpfs", "/a named", "/b bind", "/d disk", "/e bind", "/f named", "/g named"}
	if !slices.Equal(guests, want) {
		t.Errorf("mounts %v, want %v", guests, want)
	}
}

func TestMountFlagsErrors(t *testing.T) {
	tests := map[string]struct {
		args []string
		want string
	}{
		"names flag and value":  {[]string{"-v", "nonsense"}, `--volume "nonsense": expected SOURCE:GUEST`},
		"first wrong one":       {[]string{"--tmpfs", "x", "-v", "y"}, `--tmpfs "x"`},
		"same guest path":       {[]string{"-v", "a:/x", "--tmpfs", "/x/"}, `two mounts at "/x": --volume "a:/x" and --tmpfs "/x/"`},
		"same flag, same guest": {[]string{"-v", "a:/x", "-v", "b:/x"}, `two mounts at "/x"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f, err := mountCommand(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.options()
			var usage usageError
			if !errors.As(err, &usage) || !strings.Contains(fmt.Sprint(err), tt.want) {
				t.Errorf("got %v, want a usage error with %s", err, tt.want)
			}
		})
	}
	f, err := mountCommand(t)
	if err != nil {
		t.Fatal(err)
	}
	if opts, err := f.options(); err != nil || len(opts) != 0 {
		t.Errorf("no flags: %v, %v", opts, err)
	}
}

// FuzzParseMount: the text is typed by anybody. Parsing does not panic, fails
// only with a usage error or "not yet", and yields exactly one kind of mount at
// an absolute guest path.
func FuzzParseMount(f *testing.F) {
	for _, s := range []string{"/src:/app:ro", "a:/b:kind=disk,size=1.5G", "/t:64M:ro", "a.qcow2:/d:format=raw", "::/:/", "a:/b:label.x=y", "/t:size=9g,"} {
		for flag := flagVolume; flag <= flagTmpfs; flag <<= 1 {
			f.Add(uint8(flag), s)
		}
	}
	f.Fuzz(func(t *testing.T, bits uint8, text string) {
		flag := flagVolume << (bits % 6)
		guest, m, err := parseMount(flag, text)
		var usage usageError
		switch {
		case errors.As(err, &usage), errors.Is(err, microsandbox.ErrUnsupportedOperation):
			return
		case err != nil:
			t.Fatalf("error of another kind: %v", err)
		}
		if !strings.HasPrefix(guest, "/") || m.Kind() == 0 {
			t.Fatalf("parseMount(%v, %q) = %q, %+v", flag, text, guest, m)
		}
	})
}

// TestPrintedSizes: a size of a volume is printed so that it is read again.
func TestPrintedSizes(t *testing.T) {
	for mib, want := range map[uint32]string{
		1: "1MiB", 512: "512MiB", 1023: "1023MiB", 1024: "1GiB", 1536: "1.5GiB", 1234: "1234MiB", 1 << 20: "1TiB",
		16<<20 - 1: "16777215MiB", 16 << 20: "16TiB", 1<<32 - 1: "4294967295MiB", 1 << 31: "2PiB", 10_000_000: "10000000MiB",
	} {
		if got := formatMiB(mib); got != want {
			t.Errorf("%d MiB: %s, want %s", mib, got, want)
		}
		if back, err := parseMiB(want); err != nil || back != mib {
			t.Errorf("%s: %d, %v", want, back, err)
		}
		if got := formatLimit(uint64(mib) << 20); got != want {
			t.Errorf("%d MiB as a limit: %s, want %s", mib, got, want)
		}
	}
	if got := formatLimit(4096); got != "4KiB" {
		t.Error(got)
	}
}
