// Package vmm says what a virtual machine monitor must do for the supervisor:
// start one guest, report its state, and tell a clean stop from a crash. The
// QEMU implementation is in vmm/qemu.
package vmm

import (
	"context"
	"fmt"
	"os"
	"time"
)

// Accel names how guest code runs.
type Accel string

// Accelerators. Auto asks the probe of vmm/qemu.
const (
	AccelAuto Accel = "auto"
	AccelKVM  Accel = "kvm"
	AccelTCG  Accel = "tcg"
)

// Kernel is a guest kernel found by internal/kernel.
type Kernel struct {
	Hash    string   // names the directory under kernels/
	Image   string   // path of a vmlinux (PVH) or bzImage
	Initrd  string   // path of the initramfs with the agent as /init
	Release string   // uname -r, for doctor and logs
	Own     bool     // built by make kernel: no modules, boots faster
	Cmdline []string // words this kernel needs beyond those of the machine
}

// Disk is one virtio-blk device. The VMM uses the open descriptor and never
// opens a path; locks on File are inherited by the VMM process on purpose.
type Disk struct {
	Serial   string // at most 20 bytes; the guest finds the disk by it
	File     *os.File
	Readonly bool
	Format   string // "raw"
}

// Share is one vhost-user-fs device; Conn is our end of a connected socket pair
// whose other end a file server serves.
type Share struct {
	Tag  string // at most 36 bytes
	Conn *os.File
}

// Config describes one guest. All files are borrowed: the caller closes them
// after Start has returned.
type Config struct {
	ID        string
	CPUs      int
	MemoryMiB int
	Accel     Accel
	Kernel    Kernel
	Disks     []Disk
	Shares    []Share

	// Agent is one end of a connected stream socket pair; the guest sees it as
	// the virtio-serial port "msb.agent".
	Agent *os.File
	// Console receives the serial console, Stderr what the VMM prints.
	Console, Stderr *os.File
	// Inherit are descriptors the VMM process keeps open for their locks alone.
	Inherit []*os.File

	// BootTimeout bounds the time to Running, as reported by AgentReady.
	BootTimeout time.Duration
	// Changed, if set, is called after each state change, without locks held.
	Changed func(from, to State)
}

// State is where a guest is in its life. Only the machine changes it.
//
//	Created -> Booting -> Running -> Stopping -> Stopped; any of the middle -> Failed
type State uint8

// States of a machine.
const (
	Created State = iota
	Booting
	Running
	Stopping
	Stopped
	Failed
)

func (s State) String() string {
	switch s {
	case Created:
		return "created"
	case Booting:
		return "booting"
	case Running:
		return "running"
	case Stopping:
		return "stopping"
	case Stopped:
		return "stopped"
	case Failed:
		return "failed"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Exit says how the VMM process ended. Exit status 0 proves nothing: a guest
// panic exits 0 too. A clean stop needs Reason "guest-shutdown" and the agent's
// goodbye, which the supervisor knows of.
type Exit struct {
	Reason string // QMP SHUTDOWN reason: guest-shutdown, guest-reset, guest-panic, host-signal ...; "" if none was seen
	Status string // process status, "exit status 0", "signal: killed"
	Detail string // one line that explains a failure: the VMM's stderr or "internal-error"
}

// Machine is one guest. Methods may be called from several goroutines.
type Machine interface {
	// Start starts the VMM process and returns when it answers (not when the
	// guest has booted). After an error nothing is left running.
	Start(ctx context.Context) error
	// AgentReady tells the machine that the guest's agent has answered.
	AgentReady()
	// State returns the present state.
	State() State
	// Accel returns the accelerator in use, after Start.
	Accel() Accel
	// PID is the VMM's process id, 0 before Start.
	PID() int
	// Stopping tells the machine that a stop was asked of the guest.
	Stopping()
	// Kill ends the VMM process at once. It is idempotent.
	Kill()
	// Done is closed when the VMM process is gone and reaped.
	Done() <-chan struct{}
	// Exit says how it ended; valid after Done is closed.
	Exit() Exit
}
