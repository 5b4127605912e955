// Package errdefs holds the error kinds that every internal package reports and
// the public package converts. It is a leaf: it imports nothing of this module.
package errdefs

import (
	"errors"
	"fmt"
	"syscall"
)

// Kind classifies an error. The order is that of the public ErrorKind
// constants; a test in the root package compares the two lists.
type Kind int

// The kinds, in the order of the public constants.
const (
	Unknown Kind = iota
	SandboxNotFound
	SandboxNotRunning
	SandboxAlreadyExists
	SandboxStillRunning
	VolumeNotFound
	VolumeAlreadyExists
	ExecTimeout
	ExecFailed
	Filesystem
	PathNotFound
	ImageNotFound
	ImageInUse
	ImagePullFailed
	SnapshotNotFound
	SnapshotAlreadyExists
	SnapshotSandboxRunning
	SnapshotImageMissing
	SnapshotIntegrity
	SnapshotMigration
	PatchFailed
	NetworkPolicy
	SecretViolation
	TLS
	IO
	InvalidConfig
	InvalidArgument
	InvalidHandle
	BufferTooSmall
	Cancelled
	LibraryNotLoaded
	MetricsDisabled
	MetricsUnavailable
	UnsupportedOperation
	Internal
	NoDefaultCommand
)

// Sentinels that a cause may wrap; the root package re-exports the values.
var (
	// ErrPathEscape is the cause of every refused path that would have left
	// its containment root.
	ErrPathEscape = errors.New("microsandbox: path escapes volume root")
	// ErrVolumeInUse is the cause of an operation refused because somebody
	// holds the volume.
	ErrVolumeInUse = errors.New("microsandbox: volume is in use")
)

// Error is the one error type that internal packages return across their
// boundary. Msg is one lower-case line that names the thing; Hint is the way
// out, empty where there is none.
type Error struct {
	Kind  Kind
	Msg   string
	Hint  string
	Cause error

	// Op, Volume and Path are set by operations on one volume.
	Op, Volume, Path string
}

// Error returns the message and, where it adds something, the cause.
func (e *Error) Error() string {
	if e.Cause == nil {
		return e.Msg
	}
	if e.Msg == "" {
		return e.Cause.Error()
	}
	return e.Msg + ": " + e.Cause.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// New returns an error of a kind with a formatted message and no cause.
func New(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Msg: fmt.Sprintf(format, args...)}
}

// Wrap returns an error of a kind with a formatted message and a cause.
func Wrap(kind Kind, cause error, format string, args ...any) *Error {
	return &Error{Kind: kind, Msg: fmt.Sprintf(format, args...), Cause: cause}
}

// WithHint sets the way out and returns e.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// KindOf returns the kind of the outermost *Error in err's chain, Unknown if
// there is none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Unknown
}

// Is reports whether err's outermost kind is kind.
func Is(err error, kind Kind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}

// QuotaError reports the numbers of a refused change: bytes, or inodes if Inodes.
// It matches syscall.ENOSPC.
type QuotaError struct {
	Limit, Used, Want int64
	Inodes            bool
}

func (e *QuotaError) Error() string {
	unit := "bytes"
	if e.Inodes {
		unit = "files"
	}
	return fmt.Sprintf("quota exceeded: limit %d %s, used %d, wanted %d more", e.Limit, unit, e.Used, e.Want)
}

// Is reports whether target is ENOSPC, which is what a guest sees.
func (e *QuotaError) Is(target error) bool { return target == syscall.ENOSPC }
