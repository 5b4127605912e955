// Package agentbin embeds the guest agent that the build has put into its
// folder bin. On a clean clone there is none, and everything but booting a
// sandbox works without it.
package agentbin

import "embed"

//go:embed all:bin
var files embed.FS

// Bytes returns the agent's executable, nil when msb was built without it.
func Bytes() []byte {
	b, err := files.ReadFile("bin/msb-agent")
	if err != nil {
		return nil
	}
	return b
}
