// Package fetch reaches what comes from outside: registries, and compressed
// bytes. The work is done by a program of its own, msb-fetch, which is part of
// msb: the code that speaks TLS and unpacks zstd is large, reads what strangers
// wrote, and would cost every command that needs neither a third of its start.
//
// A [Program] starts it. Package fetcher, which msb-fetch is made of, does the
// same within the process; both are [Tools].
package fetch

import (
	"context"
	"fmt"
	"io"
)

// Codec names a compression.
type Codec string

// The codecs.
const (
	Gzip Codec = "gzip"
	Zstd Codec = "zstd"
)

// MaxWindow bounds the memory of a zstd frame in bytes; the format's own tools
// refuse more without a flag.
const MaxWindow = 128 << 20

// Tools are what is reached. They are safe for concurrent use.
type Tools interface {
	// Decompress returns the uncompressed bytes of r. The caller bounds them. A
	// file is read on from its offset, perhaps beyond what was needed. It ends
	// when ctx does, and has to be closed.
	Decompress(ctx context.Context, c Codec, r io.Reader) (io.ReadCloser, error)
	// Dial prepares requests to one repository. It ends when ctx does.
	Dial(ctx context.Context, a Access) (Registry, error)
}

// Access says what is asked for and by whom.
type Access struct {
	Reference string `json:"reference"`          // of the image, as people write it
	Insecure  bool   `json:"insecure,omitempty"` // plain http and unverified certificates are allowed
	Auth      *Auth  `json:"auth,omitempty"`     // nil: as configured for docker
	CACerts   []byte `json:"ca_certs,omitempty"` // PEM; trusted besides the system's
}

// Auth is an account.
type Auth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// Registry answers requests to one repository.
type Registry interface {
	// Get asks for a manifest or blob; the caller closes and bounds the body. An
	// answer that is none of [Response] is an *[Error].
	Get(ctx context.Context, r Request) (*Response, error)
	Close() error
}

// Request is a GET of /v2/REPOSITORY/KIND/ID.
type Request struct {
	Kind   string `json:"kind"` // manifests or blobs
	ID     string `json:"id"`
	Accept string `json:"accept,omitempty"`
	Offset int64  `json:"offset,omitempty"` // bytes to leave out, where the registry can
}

// Response is an answer with status 200, or 206 from an offset.
type Response struct {
	Start int64 // where the body begins; -1 if the registry does not say
	Body  io.ReadCloser
}

// Error is a request without a usable answer. Status is the HTTP status, 0
// without one; Stage is what failed before the request, if anything.
type Error struct {
	Stage   string `json:"stage,omitempty"`
	Status  int    `json:"status,omitempty"`
	Message string `json:"message"`
}

func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("status %d", e.Status)
	}
	return e.Message
}
