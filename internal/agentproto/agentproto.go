// Package agentproto is the wire format between host and guest agent: length
// prefixed frames with a CBOR body. Message names and payloads are those of the
// peer's protocol generation 7 (docs/agent-protocol.md), so that its clients can
// talk to our agents through a relay; names beginning "msb." travel between
// supervisor and agent only.
//
// A frame is
//
//	len   uint32 big endian: bytes that follow (id, flags, body); 5 <= len <= MaxFrame
//	id    uint32 big endian: session the frame belongs to; 0 is the link itself
//	flags uint8
//	body  CBOR map {"v": uint8, "t": text, "p": byte string with the CBOR payload}
//
// # Credit
//
// On the link between supervisor and agent, data frames (FlagData) of a session
// and direction are bounded by a window of Window bytes of frame bodies. The
// receiver returns credit with MsgCredit on the session's id once the bytes are
// passed on. A sender without credit stops reading its source; control frames
// are never held back. Data frames on the link carry at most MaxData payload
// bytes. Both sides drop frames of ids they do not know and end the link on a
// bad length.
package agentproto

// Frame flags. FlagData is private to the link between supervisor and agent; a
// relay clears it towards clients.
const (
	FlagTerminal     = 0b0000_0001
	FlagSessionStart = 0b0000_0010
	FlagShutdown     = 0b0000_0100
	FlagData         = 0b1000_0000
)

// Sizes in bytes.
const (
	MaxFrame       = 4 << 20 // largest frame on a client connection
	MaxLinkFrame   = 64 << 10
	MaxRequest     = 1 << 20  // frame of a client's request: a long command line
	MaxData        = 60 << 10 // payload bytes of a data frame on the link
	Window         = 256 << 10
	Generation     = 7
	PortName       = "msb.agent"
	FrameHeaderLen = 4 + 4 + 1
)

// MaxElements is how many elements a list in a message may have: arguments,
// variables.
const MaxElements = 1 << 16

// Message types of the peer's protocol.
const (
	MsgReady      = "core.ready"
	MsgExec       = "core.exec.request"
	MsgStarted    = "core.exec.started"
	MsgStdin      = "core.exec.stdin"
	MsgStdinError = "core.exec.stdin.error"
	MsgStdout     = "core.exec.stdout"
	MsgStderr     = "core.exec.stderr"
	MsgExited     = "core.exec.exited"
	MsgExecFailed = "core.exec.failed"
	MsgResize     = "core.exec.resize"
	MsgSignal     = "core.exec.signal"
	MsgFSRequest  = "core.fs.request"
	MsgFSData     = "core.fs.data"
	MsgFSResponse = "core.fs.response"
	MsgError      = "core.error"
	MsgPing       = "core.ping"
	MsgPong       = "core.pong"
	MsgShutdown   = "core.shutdown"
	MsgClientGone = "core.relay.client.disconnected"
)

// Message types between supervisor and agent only.
const (
	MsgHello      = "msb.hello"       // agent -> supervisor, first frame, id 0
	MsgBoot       = "msb.boot"        // supervisor -> agent: root, mounts, environment
	MsgBootFailed = "msb.boot.failed" // agent -> supervisor, then power off; success is MsgReady
	MsgCredit     = "msb.credit"
	MsgGoodbye    = "msb.goodbye" // agent -> supervisor: everything is synced and unmounted, power off follows
)

// Hello is the agent's first frame.
type Hello struct {
	Version string `cbor:"version"` // must equal the supervisor's
	BootNS  uint64 `cbor:"boot_ns"` // CLOCK_BOOTTIME when main began
	// Modules lists kernel modules that could not be loaded, with the reason.
	Modules []string `cbor:"modules,omitempty"`
}

// Boot tells the agent what to set up. The agent does it in this order: root,
// /proc /sys /dev /run, hostname, resolv.conf and hosts, mounts (parents
// first), /tmp and /dev/shm, then answers MsgReady or MsgBootFailed.
type Boot struct {
	Hostname string   `cbor:"hostname"`
	Root     Root     `cbor:"root"`
	Mounts   []Mount  `cbor:"mounts"`
	Env      []string `cbor:"env"` // default environment of every exec, K=V
	Workdir  string   `cbor:"workdir"`
	User     string   `cbor:"user"` // default user: name, uid, name:group ...
	// TimeNS is the host's wall clock, Unix nanoseconds.
	TimeNS int64 `cbor:"time_ns"`
	// Entropy seeds the guest's random pool.
	Entropy []byte `cbor:"entropy"`
}

// Root is the root file system. With Lower "" there is no image: the agent's
// initramfs is the root (bare sandbox, used by tests and the helper VM).
type Root struct {
	Lower  string `cbor:"lower"`  // serial of the read-only image disk, ext4
	Upper  string `cbor:"upper"`  // serial of the writable ext4 disk; "" means tmpfs
	Fstype string `cbor:"fstype"` // of Lower, "ext4"
}

// Mount is one guest mount.
type Mount struct {
	Kind   string `cbor:"kind"`   // "virtiofs", "disk", "tmpfs"
	Guest  string `cbor:"guest"`  // absolute, cleaned
	Source string `cbor:"source"` // virtiofs tag or disk serial
	Fstype string `cbor:"fstype"` // disk: "" probes the superblock, then /proc/filesystems
	Size   int64  `cbor:"size"`   // tmpfs: bytes, 0 = kernel default

	Readonly bool `cbor:"readonly"`
	Noexec   bool `cbor:"noexec"`
	Nosuid   bool `cbor:"nosuid"`
	Nodev    bool `cbor:"nodev"`

	// Grow lets an ext4 disk that is mounted for writing fill its device.
	Grow bool `cbor:"grow"`
}

// BootFailed says which step of Boot failed.
type BootFailed struct {
	Step    string `cbor:"step"` // "root", "mount /data", "hostname" ...
	Message string `cbor:"message"`
}

// Credit returns n bytes of the window of the frame's id to the sender.
type Credit struct {
	N uint32 `cbor:"n"`
}

// Ready is sent when the guest can serve requests.
type Ready struct {
	BootTimeNS   uint64 `cbor:"boot_time_ns"`
	InitTimeNS   uint64 `cbor:"init_time_ns"`
	ReadyTimeNS  uint64 `cbor:"ready_time_ns"`
	AgentVersion string `cbor:"agent_version"`
}

// Exec starts a program.
type Exec struct {
	Cmd     string   `cbor:"cmd"`
	Args    []string `cbor:"args"`
	Env     []string `cbor:"env"` // K=V, over Boot.Env
	Cwd     *string  `cbor:"cwd"` // nil: Boot.Workdir
	User    *string  `cbor:"user"`
	TTY     bool     `cbor:"tty"`
	Rows    uint16   `cbor:"rows"`
	Cols    uint16   `cbor:"cols"`
	Rlimits []Rlimit `cbor:"rlimits"`
	// Stdin false gives the program /dev/null. The peer's clients do not send
	// the field: absent (nil) means a pipe, as they expect.
	Stdin *bool `cbor:"stdin,omitempty"`
}

// Rlimit is one resource limit, by the name of setrlimit(2) in lower case.
type Rlimit struct {
	Resource string `cbor:"resource"`
	Soft     uint64 `cbor:"soft"`
	Hard     uint64 `cbor:"hard"`
}

// Started reports a running program.
type Started struct {
	PID uint32 `cbor:"pid"`
}

// Data carries bytes of stdin (empty: end of input), stdout, stderr, files.
type Data struct {
	Data []byte `cbor:"data"`
}

// Exited is terminal; a signal n is code 128+n.
type Exited struct {
	Code int32 `cbor:"code"`
}

// ExecFailed is terminal. Kinds: not_found permission_denied not_executable
// bad_cwd bad_args resource_limit user_setup_failed out_of_memory
// pty_setup_failed other.
type ExecFailed struct {
	Kind      string  `cbor:"kind"`
	Errno     *int32  `cbor:"errno"`
	ErrnoName *string `cbor:"errno_name"`
	Message   string  `cbor:"message"`
	Stage     *string `cbor:"stage"`
}

// StdinError reports that input could not be delivered; not terminal.
type StdinError struct {
	Errno     *int32  `cbor:"errno"`
	ErrnoName *string `cbor:"errno_name"`
	Message   string  `cbor:"message"`
}

// Signal asks for a signal to the program's process group.
type Signal struct {
	Signal int32 `cbor:"signal"`
}

// Resize sets the size of a program's terminal.
type Resize struct {
	Rows uint16 `cbor:"rows"`
	Cols uint16 `cbor:"cols"`
}

// Error answers a frame that could not be served; terminal for its id.
type Error struct {
	Kind          string  `cbor:"kind"`
	Message       string  `cbor:"message"`
	OffendingType *string `cbor:"offending_type"`
}

// ClientGone tells the agent that a client's ids will not be used again:
// its handles are closed and its programs killed.
type ClientGone struct {
	IDStart        uint32 `cbor:"id_start"`
	IDEndExclusive uint32 `cbor:"id_end_exclusive"`
}

// EndWaitsAttr is the extended attribute of the root of a virtio-fs mount that
// the agent sets to end waits for locks, which nothing else can do: Linux's
// virtiofs sends no INTERRUPT. Its value is "stop", for all waits now and later,
// or the numbers of threads that have a signal to attend to.
const EndWaitsAttr = "user.msb.end_waits"
