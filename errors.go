package microsandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// ErrorKind classifies an [Error]. It is an error itself, so that
// errors.Is(err, ErrVolumeNotFound) and IsKind(err, ErrVolumeNotFound) both work.
type ErrorKind int

// The kinds. Their order and names never change; new ones are appended.
const (
	ErrUnknown ErrorKind = iota
	ErrSandboxNotFound
	ErrSandboxNotRunning
	ErrSandboxAlreadyExists
	ErrSandboxStillRunning
	ErrVolumeNotFound
	ErrVolumeAlreadyExists
	ErrExecTimeout
	ErrExecFailed
	ErrFilesystem
	ErrPathNotFound
	ErrImageNotFound
	ErrImageInUse
	ErrImagePullFailed
	ErrSnapshotNotFound
	ErrSnapshotAlreadyExists
	ErrSnapshotSandboxRunning
	ErrSnapshotImageMissing
	ErrSnapshotIntegrity
	ErrSnapshotMigration
	ErrPatchFailed
	ErrNetworkPolicy
	ErrSecretViolation
	ErrTLS
	ErrIO
	ErrInvalidConfig
	ErrInvalidArgument
	ErrInvalidHandle
	ErrBufferTooSmall
	ErrCancelled
	ErrLibraryNotLoaded
	ErrMetricsDisabled
	ErrMetricsUnavailable
	ErrUnsupportedOperation
	ErrInternal
	ErrNoDefaultCommand
)

var kindNames = [...]string{
	ErrUnknown:                "Unknown",
	ErrSandboxNotFound:        "SandboxNotFound",
	ErrSandboxNotRunning:      "SandboxNotRunning",
	ErrSandboxAlreadyExists:   "SandboxAlreadyExists",
	ErrSandboxStillRunning:    "SandboxStillRunning",
	ErrVolumeNotFound:         "VolumeNotFound",
	ErrVolumeAlreadyExists:    "VolumeAlreadyExists",
	ErrExecTimeout:            "ExecTimeout",
	ErrExecFailed:             "ExecFailed",
	ErrFilesystem:             "Filesystem",
	ErrPathNotFound:           "PathNotFound",
	ErrImageNotFound:          "ImageNotFound",
	ErrImageInUse:             "ImageInUse",
	ErrImagePullFailed:        "ImagePullFailed",
	ErrSnapshotNotFound:       "SnapshotNotFound",
	ErrSnapshotAlreadyExists:  "SnapshotAlreadyExists",
	ErrSnapshotSandboxRunning: "SnapshotSandboxRunning",
	ErrSnapshotImageMissing:   "SnapshotImageMissing",
	ErrSnapshotIntegrity:      "SnapshotIntegrity",
	ErrSnapshotMigration:      "SnapshotMigration",
	ErrPatchFailed:            "PatchFailed",
	ErrNetworkPolicy:          "NetworkPolicy",
	ErrSecretViolation:        "SecretViolation",
	ErrTLS:                    "TLS",
	ErrIO:                     "IO",
	ErrInvalidConfig:          "InvalidConfig",
	ErrInvalidArgument:        "InvalidArgument",
	ErrInvalidHandle:          "InvalidHandle",
	ErrBufferTooSmall:         "BufferTooSmall",
	ErrCancelled:              "Cancelled",
	ErrLibraryNotLoaded:       "LibraryNotLoaded",
	ErrMetricsDisabled:        "MetricsDisabled",
	ErrMetricsUnavailable:     "MetricsUnavailable",
	ErrUnsupportedOperation:   "UnsupportedOperation",
	ErrInternal:               "Internal",
	ErrNoDefaultCommand:       "NoDefaultCommand",
}

// String returns the constant's name without "Err".
func (k ErrorKind) String() string {
	if k < 0 || int(k) >= len(kindNames) {
		return fmt.Sprintf("ErrorKind(%d)", int(k))
	}
	return kindNames[k]
}

// Error makes a kind usable as the target of errors.Is.
func (k ErrorKind) Error() string { return k.String() }

// Sentinels to be tested with errors.Is; they are causes, below an [Error].
var (
	// ErrPathEscape says that a path, or a link on it, would have left the
	// volume. Its Error has kind ErrFilesystem.
	ErrPathEscape = errdefs.ErrPathEscape
	// ErrVolumeInUse says that somebody holds the volume. Its Error has kind
	// ErrInvalidConfig and names the holders.
	ErrVolumeInUse = errdefs.ErrVolumeInUse
)

// Error is the one error type of this package.
type Error struct {
	Kind    ErrorKind
	Message string // one line, lower case, names the thing; complete without Cause
	Cause   error  // *VolumeError, *QuotaError, ErrPathEscape, ErrVolumeInUse, fs errors, context errors
	Hint    string // what to do next; "" where there is nothing to say
}

// Error returns the message, or the cause's when there is none. The kind is
// not part of it.
func (e *Error) Error() string {
	switch {
	case e.Message != "":
		return e.Message
	case e.Cause != nil:
		return e.Cause.Error()
	}
	return e.Kind.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Is matches the own kind, and the standard library's cousin of the kinds that
// say "not found" and "already exists".
func (e *Error) Is(target error) bool {
	if k, ok := target.(ErrorKind); ok {
		return k == e.Kind
	}
	switch e.Kind {
	case ErrSandboxNotFound, ErrVolumeNotFound, ErrPathNotFound, ErrImageNotFound, ErrSnapshotNotFound:
		return target == fs.ErrNotExist
	case ErrSandboxAlreadyExists, ErrVolumeAlreadyExists, ErrSnapshotAlreadyExists:
		return target == fs.ErrExist
	default:
		return false
	}
}

// IsKind reports whether err is an [Error] of a kind. A kind further down the
// chain does not count: errors.Is finds that one too.
func IsKind(err error, kind ErrorKind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}

// VolumeError says which operation failed on which volume; Err says why.
type VolumeError struct {
	Op, Volume string
	Path       string // volume-relative; "" when the whole volume is meant
	Err        error  // nil when the Error's kind says it all
}

// Error returns "OP VOLUME:PATH: reason".
func (e *VolumeError) Error() string {
	s := e.Op + " " + e.Volume
	if e.Path != "" {
		s += ":" + e.Path
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the reason.
func (e *VolumeError) Unwrap() error { return e.Err }

// QuotaError reports the numbers of a refused write: bytes, or files if Inodes.
// It matches syscall.ENOSPC.
type QuotaError struct {
	Limit, Used, Want int64
	Inodes            bool // the limit of files, directories and further names
}

// Error returns the three numbers in words.
func (e *QuotaError) Error() string { return (*errdefs.QuotaError)(e).Error() }

// Is matches syscall.ENOSPC.
func (e *QuotaError) Is(target error) bool { return target == syscall.ENOSPC }

// toPublic converts what an internal package returned; every exported function
// of this package that can fail returns through it. A nil stays nil, an *Error
// stays as it is, a context's end becomes ErrCancelled.
func toPublic(err error) error {
	if err == nil {
		return nil
	}
	var done *Error
	if errors.As(err, &done) {
		return err
	}
	if ctxErr := contextCause(err); ctxErr != nil && !errdefs.Is(err, errdefs.ExecTimeout) {
		return &Error{Kind: ErrCancelled, Message: err.Error(), Cause: ctxErr}
	}
	var in *errdefs.Error
	if errors.As(err, &in) {
		return &Error{
			Kind:    ErrorKind(in.Kind),
			Message: err.Error(),
			Cause:   volumeCause(in),
			Hint:    hintOf(in),
		}
	}
	kind := ErrInternal
	var errno syscall.Errno
	if errors.As(err, &errno) {
		kind = ErrIO
	}
	return &Error{Kind: kind, Message: err.Error(), Cause: err}
}

// contextCause returns the context error in err's chain, nil if there is none.
func contextCause(err error) error {
	for _, c := range []error{context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, c) {
			return c
		}
	}
	return nil
}

// volumeCause converts the cause of e and puts a *VolumeError around it where
// e says which volume it is about.
func volumeCause(e *errdefs.Error) error {
	cause := e.Cause
	var inner *errdefs.Error
	var quota *errdefs.QuotaError
	switch {
	case errors.As(cause, &inner):
		cause = toPublic(cause)
	case errors.As(cause, &quota):
		cause = &QuotaError{Limit: quota.Limit, Used: quota.Used, Want: quota.Want, Inodes: quota.Inodes}
	}
	if e.Op == "" && e.Volume == "" {
		return cause
	}
	return &VolumeError{Op: e.Op, Volume: e.Volume, Path: e.Path, Err: cause}
}

// hintOf returns the outermost hint of e's chain.
func hintOf(e *errdefs.Error) string {
	for e != nil {
		if e.Hint != "" {
			return e.Hint
		}
		var inner *errdefs.Error
		if !errors.As(e.Cause, &inner) {
			return ""
		}
		e = inner
	}
	return ""
}
