package microsandbox_test

import (
	"testing"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// TestHomeWithASandboxIsDescribed: every file of a home with a running sandbox is
// in docs/on-disk.md, and its rows of images, kernels and sandboxes are true.
func TestHomeWithASandboxIsDescribed(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	mount := msb.Mount.Named("data", msb.MountOptions{})
	ok(t, func() error { _, err := msb.CreateVolume(ctx, "data", msb.WithVolumeInodes(5000)); return err }())
	boot(ctx, t, "box", msb.WithMounts(map[string]msb.MountConfig{"/data": mount}))
	for row, n := range storetest.Described(t, string(h)) {
		switch row {
		case "volumes/.staging/ID/", "volumes/.staging/ID.grow", "volumes/.trash/ID/", "volumes/.state/ID/clean", "binds/DEV-INO.ledger", "binds/DEV-INO.json":
			continue // see TestHomeIsDescribed of internal/volstore
		case "config.json":
			continue // the user's
		case "kernels/.kvm-probe.json", "kernels/.tsc-khz.json":
			continue // where there is KVM
		}
		if n == 0 {
			t.Errorf("docs/on-disk.md describes %s, which is not there", row)
		}
	}
	discard(t, "box")
}
