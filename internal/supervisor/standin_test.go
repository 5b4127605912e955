package supervisor

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// TestMain makes the test binary msb, as far as a supervisor needs one, and a
// stand-in for QEMU under names that begin with "qemu-".
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "confine-exec" {
		os.Exit(confine.Main(os.Args[2:]))
	}
	if kind, ok := strings.CutPrefix(filepath.Base(os.Args[0]), "qemu-"); ok {
		os.Exit(standIn(kind, os.Args[1:]))
	}
	os.Exit(m.Run())
}

// standIn plays a QEMU whose KVM is broken in the named way. Under TCG it plays
// QEMU, kernel and agent of a guest that boots and stops.
func standIn(kind string, args []string) int {
	line := strings.Join(args, " ")
	fmt.Fprintln(os.Stderr, "stand-in:", line)
	mon := newStandInQMP(line)
	if strings.Contains(line, "-accel kvm") || kind == "always-aborts" {
		switch kind {
		case "aborts", "always-aborts":
			fmt.Fprintln(os.Stderr, "qemu: kvm run failed Bad address")
			return 128 + int(syscall.SIGABRT) // abort itself would print Go's registers
		case "hangs":
			mon.greet()
		case "reports":
			mon.greet()
			mon.say(`{"event":"STOP"}`)
			mon.answer(`{"status":"internal-error","running":false}`)
		}
		for {
			time.Sleep(time.Hour)
		}
	}
	mon.greet()
	return standInGuest(mon, line)
}

// fdOf finds the descriptor of a chardev on the command line.
func fdOf(line, id string) *os.File {
	m := regexp.MustCompile(`socket,id=` + id + `,fd=(\d+)`).FindStringSubmatch(line)
	fd, _ := strconv.Atoi(m[1])
	return os.NewFile(uintptr(fd), id)
}

type standInQMP struct {
	f  *os.File
	in *bufio.Scanner
}

func newStandInQMP(line string) *standInQMP {
	f := fdOf(line, "mon")
	return &standInQMP{f, bufio.NewScanner(f)}
}

func (q *standInQMP) say(s string) { fmt.Fprintln(q.f, s) }

// answer waits for a command and answers it.
func (q *standInQMP) answer(value string) {
	q.in.Scan()
	q.say(`{"return":` + value + `}`)
}

func (q *standInQMP) greet() {
	q.say(`{"QMP":{"version":{}}}`)
	q.answer("{}")
}

// standInGuest boots at once, and powers off when it is asked to.
func standInGuest(mon *standInQMP, line string) int {
	link := fdOf(line, "agent")
	out := agentproto.NewWriter(link, agentproto.MaxLinkFrame)
	in := agentproto.NewReader(link, agentproto.MaxFrame)
	send := func(t string, v any) { _ = out.WriteFrame(agentproto.Frame{Body: agentproto.MustEncode(t, v)}) }
	send(agentproto.MsgHello, agentproto.Hello{Version: version.Version})
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return 1
		}
		switch t, _, _, _ := agentproto.Decode(f.Body); t {
		case agentproto.MsgBoot:
			send(agentproto.MsgReady, agentproto.Ready{AgentVersion: version.Version})
		case agentproto.MsgShutdown:
			send(agentproto.MsgGoodbye, struct{}{})
			mon.say(`{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}`)
			return 0
		}
	}
}
