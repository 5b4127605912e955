package supervisor

import (
	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// session is one exec or file operation of one client, named by its frame id.
// Its fields are guarded by relay.mu.
type session struct {
	id     uint32
	client *client
	exec   bool

	// Towards the guest: frames wait in toGuest until credit allows them.
	toGuest  [][]byte
	queued   int // bytes in toGuest
	credit   int // bytes that may still be sent
	inActive bool

	// From the guest: bytes received and not yet credited back. More than
	// Window of them is a breach by the agent.
	received int
	// passed counts bytes written to the client since the last credit frame.
	passed int
}

func newSession(id uint32, c *client, exec bool) *session {
	return &session{id: id, client: c, exec: exec, credit: agentproto.Window}
}

// splitData cuts one data frame body into bodies that fit the link; no data is
// one body, the end of input.
func splitData(msgType string, data []byte) [][]byte {
	out := [][]byte{}
	for {
		n := min(len(data), agentproto.MaxData)
		out = append(out, agentproto.EncodeData(msgType, data[:n]))
		if data = data[n:]; len(data) == 0 {
			return out
		}
	}
}
