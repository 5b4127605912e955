package guesttest

import (
	"sort"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// notOnPlainDirs are the checks that fail on a plain directory too.
var notOnPlainDirs = map[string]bool{"FcntlFlockLocksFile": true, "OpenSymlinkRace": true}

// TestPosix runs each check of go-fuse's suite in a directory of its own.
func TestPosix(t *testing.T) {
	var names []string
	for name := range posixtest.All {
		if !notOnPlainDirs[name] {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		t.Run(name, func(t *testing.T) { posixtest.All[name](t, workDir(t)) })
	}
}
