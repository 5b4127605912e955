package mount

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/fuseserver"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

var (
	volumeMade  = failpoint.New("mount.volume-made")
	provisioned = failpoint.New("mount.provisioned")
)

// Volumes is what provisioning needs of the volume store.
type Volumes interface {
	Get(ctx context.Context, name string) (*volstore.Volume, error)
	GetByID(ctx context.Context, id string) (*volstore.Volume, error)
	Ensure(ctx context.Context, mode string, sp volstore.Spec, asked volstore.Requested) (*volstore.Volume, bool, error)
	RemoveID(ctx context.Context, id string) error
}

// Provision resolves the mounts of a new sandbox: host paths become absolute,
// with their links followed, volumes are found or made. It returns the resolved
// mounts in the caller's order and a function that takes back what was made,
// for a launch that fails later. After an error nothing is left behind.
//
// The function removes exactly the volumes made here, unless somebody uses or
// has filled them by then. It works after ctx is cancelled and never is nil.
//
// The resolved mounts say which volumes were made here. Specs of Intend, stored
// with the sandbox's record before this call, let the next command take the
// volumes back with TakeBack if this process is killed.
//
// Errors: those of Validate; [errdefs.UnsupportedOperation] for what does not
// work yet; [errdefs.VolumeNotFound], [errdefs.VolumeAlreadyExists].
func Provision(ctx context.Context, st Volumes, h home.Dir, specs []Spec) (resolved []Spec, undo func(context.Context), err error) {
	p := &provision{volumes: st, found: make([]*volstore.Volume, len(specs))}
	defer func() {
		if err != nil {
			p.undo(ctx)
		}
	}()
	nothing := func(context.Context) {}
	if err := Validate(specs); err != nil {
		return nil, nothing, err
	}
	for _, s := range specs {
		p.specs = append(p.specs, s.normalized())
	}
	for _, step := range []func(context.Context) error{
		p.checkSupported,
		func(context.Context) error { return p.resolveHosts(h) },
		p.checkVolumes,
		p.makeVolumes,
		p.findVolumes,
		p.checkFound,
		p.probe,
		func(context.Context) error { return provisioned.Hit() },
	} {
		if err := step(ctx); err != nil {
			return nil, nothing, err
		}
	}
	return p.specs, p.undo, nil
}

// Intend chooses the ids of the volumes that Provision is going to make.
func Intend(specs []Spec) []Spec {
	out := slices.Clone(specs)
	for i := range out {
		if s := &out[i]; s.creates() {
			s.Resolved.VolumeID, s.Resolved.Made = ulid.Make().String(), true
		}
	}
	return out
}

// Check reports what Provision would refuse without making anything: worth a
// look before a long step, a pull for instance. What it accepts may still fail.
func Check(ctx context.Context, st Volumes, h home.Dir, specs []Spec) error {
	if err := Validate(specs); err != nil {
		return err
	}
	p := &provision{volumes: st}
	for _, s := range specs {
		p.specs = append(p.specs, s.normalized())
	}
	for _, step := range []func(context.Context) error{
		p.checkSupported,
		func(context.Context) error { return p.resolveHosts(h) },
		p.checkVolumes,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Refresh checks the resolved mounts of a sandbox that is started again. Every
// volume must still exist, under whatever name; host paths may lead to other
// directories and files by now and are resolved anew. Nothing is made.
func Refresh(ctx context.Context, st Volumes, h home.Dir, resolved []Spec) ([]Spec, error) {
	p := &provision{volumes: st, specs: slices.Clone(resolved), found: make([]*volstore.Volume, len(resolved))}
	for i := range p.specs { // from now on they are the user's
		p.specs[i].Resolved.Made, p.specs[i].Resolved.MadeNS = false, 0
	}
	for _, step := range []func(context.Context) error{
		p.checkSupported,
		func(context.Context) error { return p.resolveHosts(h) },
		p.findVolumesByID,
		p.checkFound,
		p.probe,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return p.specs, nil
}

// provision is the state of one call of Provision or Refresh.
type provision struct {
	volumes Volumes
	specs   []Spec
	found   []*volstore.Volume // by index of specs; nil for mounts without a volume
	made    []*volstore.Volume // by this call, in order
}

// checkSupported refuses what is well-formed but does not work yet.
func (p *provision) checkSupported(context.Context) error {
	for i := range p.specs {
		s := &p.specs[i]
		switch {
		case s.Kind == KindDisk && s.FormatOf() != FormatRaw:
			return notYet(s, "%s disk images are", s.FormatOf()).
				WithHint("convert it: qemu-img convert -O raw %s disk.raw", s.Source)
		}
	}
	return nil
}

func notYet(s *Spec, format string, args ...any) *errdefs.Error {
	e := invalid(s, format+" not supported yet", args...)
	e.Kind = errdefs.UnsupportedOperation
	return e
}

func (p *provision) resolveHosts(h home.Dir) error {
	protected := protectedDirs(h)
	images := map[identity]bool{}
	for i := range p.specs {
		s := &p.specs[i]
		if s.Kind != KindBind && s.Kind != KindDisk {
			continue
		}
		if err := resolveHost(s, protected); err != nil {
			return err
		}
		id := identity{s.Resolved.Dev, s.Resolved.Ino}
		if s.Kind == KindDisk && images[id] {
			return invalid(s, "disk image %q is mounted twice in one sandbox", s.Source)
		}
		images[id] = s.Kind == KindDisk
	}
	return nil
}

// checkVolumes looks for reasons to refuse before the first volume is made.
func (p *provision) checkVolumes(ctx context.Context) error {
	made := map[string]bool{}
	for _, s := range p.specs {
		made[s.Source] = made[s.Source] || s.creates()
	}
	for i := range p.specs {
		s := &p.specs[i]
		if s.Kind != KindNamed {
			continue
		}
		v, err := p.volumes.Get(ctx, s.Source)
		switch {
		case errdefs.Is(err, errdefs.VolumeNotFound):
			err = p.checkAbsent(s, err, made[s.Source])
		case err == nil && s.Named.Mode == ModeExisting:
			err = checkOptionsFor(s, v.Kind)
		case err == nil && s.Named.Mode == ModeCreate:
			err = errdefs.New(errdefs.VolumeAlreadyExists, "volume %q already exists", s.Source).
				WithHint("mode ensure-exists uses it if it fits")
			err = at(s, err)
		case err != nil:
			err = at(s, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkAbsent decides about a mount whose volume is missing.
func (p *provision) checkAbsent(s *Spec, notFound error, made bool) error {
	if !made {
		e := at(s, notFound).(*errdefs.Error)
		if e.Hint == "" {
			_ = e.WithHint("msb volume create %s makes it; so does mode create or ensure-exists", s.Source)
		}
		return e
	}
	if s.creates() && s.Named.Kind == VolumeDisk && s.Named.SizeMiB == 0 {
		return invalid(s, "disk volume %q does not exist and needs a size to be made", s.Source).
			WithHint("set the size in MiB")
	}
	return nil
}

// makeVolumes provisions the volumes of the modes create and ensure-exists, in
// the caller's order.
func (p *provision) makeVolumes(ctx context.Context) error {
	for i := range p.specs {
		s := &p.specs[i]
		if !s.creates() {
			continue
		}
		asked := volstore.Requested{Kind: true, Quota: s.Named.QuotaMiB != 0, Size: s.Named.SizeMiB != 0}
		wanted := s.volumeSpec()
		wanted.ID = s.Resolved.VolumeID
		v, created, err := p.volumes.Ensure(ctx, s.Named.Mode, wanted, asked)
		if err != nil {
			return at(s, err)
		}
		s.Resolved.Made, s.Resolved.MadeNS = created, 0
		if created {
			p.made = append(p.made, v)
			s.Resolved.MadeNS = imageTime(v)
		}
		p.found[i] = v
		if err := volumeMade.Hit(); err != nil {
			return err
		}
	}
	return nil
}

// findVolumes finds the volumes of mode existing, some of which may just have
// been made for another mount.
func (p *provision) findVolumes(ctx context.Context) error {
	for i := range p.specs {
		s := &p.specs[i]
		if s.Kind != KindNamed || s.creates() {
			continue
		}
		v, err := p.volumes.Get(ctx, s.Source)
		if err != nil {
			return at(s, err)
		}
		p.found[i] = v
	}
	return nil
}

func (p *provision) findVolumesByID(ctx context.Context) error {
	for i := range p.specs {
		s := &p.specs[i]
		if s.Kind != KindNamed {
			continue
		}
		v, err := p.volumes.GetByID(ctx, s.Resolved.VolumeID)
		if errdefs.Is(err, errdefs.VolumeNotFound) {
			return goneError(s)
		}
		if err != nil {
			return at(s, err)
		}
		s.Source, p.found[i] = v.Name, v
	}
	return nil
}

// goneError says that the volume a sandbox was made with is gone, whether or
// not there is another of its name.
func goneError(s *Spec) error {
	return errdefs.New(errdefs.VolumeNotFound, "%s: volume %q was removed", s, s.Source).
		WithHint("a volume made later under this name is another volume; create the sandbox anew to use it")
}

// checkFound applies the rules that depend on what a name turned out to be.
func (p *provision) checkFound(context.Context) error {
	disks := map[string]bool{}
	for i := range p.specs {
		s, v := &p.specs[i], p.found[i]
		if v == nil {
			continue
		}
		if err := checkOptionsFor(s, v.Kind); err != nil {
			return err
		}
		if v.Kind == VolumeDisk && disks[v.ID] {
			return diskTwice(s)
		}
		disks[v.ID] = true
		s.Resolved.VolumeID, s.Resolved.VolumeKind = v.ID, v.Kind
	}
	return nil
}

// probe asks whether directories can hold what the policy needs, so that a
// launch fails here and not in the guest.
func (p *provision) probe(context.Context) error {
	for i := range p.specs {
		s := &p.specs[i]
		if !s.servesDirectory() {
			continue
		}
		if err := p.probeOne(s, p.found[i]); err != nil {
			return err
		}
	}
	return nil
}

func (p *provision) probeOne(s *Spec, v *volstore.Volume) error {
	var root *os.File
	var err error
	if v != nil {
		root, err = os.OpenFile(v.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	} else {
		root, err = openResolved(s, unix.O_PATH|unix.O_DIRECTORY)
	}
	if err != nil {
		return at(s, err)
	}
	defer root.Close()
	if err := fuseserver.Probe(int(root.Fd()), orDefault(s.StatVirt, StatStrict), s.Readonly); err != nil {
		return at(s, err)
	}
	return nil
}

// undoTimeout bounds taking volumes back: nobody waits for a failed launch.
const undoTimeout = 30 * time.Second

// undo takes back what this call made, once.
func (p *provision) undo(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	for _, v := range slices.Backward(p.made) {
		takeBack(ctx, p.volumes, v)
	}
	p.made = nil
}

// TakeBack does what the function returned by Provision does, for a launch
// whose process was killed: it removes the volumes that the launch made. Much
// time may have passed, so a disk volume stays if its image was written to at
// all. Resolved mounts of a sandbox that was ever running must not be given to
// it.
func TakeBack(ctx context.Context, st Volumes, resolved []Spec) {
	for _, s := range slices.Backward(resolved) {
		if !s.Resolved.Made {
			continue
		}
		v, err := st.GetByID(ctx, s.Resolved.VolumeID)
		intended := s.Resolved.MadeNS == 0 // killed before it could look
		if err == nil && (intended || imageTime(v) == s.Resolved.MadeNS) {
			takeBack(ctx, st, v)
		}
	}
}

// takeBack removes a volume that a failed launch made. One that is attached, or
// has files, belongs to somebody else by now and stays. There is nobody to tell
// about a failure: the launch's own error is what matters.
func takeBack(ctx context.Context, st Volumes, v *volstore.Volume) {
	if v.Kind == VolumeDir && !emptyDir(v.Path) {
		return
	}
	_ = st.RemoveID(ctx, v.ID)
}

// imageTime is when the image of a disk volume was last written to, in Unix
// nanoseconds; 0 for a directory volume.
func imageTime(v *volstore.Volume) int64 {
	fi, err := os.Lstat(v.DiskPath)
	if err != nil {
		return 0
	}
	return fi.ModTime().UnixNano()
}

func emptyDir(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	names, _ := f.Readdirnames(1)
	return len(names) == 0
}
