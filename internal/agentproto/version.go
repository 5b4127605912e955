package agentproto

// Version is that of msb and of the agent built with it; the build sets it for
// both. The supervisor refuses an agent of another version.
var Version = "dev"

// Shutdown is the payload of MsgShutdown: programs get SIGTERM, then SIGKILL
// after the grace time; 0 means two seconds.
type Shutdown struct {
	GraceMS uint32 `cbor:"grace_ms,omitempty"`
}
