package fileserver

import (
	"context"
	"errors"
	"os"
	"os/exec"
)

// Share is one host directory served under a tag.
type Share struct {
	Tag  string `json:"tag"`
	Path string `json:"path"` // host directory, absolute, links resolved
	// Dev and Ino are the identity the caller saw; 0 and 0: not checked.
	Dev       uint64 `json:"dev,omitempty"`
	Ino       uint64 `json:"ino,omitempty"`
	Readonly  bool   `json:"readonly,omitempty"`
	StatVirt  string `json:"stat_virt,omitempty"`  // "strict" (also ""), "relaxed", "off"
	HostPerms string `json:"host_perms,omitempty"` // "private" (also ""), "mirror"
	Cache     string `json:"cache,omitempty"`      // "auto" (also ""), "none", "always"
	GuestUID  uint32 `json:"guest_uid,omitempty"`
	GuestGID  uint32 `json:"guest_gid,omitempty"`
	Queues    int    `json:"queues,omitempty"` // request queues; 0 means 1
}

// Options describe one file server process.
type Options struct {
	MSB     string     // path of msb
	Shares  []Share    // at least one
	Conns   []*os.File // same order: one end of a socket pair each, or a listening socket
	Inherit []*os.File // attach locks, kept open while the process lives
	Log     *os.File   // stderr of the process; nil: /dev/null
	ID      string     // of the sandbox, for messages

	// Spawn starts the command; nil means cmd.Start. The parent-death signal
	// follows the thread that calls fork: it must not end before the process.
	Spawn func(*exec.Cmd) error
}

// Process is a running file server.
type Process struct{}

// Start starts a file server and returns when it serves.
func Start(ctx context.Context, o Options) (*Process, error) { return nil, errors.ErrUnsupported }

// PID is the process id.
func (p *Process) PID() int { return 0 }

// Done is closed when the process has ended and is reaped.
func (p *Process) Done() <-chan struct{} { return nil }

// Err says how the process ended, nil for a clean end. Valid after Done.
func (p *Process) Err() error { return nil }

// Kill ends the process at once. It is idempotent.
func (p *Process) Kill() {}

// Main is the entry of the hidden command msb fileserver.
func Main(args []string) int { return 1 }
