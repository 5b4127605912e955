package agentclient

import (
	"errors"
	"strings"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// TestLongCommandLines: what no request can hold is refused before it is sent.
func TestLongCommandLines(t *testing.T) {
	for name, tt := range map[string]struct {
		req  agentproto.Exec
		says string // "" if it fits
	}{
		"most arguments":  {agentproto.Exec{Args: make([]string, agentproto.MaxElements)}, ""},
		"arguments":       {agentproto.Exec{Args: make([]string, agentproto.MaxElements+1)}, "65537 arguments"},
		"variables":       {agentproto.Exec{Env: make([]string, 100_000)}, "100000 environment variables"},
		"long argument":   {agentproto.Exec{Args: []string{strings.Repeat("x", 1<<20-2000)}}, ""},
		"longer argument": {agentproto.Exec{Args: []string{strings.Repeat("x", 1<<20)}}, "at most 1048576"},
		"long command":    {agentproto.Exec{Cmd: strings.Repeat("x", 1<<20)}, "at most 1048576"},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkSize(&tt.req)
			if tt.says == "" {
				b, encErr := agentproto.Encode(agentproto.MsgExec, tt.req)
				if err != nil || encErr != nil || len(b)+agentproto.FrameHeaderLen > agentproto.MaxRequest {
					t.Errorf("%v %v, %d bytes", err, encErr, len(b))
				}
				return
			}
			var e *errdefs.Error
			if !errors.As(err, &e) || e.Kind != errdefs.InvalidArgument || e.Hint == "" || !strings.Contains(e.Msg, tt.says) {
				t.Errorf("%v, want %q and a hint", err, tt.says)
			}
		})
	}
}
