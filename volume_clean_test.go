package microsandbox_test

import (
	"os"
	"path/filepath"
	"testing"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// TestDiskVolumeIsCheckedAfterAKill: a sandbox that ends by itself leaves the
// clean mark of its disk volume, a killed one does not, and the next one has the
// image checked, with what the killed guest had synced.
func TestDiskVolumeIsCheckedAfterAKill(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	v := must(msb.CreateVolume(ctx, "data", msb.WithVolumeKind(msb.VolumeKindDisk), msb.WithVolumeSize(64)))(t)
	mount := named("/data", v.Name(), func(n *msb.NamedVolumeBuilder) *msb.NamedVolumeBuilder { return n.Existing() })
	id := must(msb.GetVolume(ctx, "data"))(t).Local().ID
	clean := func(want bool, when string) {
		t.Helper()
		if _, err := os.Stat(filepath.Join(h.State(id), "clean")); (err == nil) != want {
			t.Errorf("%s: clean mark: %v", when, err)
		}
	}
	clean(true, "new")
	sb := boot(ctx, t, "first", mount)
	clean(false, "in use")
	sh(t, sb, "echo one > /data/one")
	ok(t, sb.Stop(ctx))
	clean(true, "stopped")

	sb = boot(ctx, t, "second", mount)
	sh(t, sb, "echo two > /data/two; sync; echo lost > /data/three")
	ok(t, sb.Kill(ctx))
	clean(false, "killed")

	sb = boot(ctx, t, "third", mount)
	if got := sh(t, sb, "cat /data/one /data/two"); got != "one\ntwo" {
		t.Errorf("the volume holds %q", got)
	}
	ok(t, sb.Stop(ctx))
	clean(true, "checked, used and stopped")
}
