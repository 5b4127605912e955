package volstore

import (
	"context"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Modes of Ensure: how a sandbox names a volume that it mounts.
const (
	ModeExisting = "existing"      // must exist
	ModeCreate   = "create"        // must not exist
	ModeEnsure   = "ensure-exists" // is created if missing, compared if there
)

// Requested says which attributes of a Spec the caller asked for explicitly.
// Ensure compares the kind always (a Spec without one means a directory), quota
// and size only when asked for. All labels of the Spec count as asked for.
type Requested struct{ Kind, Quota, Size bool }

// Ensure resolves a named mount when a sandbox is created; created tells whether
// the volume was made by this call, and is then the caller's to remove if the
// sandbox fails to start. An existing volume is never changed.
//
// Errors: those of Get and Create; InvalidConfig naming the attribute, what the
// volume has and what was asked for.
func (s *Store) Ensure(ctx context.Context, mode string, sp Spec, asked Requested) (v *Volume, created bool, err error) {
	switch mode {
	case ModeExisting:
		v, err = s.Get(ctx, sp.Name)
		return v, false, err
	case ModeCreate:
		v, err = s.Create(ctx, sp)
		return v, err == nil, err
	case ModeEnsure:
		return s.ensure(ctx, sp, asked)
	}
	return nil, false, errdefs.New(errdefs.InvalidConfig, "volume %q: unknown mode %q, want %q, %q or %q", sp.Name, mode, ModeExisting, ModeCreate, ModeEnsure)
}

func (s *Store) ensure(ctx context.Context, sp Spec, asked Requested) (*Volume, bool, error) {
	if err := ValidateName(sp.Name); err != nil {
		return nil, false, err
	}
	for {
		v, err := s.Get(ctx, sp.Name)
		if err == nil {
			return v, false, sp.matches(v, asked)
		}
		if !errdefs.Is(err, errdefs.VolumeNotFound) {
			return nil, false, err
		}
		v, err = s.Create(ctx, sp)
		if err == nil {
			return v, true, nil
		}
		// Made by somebody else meanwhile: compare with that one. A stranger's
		// directory is no volume and stays an error.
		if _, err2 := s.Get(ctx, sp.Name); !errdefs.Is(err, errdefs.VolumeAlreadyExists) || err2 != nil {
			return nil, false, err
		}
	}
}

// matches compares an existing volume with what was asked for.
func (sp Spec) matches(v *Volume, asked Requested) error {
	differs := func(what string, has, want any) error {
		return errdefs.New(errdefs.InvalidConfig, "volume %q already exists with %s %v, but %v was requested", v.Name, what, has, want).
			WithHint("--mount-named %s:GUEST:create=existing (mode existing) mounts it as it is", v.Name)
	}
	kind := sp.Kind
	if kind == "" {
		kind = KindDir
	}
	if v.Kind != kind {
		return differs("kind", v.Kind, kind)
	}
	if asked.Quota && v.QuotaMiB != sp.QuotaMiB {
		return differs("quota (MiB)", v.QuotaMiB, sp.QuotaMiB)
	}
	if asked.Size && v.CapacityBytes != int64(sp.SizeMiB)*mib {
		return differs("size (MiB)", v.CapacityBytes/mib, sp.SizeMiB)
	}
	for k, want := range sp.Labels {
		if has, ok := v.Labels[k]; !ok || has != want {
			return differs("label "+k, quote(has), quote(want))
		}
	}
	return nil
}
