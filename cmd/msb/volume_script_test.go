package main

import (
	"context"
	"os"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// heldKey is where a script's attachments are kept.
type heldKey struct{}

// attachVolume NAME SANDBOX [ro|rw] holds a volume's attach lock as the
// supervisor of a sandbox does, until detach or the end of the script.
func attachVolume(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: attach NAME SANDBOX [ro|rw]")
	}
	holder := volstore.Holder{Sandbox: args[1], PID: os.Getpid(), Readonly: len(args) == 3 && args[2] == "ro"}
	s := volstore.New(home.Dir(ts.Getenv("MSB_HOME")))
	a, err := s.Attach(context.Background(), args[0], volstore.Shared, holder)
	ts.Check(err)
	ts.Check(s.Close())
	held := ts.Value(heldKey{}).(*[]*volstore.Attachment)
	*held = append(*held, a)
	ts.Defer(func() { _ = a.Close() })
}

// detachVolumes gives up all attachments of the script.
func detachVolumes(ts *testscript.TestScript, neg bool, args []string) {
	held := ts.Value(heldKey{}).(*[]*volstore.Attachment)
	for _, a := range *held {
		ts.Check(a.Close())
	}
	*held = nil
}
