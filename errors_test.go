package microsandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// peerKinds is the order of the peer's constants; programs may have stored the
// numbers.
const peerKinds = `Unknown SandboxNotFound SandboxNotRunning SandboxAlreadyExists SandboxStillRunning
VolumeNotFound VolumeAlreadyExists ExecTimeout ExecFailed Filesystem PathNotFound ImageNotFound ImageInUse
ImagePullFailed SnapshotNotFound SnapshotAlreadyExists SnapshotSandboxRunning SnapshotImageMissing
SnapshotIntegrity SnapshotMigration PatchFailed NetworkPolicy SecretViolation TLS IO InvalidConfig
InvalidArgument InvalidHandle BufferTooSmall Cancelled LibraryNotLoaded MetricsDisabled MetricsUnavailable
UnsupportedOperation Internal NoDefaultCommand`

func TestErrorKinds(t *testing.T) {
	names := strings.Fields(peerKinds)
	for i, name := range names {
		if got := ErrorKind(i).String(); got != name {
			t.Errorf("ErrorKind(%d) = %s, want %s", i, got, name)
		}
	}
	if len(kindNames) != len(names) || int(ErrNoDefaultCommand) != len(names)-1 {
		t.Errorf("%d kinds, want %d", len(kindNames), len(names))
	}
	if got := ErrorKind(99).String(); got != "ErrorKind(99)" {
		t.Errorf("unknown kind is %q", got)
	}
}

// TestErrorKindsMatchInternal: the conversion is by number.
func TestErrorKindsMatchInternal(t *testing.T) {
	pairs := map[ErrorKind]errdefs.Kind{
		ErrUnknown: errdefs.Unknown, ErrSandboxNotFound: errdefs.SandboxNotFound, ErrSandboxNotRunning: errdefs.SandboxNotRunning,
		ErrSandboxAlreadyExists: errdefs.SandboxAlreadyExists, ErrSandboxStillRunning: errdefs.SandboxStillRunning,
		ErrVolumeNotFound: errdefs.VolumeNotFound, ErrVolumeAlreadyExists: errdefs.VolumeAlreadyExists,
		ErrExecTimeout: errdefs.ExecTimeout, ErrExecFailed: errdefs.ExecFailed, ErrFilesystem: errdefs.Filesystem,
		ErrPathNotFound: errdefs.PathNotFound, ErrImageNotFound: errdefs.ImageNotFound, ErrImageInUse: errdefs.ImageInUse,
		ErrImagePullFailed: errdefs.ImagePullFailed, ErrSnapshotNotFound: errdefs.SnapshotNotFound,
		ErrSnapshotAlreadyExists: errdefs.SnapshotAlreadyExists, ErrSnapshotSandboxRunning: errdefs.SnapshotSandboxRunning,
		ErrSnapshotImageMissing: errdefs.SnapshotImageMissing, ErrSnapshotIntegrity: errdefs.SnapshotIntegrity,
		ErrSnapshotMigration: errdefs.SnapshotMigration, ErrPatchFailed: errdefs.PatchFailed,
		ErrNetworkPolicy: errdefs.NetworkPolicy, ErrSecretViolation: errdefs.SecretViolation, ErrTLS: errdefs.TLS,
		ErrIO: errdefs.IO, ErrInvalidConfig: errdefs.InvalidConfig, ErrInvalidArgument: errdefs.InvalidArgument,
		ErrInvalidHandle: errdefs.InvalidHandle, ErrBufferTooSmall: errdefs.BufferTooSmall, ErrCancelled: errdefs.Cancelled,
		ErrLibraryNotLoaded: errdefs.LibraryNotLoaded, ErrMetricsDisabled: errdefs.MetricsDisabled,
		ErrMetricsUnavailable: errdefs.MetricsUnavailable, ErrUnsupportedOperation: errdefs.UnsupportedOperation,
		ErrInternal: errdefs.Internal, ErrNoDefaultCommand: errdefs.NoDefaultCommand,
	}
	if len(pairs) != len(kindNames) {
		t.Errorf("%d pairs for %d kinds", len(pairs), len(kindNames))
	}
	for public, internal := range pairs {
		if int(public) != int(internal) {
			t.Errorf("%s is %d here and %d inside", public, public, internal)
		}
	}
}

func TestToPublic(t *testing.T) {
	inner := errdefs.Wrap(errdefs.Filesystem, syscall.ENOENT, "read v:/a")
	inner.Op, inner.Volume, inner.Path = "read", "v", "/a"
	quota := errdefs.Wrap(errdefs.Filesystem, &errdefs.QuotaError{Limit: 10, Used: 9, Want: 2}, "write v:/a")
	quota.Op, quota.Volume, quota.Path = "write", "v", "/a"
	inUse := errdefs.Wrap(errdefs.InvalidConfig, errdefs.ErrVolumeInUse, "volume %q", "v").WithHint("stop sandbox %q", "s")
	nested := errdefs.Wrap(errdefs.InvalidConfig, errdefs.New(errdefs.VolumeNotFound, "volume %q not found", "v").WithHint("create it"), "mount /data")
	expired, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	tests := map[string]struct {
		err     error
		kind    ErrorKind
		matches []error
		message string
		hint    string
	}{
		"errno":            {inner, ErrFilesystem, []error{ErrFilesystem, fs.ErrNotExist, syscall.ENOENT}, "read v:/a: no such file or directory", ""},
		"escape":           {errdefs.Wrap(errdefs.Filesystem, errdefs.ErrPathEscape, "x"), ErrFilesystem, []error{ErrPathEscape}, "x: microsandbox: path escapes volume root", ""},
		"quota":            {quota, ErrFilesystem, []error{syscall.ENOSPC}, "write v:/a: quota exceeded: limit 10 bytes, used 9, wanted 2 more", ""},
		"in use":           {inUse, ErrInvalidConfig, []error{ErrVolumeInUse, ErrInvalidConfig}, `volume "v": microsandbox: volume is in use`, `stop sandbox "s"`},
		"not found":        {errdefs.New(errdefs.VolumeNotFound, "gone"), ErrVolumeNotFound, []error{ErrVolumeNotFound, fs.ErrNotExist}, "gone", ""},
		"exists":           {errdefs.New(errdefs.VolumeAlreadyExists, "there"), ErrVolumeAlreadyExists, []error{fs.ErrExist}, "there", ""},
		"nested":           {nested, ErrInvalidConfig, []error{ErrInvalidConfig, ErrVolumeNotFound}, `mount /data: volume "v" not found`, "create it"},
		"cancelled":        {errdefs.Wrap(errdefs.Filesystem, context.Canceled, "x"), ErrCancelled, []error{context.Canceled}, "x: context canceled", ""},
		"expired":          {fmt.Errorf("x: %w", expired.Err()), ErrCancelled, []error{context.DeadlineExceeded}, "x: context deadline exceeded", ""},
		"guest's own time": {errdefs.Wrap(errdefs.ExecTimeout, context.DeadlineExceeded, "x"), ErrExecTimeout, []error{ErrExecTimeout}, "x: context deadline exceeded", ""},
		"plain errno":      {fmt.Errorf("x: %w", syscall.EIO), ErrIO, []error{syscall.EIO}, "x: input/output error", ""},
		"anything":         {errors.New("x"), ErrInternal, nil, "x", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := toPublic(tt.err)
			var e *Error
			if !errors.As(got, &e) || !IsKind(got, tt.kind) {
				t.Fatalf("toPublic = %#v, want kind %s", got, tt.kind)
			}
			for _, target := range tt.matches {
				if !errors.Is(got, target) {
					t.Errorf("%v does not match %v", got, target)
				}
			}
			if e.Error() != tt.message || e.Hint != tt.hint {
				t.Errorf("message %q, hint %q", e.Error(), e.Hint)
			}
			if again := toPublic(got); again != got {
				t.Errorf("converted twice: %v", again)
			}
		})
	}
	if toPublic(nil) != nil {
		t.Error("nil became an error")
	}
	var ve *VolumeError
	if !errors.As(toPublic(inner), &ve) || ve.Op != "read" || ve.Volume != "v" || ve.Path != "/a" {
		t.Errorf("no VolumeError: %#v", ve)
	}
	var qe *QuotaError
	if !errors.As(toPublic(quota), &qe) || *qe != (QuotaError{Limit: 10, Used: 9, Want: 2}) {
		t.Errorf("no QuotaError: %#v", qe)
	}
}
