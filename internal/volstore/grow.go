package volstore

import (
	"context"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var (
	pointGrown = failpoint.New("volstore.grow.truncated") // the image is longer, its file system is not
	pointSized = failpoint.New("volstore.grow.resized")   // the file system is larger, the record is not
)

// Grower enlarges the file system in an image that has been made longer. It
// must use the kernel's own journaled resize: after a kill at any instant the
// file system has its old or its new size.
type Grower func(ctx context.Context, v *Volume, image *os.File, bytes int64) error

// Grow makes a disk volume larger. It needs somebody who can resize a mounted
// file system; without a Grower it is refused and nothing is changed. A volume
// cannot shrink. Growing to the present size does nothing.
//
// After a crash the volume is whole and has its old or new size; growing can be
// repeated. Errors: InvalidConfig, also with the cause ErrVolumeInUse;
// UnsupportedOperation; VolumeNotFound; Cancelled; IO.
func (s *Store) Grow(ctx context.Context, name string, sizeMiB uint32, grow Grower) (*Volume, error) {
	v, err := s.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	size := int64(sizeMiB) * mib
	switch {
	case v.Kind != KindDisk:
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q is a directory volume and has no size", name)
	case size < v.CapacityBytes:
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q has %d MiB and cannot shrink to %d MiB", name, v.CapacityBytes/mib, sizeMiB)
	case size == v.CapacityBytes:
		return v, nil
	case grow == nil:
		return nil, errdefs.New(errdefs.UnsupportedOperation, "volume %q: disk volumes cannot be resized yet", name).
			WithHint("create a larger volume and copy the files")
	}
	err = s.growTo(ctx, v, size, grow)
	if err != nil {
		return nil, s.wrap("grow", name, err)
	}
	return s.GetByID(ctx, v.ID)
}

// growTo holds the attach lock, not the name: it takes long.
func (s *Store) growTo(ctx context.Context, v *Volume, size int64, grow Grower) error {
	a, err := s.attach(ctx, v, Exclusive, Holder{Sandbox: "msb volume resize", PID: os.Getpid()})
	if err != nil {
		return err
	}
	defer a.Close()
	fi, err := a.Disk.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < size { // a killed Grow may have made it longer
		if err := a.Disk.Truncate(size); err != nil {
			return err
		}
		if err := a.Disk.Sync(); err != nil {
			return err
		}
	}
	if err := pointGrown.Hit(); err != nil {
		return err
	}
	if err := grow(ctx, &a.Volume, a.Disk, max(size, fi.Size())); err != nil {
		return err
	}
	if err := pointSized.Hit(); err != nil {
		return err
	}
	if err := a.MarkClean(); err != nil {
		return err
	}
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	if err := db.SetVolumeCapacity(context.WithoutCancel(ctx), v.ID, v.Name, size); err != nil {
		return err
	}
	return s.settleByID(ctx, &a.Volume.Volume) // volume.json
}
