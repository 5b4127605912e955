package mount

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

// fakeStore keeps volumes in memory and their data below a home. It notes what
// is asked of it, and can fail on demand, which the real store cannot.
type fakeStore struct {
	t       *testing.T
	h       home.Dir
	volumes map[string]*volstore.Volume // by name
	made    int
	log     []string
	// failMaking makes Ensure of this name fail after everything was checked.
	failMaking string
}

func newFake(t *testing.T) *fakeStore {
	t.Helper()
	h := home.Dir(filepath.Join(t.TempDir(), "home"))
	if err := h.Ensure(); err != nil {
		t.Fatal(err)
	}
	return &fakeStore{t: t, h: h, volumes: map[string]*volstore.Volume{}}
}

func (f *fakeStore) add(name, kind string) *volstore.Volume {
	f.t.Helper()
	f.made++
	v := &volstore.Volume{Volume: records.Volume{ID: fmt.Sprintf("id-%d-%s", f.made, name), Name: name, Kind: kind}, Path: f.h.Volume(name)}
	if err := os.Mkdir(v.Path, 0o700); err != nil {
		f.t.Fatal(err)
	}
	if kind == VolumeDisk {
		v.DiskFstype, v.DiskPath = "ext4", filepath.Join(v.Path, home.DiskFile)
		if err := os.WriteFile(v.DiskPath, make([]byte, 4096), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	f.volumes[name] = v
	return v
}

func (f *fakeStore) Get(_ context.Context, name string) (*volstore.Volume, error) {
	if v := f.volumes[name]; v != nil {
		return v, nil
	}
	return nil, errdefs.New(errdefs.VolumeNotFound, "volume %q not found", name)
}

func (f *fakeStore) GetByID(_ context.Context, id string) (*volstore.Volume, error) {
	for _, v := range f.volumes {
		if v.ID == id {
			return v, nil
		}
	}
	return nil, errdefs.New(errdefs.VolumeNotFound, "volume %q not found", id)
}

func (f *fakeStore) Ensure(_ context.Context, mode string, sp volstore.Spec, asked volstore.Requested) (*volstore.Volume, bool, error) {
	f.log = append(f.log, mode+" "+sp.Name)
	if sp.Name == f.failMaking {
		return nil, false, errdefs.New(errdefs.IO, "no space left")
	}
	if v := f.volumes[sp.Name]; v != nil {
		switch {
		case mode == ModeCreate:
			return nil, false, errdefs.New(errdefs.VolumeAlreadyExists, "volume %q already exists", sp.Name)
		case asked.Kind && v.Kind != sp.Kind:
			return nil, false, errdefs.New(errdefs.InvalidConfig, "volume %q is of kind %s", sp.Name, v.Kind)
		}
		return v, false, nil
	}
	return f.add(sp.Name, sp.Kind), true, nil
}

func (f *fakeStore) RemoveID(ctx context.Context, id string) error {
	f.log = append(f.log, "remove "+id)
	if err := ctx.Err(); err != nil {
		return err
	}
	v, err := f.GetByID(ctx, id)
	if err != nil {
		return err
	}
	delete(f.volumes, v.Name)
	return os.RemoveAll(v.Path)
}

var (
	_ Volumes  = (*fakeStore)(nil)
	_ Volumes  = (*volstore.Store)(nil)
	_ Attacher = (*volstore.Store)(nil)
)
