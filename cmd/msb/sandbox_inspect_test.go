package main

import (
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// TestMountLine: a mount is shown with every option that was set.
func TestMountLine(t *testing.T) {
	for _, tt := range []struct {
		mount mount.Spec
		want  string
	}{
		{mount.Spec{Guest: "/m", Kind: mount.KindBind, Source: "/src"}, "/m from /src (rw)"},
		{mount.Spec{Guest: "/m", Kind: mount.KindBind, Source: "/src", Readonly: true, Cache: mount.CacheNone}, "/m from /src (ro,cache=none)"},
		{mount.Spec{Guest: "/m", Kind: mount.KindNamed, Source: "vol", StatVirt: mount.StatOff, HostPerms: mount.PermsPrivate, Cache: mount.CacheAlways},
			"/m from volume vol (rw,stat-virt=off,host-perms=private,cache=always)"},
		{mount.Spec{Guest: "/m", Kind: mount.KindTmpfs, Noexec: true, Nosuid: true, Nodev: true}, "/m from tmpfs (rw,noexec,nosuid,nodev)"},
		{mount.Spec{Guest: "/m", Kind: mount.KindDisk, Source: "/a.img", Fstype: "ext4"}, "/m from disk /a.img (rw,fstype=ext4)"},
	} {
		if got := mountLine(tt.mount); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}
