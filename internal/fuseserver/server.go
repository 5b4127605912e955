package fuseserver

import (
	"errors"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
)

// Server serves one share to one guest.
type Server struct{}

// New makes a server of a share.
func New(cfg Config) (*Server, error) { return nil, errors.ErrUnsupported }

// Serve implements vhostuser.Handler.
func (s *Server) Serve(r *vhostuser.Request) (n int, done bool) { return 0, true }

// NewState implements vhostuser.StateMaker.
func (s *Server) NewState(queue int) any { return nil }

// Close ends the session and closes every descriptor. No request may be in
// flight. It is idempotent.
func (s *Server) Close() error { return nil }
