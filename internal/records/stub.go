package records

import (
	"context"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// DB is an open record database.
type DB struct{}

// Open opens the records for reading and writing.
func Open(ctx context.Context, h home.Dir) (*DB, error) { panic("not yet") }

// OpenReader opens the records for reading; it writes nothing.
func OpenReader(ctx context.Context, h home.Dir) (*DB, error) { panic("not yet") }

// Close releases the database.
func (d *DB) Close() error { panic("not yet") }

// InsertSandbox stores a new sandbox.
func (d *DB) InsertSandbox(ctx context.Context, s *Sandbox) error { panic("not yet") }

// SandboxByName returns one sandbox.
func (d *DB) SandboxByName(ctx context.Context, name string) (*Sandbox, error) { panic("not yet") }

// ListSandboxes returns sandboxes, newest first, and the cursor of the next page.
func (d *DB) ListSandboxes(ctx context.Context, f SandboxFilter) ([]*Sandbox, string, error) {
	panic("not yet")
}

// UpdateSandbox changes state; a nil config keeps the stored one.
func (d *DB) UpdateSandbox(ctx context.Context, id, status, lastError string, config []byte) error {
	panic("not yet")
}

// DeleteSandbox removes a sandbox record.
func (d *DB) DeleteSandbox(ctx context.Context, id string) error { panic("not yet") }
