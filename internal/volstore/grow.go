package volstore

import (
	"context"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var (
	pointGrown = failpoint.New("volstore.grow.lengthened") // the image is longer, the record does not say so
	pointSized = failpoint.New("volstore.grow.recorded")   // the record has the new size, volume.json has not
)

// Grow makes a disk volume larger: its image gets longer, sparsely, and the
// record says so. The file system in it grows when a sandbox mounts the volume
// for writing, by the guest's kernel, whose resize is safe against kills. A
// volume cannot shrink. Growing to the present size does nothing.
//
// After a crash the volume has its old or new size, or the image alone is longer:
// then the next attachment records that, and nobody has used it meanwhile. When
// Grow fails the volume is as it was.
//
// Errors: InvalidConfig for a size below the present one, one that cannot be
// reached, a directory volume, and with the cause ErrVolumeInUse;
// UnsupportedOperation for another file system than ext4; VolumeNotFound;
// Cancelled; IO.
func (s *Store) Grow(ctx context.Context, name string, sizeMiB uint32) (*Volume, error) {
	v, err := s.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	size := int64(sizeMiB) * mib
	if err := mayGrow(v, size); err != nil || size == v.CapacityBytes {
		return v, err
	}
	if err := s.growTo(ctx, v, size); err != nil {
		return nil, s.wrap("grow", name, err)
	}
	return s.GetByID(context.WithoutCancel(ctx), v.ID)
}

func mayGrow(v *Volume, size int64) error {
	switch {
	case v.Kind != KindDisk:
		return errdefs.New(errdefs.InvalidConfig, "volume %q is a directory volume and has no size", v.Name)
	case size < v.CapacityBytes:
		return errdefs.New(errdefs.InvalidConfig, "volume %q has %d MiB and cannot shrink to %d MiB", v.Name, v.CapacityBytes/mib, size/mib)
	case size > v.CapacityBytes && v.DiskFstype != "ext4":
		return errdefs.New(errdefs.UnsupportedOperation, "volume %q holds %s: only ext4 grows", v.Name, fstypeWord(v.DiskFstype))
	}
	return nil
}

func fstypeWord(fstype string) string {
	if fstype == "" {
		return "no file system that is known"
	}
	return fstype
}

// growTo lengthens the image while nobody has it, then commits its new length.
// The image is neither checked nor marked as used: its file system stays as it is.
func (s *Store) growTo(ctx context.Context, v *Volume, size int64) error {
	a, err := s.hold(ctx, v, Exclusive, Holder{PID: os.Getpid()})
	if err != nil {
		return err
	}
	defer a.Close()
	old := a.Volume.CapacityBytes // may have grown meanwhile
	if err := mayGrow(&a.Volume, size); err != nil || size == old {
		return err
	}
	if err := diskimg.Lengthen(a.Disk, size); err != nil {
		return s.ungrow(ctx, a, old, s.wrap("grow", v.Name, err))
	}
	if err := pointGrown.Hit(); err != nil {
		return s.ungrow(ctx, a, old, err)
	}
	if err := s.recordCapacity(context.WithoutCancel(ctx), a, size); err != nil {
		return s.ungrow(ctx, a, old, err)
	}
	if err := pointSized.Hit(); err != nil {
		return err
	}
	_ = s.settleByID(ctx, &a.Volume.Volume) // volume.json; the next command does it otherwise
	return nil
}

// ungrow gives the image its old length back if the record has it still, and
// returns err. Nobody can have used the space: the image is held.
func (s *Store) ungrow(ctx context.Context, a *Attachment, old int64, err error) error {
	if v, getErr := s.GetByID(context.WithoutCancel(ctx), a.Volume.ID); getErr == nil && v.CapacityBytes == old {
		_ = a.Disk.Truncate(old) // else the next attachment records the length
	}
	return err
}

// noteLength records the length of an image that is longer than its record says:
// a Grow was killed, or somebody has lengthened it. The file system in it may use
// all of it from now on. A shorter one is for its mount to refuse.
func (s *Store) noteLength(ctx context.Context, a *Attachment) error {
	fi, err := a.Disk.Stat()
	if err != nil || fi.Size() <= a.Volume.CapacityBytes {
		return err
	}
	return s.recordCapacity(ctx, a, fi.Size())
}

func (s *Store) recordCapacity(ctx context.Context, a *Attachment, size int64) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	if err := db.SetVolumeCapacity(ctx, a.Volume.ID, a.Volume.Name, size); err != nil {
		return err
	}
	a.Volume.CapacityBytes = size
	return nil
}
