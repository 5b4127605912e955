package microsandbox_test

import (
	"context"
	"fmt"
	"log"

	"github.com/microsandbox-go/microsandbox"
)

// A directory of the host, writable from both sides.
func ExampleMountBuilder_Bind() {
	mount, err := microsandbox.NewMountBuilder("/app").Bind("./src").Build()
	fmt.Println(mount.Guest(), mount.Config().Bind, err)
	// Output: /app ./src <nil>
}

// A volume that exists; its files outlive the sandbox.
func ExampleMountBuilder_Named() {
	mount, err := microsandbox.NewMountBuilder("/root/.cache/pip").Named("pip-cache").Build()
	fmt.Println(mount.Guest(), mount.Config().Named, err)
	// Output: /root/.cache/pip pip-cache <nil>
}

// Two volumes that are made if they are missing: a directory and a disk of
// 20 GiB.
func ExampleMountBuilder_NamedWith() {
	ctx := context.Background()
	sb, err := microsandbox.CreateSandbox(ctx, "worker",
		microsandbox.WithImage("debian:12"),
		microsandbox.WithVolume("/cache", func(v *microsandbox.MountBuilder) *microsandbox.MountBuilder {
			return v.NamedWith("cache", func(n *microsandbox.NamedVolumeBuilder) *microsandbox.NamedVolumeBuilder {
				return n.EnsureExists()
			})
		}),
		microsandbox.WithVolume("/var/lib/docker", func(v *microsandbox.MountBuilder) *microsandbox.MountBuilder {
			return v.NamedWith("docker-data", func(n *microsandbox.NamedVolumeBuilder) *microsandbox.NamedVolumeBuilder {
				return n.EnsureExists().Disk().Size(20 << 10)
			})
		}))
	if err != nil {
		log.Fatal(err)
	}
	defer sb.Close()
}

// Memory of the guest, at most 100 MiB.
func ExampleMountBuilder_Tmpfs() {
	mount, err := microsandbox.NewMountBuilder("/scratch").Tmpfs().Size(100).Build()
	fmt.Println(mount.Guest(), mount.Config().SizeMiB, err)
	// Output: /scratch 100 <nil>
}

// The file system in a disk image, read-only.
func ExampleMountBuilder_Disk() {
	mount, err := microsandbox.NewMountBuilder("/data").Disk("./data.img").Fstype("ext4").Readonly().Build()
	fmt.Println(mount.Config().Disk, mount.Config().Fstype, err)
	// Output: ./data.img ext4 <nil>
}

// The image's format comes from its name unless it is given.
func ExampleMountBuilder_Format() {
	mount, err := microsandbox.NewMountBuilder("/data").Disk("./data.img").Format(microsandbox.DiskImageFormatQcow2).Build()
	fmt.Println(mount.Config().Format, err)
	// Output: qcow2 <nil>
}

// Everything a guest could use to hurt itself, taken away.
func ExampleMountBuilder_Readonly() {
	mount, err := microsandbox.NewMountBuilder("/input").Bind("./input").Readonly().Noexec().Nosuid().Nodev().Build()
	fmt.Println(mount.Config().Readonly, err)
	// Output: true <nil>
}

// The guest sees and changes the host's own owners and modes.
func ExampleMountBuilder_StatVirtualization() {
	mount, err := microsandbox.NewMountBuilder("/src").Bind("./src").
		StatVirtualization(microsandbox.StatVirtualizationOff).Build()
	fmt.Println(mount.Config().StatVirtualization, err)
	// Output: off <nil>
}

// A guest's chmod reaches the host's files.
func ExampleMountBuilder_HostPermissions() {
	mount, err := microsandbox.NewMountBuilder("/src").Bind("./src").
		HostPermissions(microsandbox.HostPermissionsMirror).Build()
	fmt.Println(mount.Config().HostPermissions, err)
	// Output: mirror <nil>
}

// Two sandboxes that change a file under a lock must not cache it.
func ExampleMountBuilder_Cache() {
	mount, err := microsandbox.NewMountBuilder("/queue").Named("queue").
		Cache(microsandbox.CacheModeNone).Build()
	fmt.Println(mount.Config().Cache, err)
	// Output: none <nil>
}

// A mistake is reported when the mount is built, or the sandbox created; the
// setters never fail.
func ExampleMountBuilder_Build() {
	_, err := microsandbox.NewMountBuilder("/data").Bind("./data").Size(64).Build()
	fmt.Println(err)
	fmt.Println(microsandbox.IsKind(err, microsandbox.ErrInvalidConfig))
	// Output:
	// bind mount at "/data": option size is not valid on a bind mount
	// true
}

// A mount built by hand, checked before it is used.
func ExampleWithVolumeMounts() {
	scratch, err := microsandbox.NewMountBuilder("/scratch").Tmpfs().Build()
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	sb, err := microsandbox.CreateSandbox(ctx, "worker",
		microsandbox.WithImage("debian:12"), microsandbox.WithVolumeMounts(scratch))
	if err != nil {
		log.Fatal(err)
	}
	defer sb.Close()
}

// All kinds in one map.
func ExampleWithMounts() {
	opt := microsandbox.WithMounts(map[string]microsandbox.MountConfig{
		"/src":   microsandbox.Mount.Bind("./src", microsandbox.MountOptions{Readonly: true}),
		"/cache": microsandbox.Mount.Named("pip-cache", microsandbox.MountOptions{}),
		"/tmp":   microsandbox.Mount.Tmpfs(microsandbox.TmpfsOptions{SizeMiB: 512}),
		"/data":  microsandbox.Mount.Disk("./data.img", microsandbox.DiskOptions{Fstype: "ext4"}),
		"/db": microsandbox.Mount.NamedWith("db", microsandbox.MountOptions{Nosuid: true}, microsandbox.NamedVolumeOptions{
			Mode: microsandbox.NamedVolumeModeEnsureExists, Kind: "disk", SizeMiB: 1024,
		}),
	})
	c := &microsandbox.SandboxConfig{}
	opt(c)
	fmt.Println(len(c.Volumes), c.Volumes["/db"].Kind())
	// Output: 5 named
}
