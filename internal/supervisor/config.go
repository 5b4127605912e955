package supervisor

import (
	"encoding/json"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/mount"
)

// Config is the complete definition of a sandbox. It is what the record keeps
// and what the supervisor is started with; relative paths and names have been
// resolved by then.
type Config struct {
	ID   string `json:"id"` // ULID
	Name string `json:"name"`

	Image  string `json:"image"`  // reference as given
	Digest string `json:"digest"` // manifest digest
	RootFS string `json:"rootfs"` // read-only ext4 image of the host; "" boots the bare agent

	CPUs      int    `json:"cpus"`
	MemoryMiB int    `json:"memory_mib"`
	Accel     string `json:"accelerator"` // auto, kvm, tcg
	UpperMiB  int64  `json:"upper_mib"`   // size of upper.ext4; 0 keeps the writable layer in memory

	Hostname   string            `json:"hostname"`
	User       string            `json:"user"`
	GuestUID   uint32            `json:"guest_uid"` // of User: owner of host files in virtiofs mounts
	GuestGID   uint32            `json:"guest_gid"`
	Workdir    string            `json:"workdir"`
	Shell      string            `json:"shell"`
	Env        []string          `json:"env"` // K=V, sorted
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Mounts     []mount.Spec      `json:"mounts,omitempty"`

	Ephemeral   bool          `json:"ephemeral,omitempty"`
	BootTimeout time.Duration `json:"boot_timeout_ns,omitempty"`
}

// request is what the creator writes to the supervisor's request descriptor.
type request struct {
	Version  string `json:"version"`
	Home     string `json:"home"`
	Config   Config `json:"config"`
	Attached bool   `json:"attached"`
}

// status is one line of the supervisor's status descriptor. The first line
// carries Version, the last one of a boot Ready or Failure; Ended comes when a
// sandbox that was ready has ended.
type status struct {
	Version string   `json:"version,omitempty"`
	Step    string   `json:"step,omitempty"`
	Ready   bool     `json:"ready,omitempty"`
	Failure *failure `json:"failure,omitempty"`
	Ended   *string  `json:"ended,omitempty"` // why it crashed, "" for a clean stop
}

// failure carries a typed error between processes.
type failure struct {
	Kind int    `json:"kind"`
	Msg  string `json:"msg"`
	Hint string `json:"hint,omitempty"`
	Op   string `json:"op,omitempty"`
	Vol  string `json:"volume,omitempty"`
	Busy bool   `json:"busy,omitempty"` // the cause is ErrVolumeInUse
}

func newFailure(err error) *failure {
	f := &failure{Kind: int(errdefs.KindOf(err)), Msg: err.Error()}
	var e *errdefs.Error
	if asError(err, &e) {
		f.Hint, f.Op, f.Vol = e.Hint, e.Op, e.Volume
	} else {
		f.Kind = int(errdefs.Internal)
	}
	f.Busy = isBusy(err)
	return f
}

func (f *failure) err() error {
	e := &errdefs.Error{Kind: errdefs.Kind(f.Kind), Msg: f.Msg, Hint: f.Hint, Op: f.Op, Volume: f.Vol}
	if f.Busy {
		e.Cause = errdefs.ErrVolumeInUse
	}
	return e
}

// controlRequest is one line on a sandbox's control.sock; the answer is one
// controlReply line.
type controlRequest struct {
	Op    string        `json:"op"` // stop, kill, status
	Grace time.Duration `json:"grace_ns,omitempty"`
}

type controlReply struct {
	OK      bool            `json:"ok"`
	Failure *failure        `json:"failure,omitempty"`
	Status  json.RawMessage `json:"status,omitempty"`
}

// Live describes a running sandbox, as its supervisor answers it.
type Live struct {
	SupervisorPID int    `json:"supervisor_pid"`
	VMMPID        int    `json:"vmm_pid"`
	FileServerPID int    `json:"fileserver_pid"` // 0: no virtiofs mounts
	Accel         string `json:"accelerator"`
	State         string `json:"state"`
	Attached      bool   `json:"attached"`
	BootNS        int64  `json:"boot_ns"` // start of the supervisor to ready
}

// Descriptors of the supervisor process, after the standard three.
const (
	fdRequest  = 3 // JSON request, then end of file
	fdStatus   = 4 // status lines
	fdLock     = 5 // the sandbox's lock, already held
	fdLifeline = 6 // read end of the creator's pipe; 'd' detaches, end of file stops
)
