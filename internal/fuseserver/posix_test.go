package fuseserver

import (
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// notOnPlainDirs are the checks that fail on a plain directory too.
var notOnPlainDirs = map[string]bool{"FcntlFlockLocksFile": true, "OpenSymlinkRace": true}

func TestPosixThroughKernel(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		for name, check := range posixtest.All {
			t.Run(name, func(t *testing.T) {
				if notOnPlainDirs[name] {
					t.Skip("missing: a plain directory here on which it holds")
				}
				mnt, _ := mountShare(t, Config{StatVirt: virt, AsRoot: true})
				check(t, mnt)
			})
		}
	})
}
