package main

import (
	"github.com/microsandbox-go/microsandbox/cmd/msb/agentbin"
	"github.com/microsandbox-go/microsandbox/internal/confine"
	"github.com/microsandbox-go/microsandbox/internal/fetch"
	"github.com/microsandbox-go/microsandbox/internal/fileserver"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// processes are the programs that msb starts itself as: each is reached by its
// name as the first argument, before any command is parsed, and returns the
// exit code of the process.
var processes = map[string]func(args []string) int{
	"confine-exec": confine.Main,
	countProcess:   countMain,
	fetch.Process:  fetchMain,
	"fileserver":   fileserver.Main,
	reapProcess:    reapMain,
	"supervise":    func([]string) int { return supervisor.Main(agentbin.Bytes()) },

	qemu.ProbeProcess: qemu.ProbeMain,
}
