package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/fetch/fetcher"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// TestMain is msb, too: by the name msb in scripts, and by the name of one of its
// processes when msb starts itself, which then finds this binary. It contains
// msb-fetch as a package, not as a program.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fetch.Process {
		os.Exit(fetcher.Main(os.Args[2:]))
	}
	if len(os.Args) > 1 {
		if _, ok := processes[os.Args[1]]; ok {
			os.Exit(run(os.Args))
		}
	}
	testscript.Main(m, map[string]func(){"msb": main})
}

// TestScripts runs testdata/script/*.txtar, with this binary as msb and a home
// of its own inside each script's directory.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("MSB_HOME", e.WorkDir+"/home")
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("TZ", "UTC")
			e.Values[heldKey{}] = &[]*volstore.Attachment{}
			return nil
		},
		Cmds:          map[string]func(ts *testscript.TestScript, neg bool, args []string){"golden": golden, "ocilayout": ociLayout, "registry": loopbackRegistry, "push": pushLayout, "attach": attachVolume, "detach": detachVolumes},
		Condition:     condition,
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
	})
}

// volatile is what differs from run to run in output: times, ids and the blocks
// of a disk image; and what depends on who runs the tests on which file system.
var volatile = []struct {
	re  *regexp.Regexp
	put string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z`), "TIME"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`), "TIME"},
	{regexp.MustCompile(`process \d+`), "process PID"},
	{regexp.MustCompile(`"pid": \d+`), `"pid": PID`},
	{regexp.MustCompile(fmt.Sprintf(`"uid": %d,`, os.Getuid())), `"uid": UID,`},
	{regexp.MustCompile(fmt.Sprintf(`"gid": %d,`, os.Getgid())), `"gid": GID,`},
	{regexp.MustCompile(`("kind": "directory",\n *"size": )\d+`), `${1}SIZE`},
	{regexp.MustCompile(`"used_bytes": \d{5,}`), `"used_bytes": USED`},
	{regexp.MustCompile(`\b[0-7][0-9A-HJKMNP-TV-Z]{25}\b`), "ID"},
}

// golden FILE compares standard output with a file after volatile parts and the
// script's directory are replaced.
func golden(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: golden FILE")
	}
	got := strings.ReplaceAll(ts.ReadFile("stdout"), ts.Getenv("WORK"), "$WORK")
	for _, v := range volatile {
		got = v.re.ReplaceAllString(got, v.put)
	}
	if want := ts.ReadFile(args[0]); got != want {
		ts.Fatalf("output is\n%s\nwant\n%s", got, want)
	}
}

// condition adds [mkfs]: disk volumes can be made, and [root].
func condition(cond string) (bool, error) {
	switch cond {
	case "mkfs":
		for _, p := range []string{"/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4"} {
			if _, err := os.Stat(p); err == nil {
				return true, nil
			}
		}
		return os.Getenv("CI") == "true", nil // in CI the script fails rather than skips
	case "root":
		return os.Getuid() == 0, nil
	}
	return false, nil
}
