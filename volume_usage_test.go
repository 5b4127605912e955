package microsandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestQuota: VB-4, B-10 for host writes. The limit holds over every open file
// access of the volume, is told in numbers, and what is deleted can be used again.
func TestQuota(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v", WithVolumeQuota(1), WithVolumeInodes(3))
	check(t, err)
	fs := v.FS()
	check(t, fs.Write(ctx, "f", make([]byte, 1<<20)))
	err = fs.Write(ctx, "g", []byte("x"))
	var full *QuotaError
	var where *VolumeError
	if !IsKind(err, ErrFilesystem) || !errors.As(err, &full) || !errors.Is(err, syscall.ENOSPC) || !errors.As(err, &where) {
		t.Fatalf("error %v", err)
	}
	if want := (QuotaError{Limit: 1 << 20, Used: 1 << 20, Want: full.Want}); *full != want || full.Want < 4096 || where.Path != "g" {
		t.Errorf("%+v, %+v", full, where)
	}
	check(t, fs.Remove(ctx, "f"))
	for _, name := range []string{"a", "b", "c"} {
		check(t, fs.Write(ctx, name, nil))
	}
	err = fs.Write(ctx, "d", nil)
	if !errors.As(err, &full) || !full.Inodes || full.Limit != 3 {
		t.Errorf("a fourth file: %v", err)
	}
}

// TestSetQuota: limits of an existing volume, while it is open.
func TestSetQuota(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	check(t, v.FS().Write(ctx, "f", make([]byte, 2<<20)))
	h, err := GetVolume(ctx, "v")
	check(t, err)
	one, two, seven, zero := uint32(1), uint32(3), uint64(7), uint32(0)
	if h, err = h.SetQuota(ctx, VolumeLimits{QuotaMiB: &one}); err != nil || *h.QuotaMiB() != 1 {
		t.Fatalf("%+v, %v", h, err)
	}
	if err := v.FS().Write(ctx, "g", []byte("x")); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("below the present use: %v", err)
	}
	check(t, v.FS().Rename(ctx, "f", "h")) // refuses growth only
	h, err = h.SetQuota(ctx, VolumeLimits{QuotaMiB: &two, Inodes: &seven})
	check(t, err)
	check(t, v.FS().Write(ctx, "g", []byte("x")))
	u, err := h.Usage(ctx)
	check(t, err)
	if *u.LimitBytes != 3<<20 || *u.LimitInodes != 7 || u.UsedBytes != 2<<20+4096 || u.UsedInodes != 2 || !u.Exact || u.FoundBytes != nil {
		t.Errorf("usage %+v", u)
	}
	h, err = h.SetQuota(ctx, VolumeLimits{QuotaMiB: &zero, Inodes: new(uint64)})
	check(t, err)
	if u, err = h.Usage(ctx); err != nil || u.LimitBytes != nil || u.LimitInodes != nil || h.QuotaMiB() != nil {
		t.Errorf("limits taken away: %+v, %v", u, err)
	}
}

// TestRescanUsage: what a program writes to the directory itself is found by
// Verify and counted by Rescan.
func TestRescanUsage(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v")
	check(t, err)
	check(t, v.FS().Write(ctx, "f", []byte("x")))
	check(t, os.WriteFile(filepath.Join(v.Path(), "behind"), make([]byte, 10_000), 0o600))
	h, err := GetVolume(ctx, "v")
	check(t, err)
	u, err := h.VerifyUsage(ctx)
	check(t, err)
	if u.Matches() || u.UsedBytes != 4096 || *u.FoundBytes != 4096+12288 || *u.FoundInodes != 2 || *u.AllocatedBytes < 16384 {
		t.Errorf("verify: %+v", u)
	}
	u, err = h.RescanUsage(ctx)
	check(t, err)
	if !u.Matches() || u.UsedBytes != 4096+12288 || u.UsedInodes != 2 {
		t.Errorf("rescan: %+v", u)
	}
	if n, ok := h.KnownUsedBytes(); !ok || n != 4096+12288 || h.UsedBytes() != n {
		t.Errorf("known %d, %v", n, ok)
	}
}

// TestUncountedUsage: without a count that can be read, and only then, whoever
// asks is told what a walk finds, and that it is not counted; after RescanUsage it
// is.
func TestUncountedUsage(t *testing.T) {
	useHome(t)
	ctx := t.Context()
	v, err := CreateVolume(ctx, "v", WithVolumeQuota(1))
	check(t, err)
	check(t, v.FS().Write(ctx, "f", []byte("x")))
	h, err := GetVolume(ctx, "v")
	check(t, err)
	b, err := defaultBackend()
	check(t, err)
	b.(*LocalBackend).open.closeIdle() // who has a damaged ledger open keeps it from being made anew
	state := filepath.Join(filepath.Dir(v.Path()), ".state", h.Local().ID, "ledger")
	tests := map[string]struct {
		damage  func() error
		damaged bool
	}{
		"missing": {func() error { return os.Remove(state) }, false},
		"damaged": {func() error { return os.WriteFile(state, make([]byte, 4096), 0o600) }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			check(t, tt.damage())
			if n, ok := h.KnownUsedBytes(); ok {
				t.Errorf("known: %d", n)
			}
			if fresh, err := GetVolume(ctx, "v"); err != nil || fresh.UsedBytes() != 4096 {
				t.Errorf("used %d, %v", fresh.UsedBytes(), err)
			}
			for what, usage := range map[string]func(context.Context) (*VolumeUsage, error){"usage": h.Usage, "allocated": h.AllocatedUsage, "verify": h.VerifyUsage} {
				u, err := usage(ctx)
				check(t, err)
				if !u.Uncounted || u.Damaged != tt.damaged || u.Exact || u.UsedBytes != 4096 || u.UsedInodes != 1 || *u.LimitBytes != 1<<20 || *u.LimitInodes != 1024 {
					t.Errorf("%s: %+v", what, u)
				}
				if u.Matches() != (what != "verify") {
					t.Errorf("%s: matches: %v", what, u.Matches())
				}
			}
			u, err := h.RescanUsage(ctx)
			check(t, err)
			if u.Uncounted || u.Damaged || !u.Exact || !u.Matches() || u.UsedBytes != 4096 {
				t.Errorf("rescan: %+v", u)
			}
		})
	}
}

// TestUsageMatches: bytes and inodes must be what was counted, or no more than the
// bound that is known.
func TestUsageMatches(t *testing.T) {
	number := func(n uint64) *uint64 { return &n }
	exact := VolumeUsage{UsedBytes: 8192, UsedInodes: 2, FoundBytes: number(4096), FoundInodes: number(1), OrphanBytes: 4096, OrphanInodes: 1, Exact: true, Quiet: true}
	tests := map[string]struct {
		change func(*VolumeUsage)
		want   bool
	}{
		"as counted":           {func(*VolumeUsage) {}, true},
		"more bytes":           {func(u *VolumeUsage) { u.FoundBytes = number(8192) }, false},
		"fewer bytes":          {func(u *VolumeUsage) { u.FoundBytes = number(0) }, false},
		"more files":           {func(u *VolumeUsage) { u.FoundInodes = number(2) }, false},
		"fewer files":          {func(u *VolumeUsage) { u.FoundInodes = number(0) }, false},
		"changed meanwhile":    {func(u *VolumeUsage) { u.FoundInodes, u.Quiet = number(7), false }, true},
		"below the bound":      {func(u *VolumeUsage) { u.FoundBytes, u.Exact = number(0), false }, true},
		"bytes over the bound": {func(u *VolumeUsage) { u.FoundBytes, u.Exact = number(8192), false }, false},
		"files over the bound": {func(u *VolumeUsage) { u.FoundInodes, u.Exact = number(3), false }, false},
		"not counted":          {func(u *VolumeUsage) { u.Uncounted = true }, false},
		"not walked":           {func(u *VolumeUsage) { u.FoundBytes, u.FoundInodes = nil, nil }, true},
	}
	for name, tt := range tests {
		u := exact
		tt.change(&u)
		if got := u.Matches(); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}
