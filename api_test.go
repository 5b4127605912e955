package microsandbox

import (
	"context"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// TestAPIMethods: T-01, T-02, T-03, T-05: every method that the reference
// promises is there, none is dropped by accident.
func TestAPIMethods(t *testing.T) {
	tests := map[string]struct {
		value   any
		methods string
	}{
		"Volume (11 and Remove, HostPath)": {(*Volume)(nil),
			"BackendKind CapacityBytes Cloud DiskFormat DiskFstype DiskPath FS HostPath Kind Local Name Path Remove"},
		"VolumeHandle (15 and ours)": {(*VolumeHandle)(nil),
			"AllocatedUsage BackendKind CapacityBytes Cloud CreatedAt DiskFormat DiskFstype DiskPath FS Holders IsDefault Kind KnownUsedBytes LabelPairs Labels Local Name Path QuotaMiB Remove Rename RescanUsage SetLabels SetQuota UpdateLabels Usage UsedBytes VerifyUsage"},
		"VolumeBuilder (7)": {(*VolumeBuilder)(nil), "Build Create Directory Disk Inodes Label Quota Size"},
		"VolumeFs (13 and the peer's)": {(*VolumeFs)(nil),
			"Copy Durable Exists List Mkdir Read ReadStream ReadString Remove RemoveAll RemoveDir Rename Root Stat Write WriteStream WriteString"},
		"VolumeFsReadStream": {(*VolumeFsReadStream)(nil), "Close Collect Read Recv WriteTo"},
		"VolumeFsWriteSink":  {(*VolumeFsWriteSink)(nil), "Abort Close ReadFrom Write WriteCtx"},
	}
	for name, tt := range tests {
		typ := reflect.TypeOf(tt.value)
		var got []string
		for i := range typ.NumMethod() {
			got = append(got, typ.Method(i).Name)
		}
		slices.Sort(got)
		if joined := strings.Join(got, " "); joined != tt.methods {
			t.Errorf("%s has\n%s, want\n%s", name, joined, tt.methods)
		}
	}
}

// TestAPIFields: fields of the peer's structs keep their order; ours follow.
func TestAPIFields(t *testing.T) {
	tests := map[string]struct {
		value  any
		fields string
	}{
		"VolumeConfig": {VolumeConfig{}, "QuotaMiB Kind SizeMiB Labels"},
		"FsEntry":      {FsEntry{}, "Path Kind Size Mode"},
		"FsStat":       {FsStat{}, "Path Size Mode ModTime IsDir"},
		"Error":        {Error{}, "Kind Message Cause"},
		"BackendInfo":  {BackendInfo{}, "Kind APIURL Source Profile"},
	}
	for name, tt := range tests {
		typ := reflect.TypeOf(tt.value)
		for i, want := range strings.Fields(tt.fields) {
			if got := typ.Field(i).Name; got != want {
				t.Errorf("%s: field %d is %s, want %s", name, i, got, want)
			}
		}
	}
}

// The signatures of the peer's Go SDK, for the compiler.
var (
	_ func(context.Context, string, ...VolumeOption) (*Volume, error) = CreateVolume
	_ func(context.Context) ([]*VolumeHandle, error)                  = ListVolumes
	_ func(context.Context, string) error                             = RemoveVolume
	_ func(context.Context, string) (*VolumeHandle, error)            = GetVolume
	_ func(context.Context) (*VolumeHandle, error)                    = GetDefaultVolume
	_ func(VolumeKind) VolumeOption                                   = WithVolumeKind
	_ func(uint32) VolumeOption                                       = WithVolumeSize
	_ func(uint32) VolumeOption                                       = WithVolumeQuota
	_ func(map[string]string) VolumeOption                            = WithVolumeLabels
	_ func() (BackendInfo, error)                                     = DefaultBackendInfo
	_ func(error, ErrorKind) bool                                     = IsKind

	_ interface {
		Name() string
		Path() string
		FS() *VolumeFs
		Remove(context.Context) error
	} = (*Volume)(nil)
	_ interface {
		Root() string
		Read(context.Context, string) ([]byte, error)
		ReadString(context.Context, string) (string, error)
		Write(context.Context, string, []byte) error
		WriteString(context.Context, string, string) error
		Mkdir(context.Context, string) error
		Remove(context.Context, string) error
		RemoveAll(context.Context, string) error
		Exists(context.Context, string) (bool, error)
	} = (*VolumeFs)(nil)
	_ Backend = (*LocalBackend)(nil)
)
