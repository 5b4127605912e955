package volstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/records"
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
// then the next mutating command or attachment records that, and nobody has used
// it meanwhile. When Grow fails the volume is as it was.
//
// Errors: Filesystem for an image that is missing or cut off; InvalidConfig for a
// size below the present one, one that cannot be reached, a directory volume, and
// with the cause ErrVolumeInUse; UnsupportedOperation for another file system than
// ext4; VolumeNotFound; Cancelled; IO.
func (s *Store) Grow(ctx context.Context, name string, sizeMiB uint32) (*Volume, error) {
	v, err := s.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	size := int64(sizeMiB) * mib
	if err := mayGrow(v, size); err != nil {
		return nil, err
	}
	length, damage := imageLength(v)
	if damage != nil {
		return nil, s.wrap("grow", name, damage)
	}
	if size == v.CapacityBytes && size == length {
		return v, nil
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
		return errdefs.New(errdefs.InvalidConfig, "volume %q has %d MiB and cannot shrink to %d MiB", v.Name, v.CapacityBytes/mib, size/mib).
			WithHint("make a smaller one and copy the files in a sandbox that mounts both: msb volume create NAME --kind disk --size SIZE")
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
	a, err := s.hold(ctx, v, Exclusive, Holder{PID: os.Getpid(), Task: taskResize})
	if err != nil {
		return err
	}
	defer a.Close()
	old := a.Volume.CapacityBytes // may have grown meanwhile
	if err := mayGrow(&a.Volume, size); err != nil || size == old {
		return err
	}
	mark := s.growMark(v.ID)
	if err := touch(mark); err != nil && !noRoom(err) { // without it repair finds a killed one
		return err
	}
	defer os.Remove(mark)
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
	if err := a.Disk.Sync(); err != nil { // a record of more than there is would be that of a damaged image
		return err
	}
	if err := s.recordCapacity(ctx, a, fi.Size()); err != nil {
		return err
	}
	_ = os.Remove(s.growMark(a.Volume.ID))
	return nil
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

// While an image is made longer there is a file ID.grow in .staging: a mutating
// command that finds it, and nobody who holds the volume, records the length.
const growSuffix = ".grow"

func (s *Store) growMark(id string) string { return filepath.Join(s.home.Staging(), id+growSuffix) }

// isGrowMark returns the id of the volume that a name in .staging is about.
func isGrowMark(name string) (id string, ok bool) { return strings.CutSuffix(name, growSuffix) }

// settleGrow finishes what a killed Grow left, unless somebody holds the volume,
// who may be growing it.
func (s *Store) settleGrow(ctx context.Context, db *records.DB, id string, out *settled) {
	_, err := db.VolumeByID(ctx, id)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		_ = os.Remove(s.growMark(id))
	}
	if err != nil {
		return
	}
	lock, err := openFile(filepath.Join(s.home.State(id), attachName), unix.O_RDWR)
	if err != nil {
		return // for repair
	}
	defer unlock(lock)
	if ok, err := tryFlock(lock, unix.LOCK_EX); !ok || err != nil {
		return
	}
	r, err := db.VolumeByID(ctx, id) // as it is now
	if err != nil {
		return
	}
	a := &Attachment{Volume: *s.volume(r)}
	if data, ok, err := identityAt(a.Volume.Path); err != nil || !ok || !data.Same(r.Identity) {
		return // another's image
	}
	if a.Disk, _, err = diskimg.OpenRaw(a.Volume.DiskPath, true); err != nil {
		return
	}
	defer unlock(a.Disk)
	if s.noteLength(ctx, a) != nil {
		return
	}
	_ = os.Remove(s.growMark(id))
	if a.Volume.CapacityBytes > r.CapacityBytes {
		out.add(grownFinding(&a.Volume))
	}
}

// mendLength records the length of an image that is longer than its record says,
// whatever made it so, if nobody holds the volume.
func (s *Store) mendLength(ctx context.Context, r *records.Volume) (*Finding, error) {
	if r.Kind != KindDisk {
		return nil, nil
	}
	v := s.volume(r)
	if id, ok, err := identityAt(v.Path); err != nil || !ok || !id.Same(r.Identity) {
		return nil, nil
	}
	if length, wrong := imageLength(v); wrong != nil || length <= r.CapacityBytes {
		return nil, nil
	}
	a, err := s.hold(ctx, v, Exclusive, Holder{PID: os.Getpid(), Task: taskResize})
	if errors.Is(err, errdefs.ErrVolumeInUse) || errdefs.Is(err, errdefs.VolumeNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f := grownFinding(&a.Volume)
	return &f, a.Close()
}

func grownFinding(v *Volume) Finding {
	return Finding{Kind: FoundResize, ID: v.ID, Name: v.Name, Path: v.DiskPath,
		Action: fmt.Sprintf("recorded the size of its image, %d MiB", v.CapacityBytes/mib)}
}

// imageLength returns the length of a disk volume's image in bytes. Errors:
// Filesystem when it is missing, no regular file, or shorter than its record says.
func imageLength(v *Volume) (int64, *errdefs.Error) {
	fi, err := os.Lstat(v.DiskPath)
	what := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		what = "is missing"
	case err != nil:
		what = "cannot be looked at: " + err.Error()
	case !fi.Mode().IsRegular():
		what = "is no regular file"
	case fi.Size() < v.CapacityBytes:
		what = fmt.Sprintf("has %d of %d bytes", fi.Size(), v.CapacityBytes)
	default:
		return fi.Size(), nil
	}
	return 0, errdefs.New(errdefs.Filesystem, "disk volume %q is damaged: its image %s", v.Name, what).
		WithHint("put a copy of the image back at %s, or msb volume rm %s", v.DiskPath, v.Name)
}
