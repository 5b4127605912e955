package guest

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fxamacker/cbor/v2"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// A program with resource limits is started through the agent's own binary: it
// sets the limits on itself and becomes the program. Go's fork cannot set them,
// and setting them afterwards would be too late for a short program.

const shimArg = "msb-exec-shim"

// shimOrder is passed to the shim on descriptor 3; its answer, an errno, comes
// on descriptor 4, which closes when the program is executed.
type shimOrder struct {
	File    string              `cbor:"file"`
	Argv    []string            `cbor:"argv"`
	Env     []string            `cbor:"env"`
	Dir     string              `cbor:"dir"`
	UID     uint32              `cbor:"uid"`
	GID     uint32              `cbor:"gid"`
	Groups  []uint32            `cbor:"groups"`
	Rlimits []agentproto.Rlimit `cbor:"rlimits"`
}

// rlimitByName maps the names of setrlimit(2), in lower case and without RLIMIT_.
var rlimitByName = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA,
	"fsize": unix.RLIMIT_FSIZE, "locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK,
	"msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE, "nofile": unix.RLIMIT_NOFILE,
	"nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
	"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// checkRlimits finds mistakes before anything is started.
func checkRlimits(list []agentproto.Rlimit) error {
	for _, l := range list {
		if _, ok := rlimitByName[strings.ToLower(l.Resource)]; !ok {
			return &execError{kindRlimit, fmt.Sprintf("unknown resource limit %q", l.Resource), unix.EINVAL}
		}
		if l.Soft > l.Hard {
			return &execError{kindRlimit, fmt.Sprintf("resource limit %s: soft %d is above hard %d", l.Resource, l.Soft, l.Hard), unix.EINVAL}
		}
	}
	return nil
}

// Stages of the shim, reported with the errno of the one that failed.
const (
	stageRlimit = 1
	stageUser   = 2
	stageDir    = 3
	stageExec   = 4
)

// shimMain never returns: it becomes the program or exits.
func shimMain([]string) {
	runtime.LockOSThread()
	fail := func(stage int, err error) {
		errno, _ := err.(syscall.Errno)
		var b [8]byte
		binary.LittleEndian.PutUint32(b[:], uint32(stage))
		binary.LittleEndian.PutUint32(b[4:], uint32(errno))
		_, _ = unix.Write(4, b[:])
		os.Exit(127)
	}
	unix.CloseOnExec(4)
	var o shimOrder
	in := os.NewFile(3, "order")
	if err := cbor.NewDecoder(in).Decode(&o); err != nil {
		fail(stageExec, syscall.EINVAL)
	}
	in.Close()
	for _, l := range o.Rlimits {
		r := unix.Rlimit{Cur: l.Soft, Max: l.Hard}
		if err := unix.Prlimit(0, rlimitByName[strings.ToLower(l.Resource)], &r, nil); err != nil {
			fail(stageRlimit, err)
		}
	}
	groups := make([]int, len(o.Groups))
	for i, g := range o.Groups {
		groups[i] = int(g)
	}
	if err := syscall.Setgroups(groups); err != nil {
		fail(stageUser, err)
	}
	if err := syscall.Setresgid(int(o.GID), int(o.GID), int(o.GID)); err != nil {
		fail(stageUser, err)
	}
	if err := syscall.Setresuid(int(o.UID), int(o.UID), int(o.UID)); err != nil {
		fail(stageUser, err)
	}
	if err := syscall.Chdir(o.Dir); err != nil {
		fail(stageDir, err)
	}
	fail(stageExec, syscall.Exec(o.File, o.Argv, o.Env))
}
