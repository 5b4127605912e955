package mount

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/fileserver"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
)

var (
	attached = failpoint.New("mount.attached")
	planned  = failpoint.New("mount.planned")
)

// Attacher is what opening a plan needs of the volume store.
type Attacher interface {
	AttachID(ctx context.Context, id string, mode volstore.AttachMode, holder volstore.Holder) (*volstore.Attachment, error)
	OpenLedger(ctx context.Context, id string) (*os.File, error)
	OpenBindLedger(ctx context.Context, dir *os.File, quotaMiB uint32) (*os.File, error)
}

// OpenOptions describe the sandbox a plan is for.
type OpenOptions struct {
	Sandbox  string // name, shown to who wants an attached volume
	PID      int    // of the supervisor
	GuestUID uint32 // owner of the host's files as the guest sees them
	GuestGID uint32
}

// Plan is the mounts of one sandbox, open and locked. Its files are to be handed
// to the machine and the file server; Close may be called once both have them,
// and must be called in any case.
type Plan struct {
	Disks  []vmm.Disk         // virtio-blk devices of disk volumes and images
	Shares []fileserver.Share // directories to serve, one device each
	Guest  []agentproto.Mount // calls for the agent, parents first

	// DiskLocks and ShareLocks are the attachments' lock files, for QEMU and
	// the file server to inherit. Locks of images are on Disks' files.
	DiskLocks, ShareLocks []*os.File

	// Ledgers are what the shares charge to, in their order; nil where nothing is
	// counted. A ledger belongs to who has it open: the file server must be the
	// only one once it runs, see CloseLedgers.
	Ledgers []*os.File

	closers []io.Closer // in order of acquisition
}

// CloseLedgers closes the plan's own descriptors of the ledgers. It is idempotent.
func (p *Plan) CloseLedgers() {
	for _, f := range p.Ledgers {
		if f != nil {
			_ = f.Close()
		}
	}
	p.Ledgers = nil
}

// MarkClean notes that the guest has unmounted everything and ended: disk
// volumes need no check before they are attached again. Call it when the machine
// is gone, before Close.
func (p *Plan) MarkClean() error {
	var errs []error
	for _, c := range p.closers {
		if a, ok := c.(*volstore.Attachment); ok {
			errs = append(errs, a.MarkClean())
		}
	}
	return errors.Join(errs...)
}

// Close gives everything back that was not inherited. It is idempotent.
func (p *Plan) Close() error {
	var errs []error
	p.CloseLedgers()
	for _, c := range slices.Backward(p.closers) {
		errs = append(errs, c.Close())
	}
	p.closers = nil
	return errors.Join(errs...)
}

// Open attaches the volumes and opens the images of resolved mounts. After an
// error nothing is held.
//
// Errors: kind [errdefs.VolumeNotFound] when a volume was removed since, even if
// another has its name; [errdefs.InvalidConfig] with cause
// [errdefs.ErrVolumeInUse] when a disk volume or image has another user.
func Open(ctx context.Context, st Attacher, resolved []Spec, o OpenOptions) (plan *Plan, err error) {
	b := &planner{store: st, options: o, plan: &Plan{}, held: map[string]*volstore.Attachment{}, tags: tagger{}}
	defer func() {
		if err != nil {
			_ = b.plan.Close()
		}
	}()
	specs := parentsFirst(resolved)
	b.writers = writers(specs)
	for i := range specs {
		if err := b.add(ctx, &specs[i]); err != nil {
			return nil, err
		}
	}
	if err := planned.Hit(); err != nil {
		return nil, err
	}
	return b.plan, nil
}

// writers says which volume ids have a mount that is not read-only.
func writers(specs []Spec) map[string]bool {
	out := map[string]bool{}
	for _, s := range specs {
		if s.Kind == KindNamed && !s.Readonly {
			out[s.Resolved.VolumeID] = true
		}
	}
	return out
}

// planner builds one plan.
type planner struct {
	store   Attacher
	options OpenOptions
	plan    *Plan
	held    map[string]*volstore.Attachment // by volume id
	writers map[string]bool
	tags    tagger
}

func (b *planner) add(ctx context.Context, s *Spec) error {
	switch s.Kind {
	case KindBind:
		return b.addBind(ctx, s)
	case KindNamed:
		return b.addNamed(ctx, s)
	case KindTmpfs:
		b.addGuest(s, agentproto.Mount{Kind: "tmpfs", Size: int64(s.SizeMiB) << 20})
		return nil
	case KindDisk:
		return b.addImage(s)
	}
	return invalid(s, "unknown kind %q", s.Kind)
}

// addGuest adds the agent's call; m has what the kind brings.
func (b *planner) addGuest(s *Spec, m agentproto.Mount) {
	m.Guest = s.Guest
	m.Readonly, m.Noexec, m.Nosuid, m.Nodev = s.Readonly, s.Noexec, s.Nosuid, s.Nodev
	b.plan.Guest = append(b.plan.Guest, m)
}

func (b *planner) addBind(ctx context.Context, s *Spec) error {
	f, err := openResolved(s, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer f.Close()
	var book *os.File
	if s.QuotaMiB != 0 && !s.Readonly {
		if book, err = b.store.OpenBindLedger(ctx, f, s.QuotaMiB); err != nil {
			return at(s, err)
		}
	}
	b.addShare(s, s.Source, identity{s.Resolved.Dev, s.Resolved.Ino}, book)
	return nil
}

// addShare adds a directory. The file server opens it by path and demands the
// same identity: descriptors do not survive the change of its root. book is the
// ledger that what the guest changes there is charged to, nil for none.
func (b *planner) addShare(s *Spec, dir string, id identity, book *os.File) {
	tag := b.tags.tag(s.Guest)
	b.plan.Shares = append(b.plan.Shares, fileserver.Share{
		Tag:       tag,
		Path:      dir,
		Dev:       id.dev,
		Ino:       id.ino,
		Readonly:  s.Readonly,
		StatVirt:  orDefault(s.StatVirt, StatStrict),
		HostPerms: orDefault(s.HostPerms, PermsPrivate),
		Cache:     orDefault(s.Cache, CacheAuto),
		GuestUID:  b.options.GuestUID,
		GuestGID:  b.options.GuestGID,
		Queues:    1,
	})
	b.plan.Ledgers = append(b.plan.Ledgers, book)
	b.addGuest(s, agentproto.Mount{Kind: "virtiofs", Source: tag})
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

func (b *planner) addNamed(ctx context.Context, s *Spec) error {
	a, err := b.attach(ctx, s)
	if err != nil {
		return err
	}
	if a.Volume.Kind == VolumeDisk {
		// Only a volume grows: somebody else's image keeps its file system.
		b.addDisk(s, a.Disk, agentproto.Mount{Fstype: a.Volume.DiskFstype, Grow: !s.Readonly})
		return nil
	}
	var st unix.Stat_t
	if err := unix.Lstat(a.Volume.Path, &st); err != nil {
		return hostError(s, a.Volume.Path, err)
	}
	book, err := b.openLedger(ctx, s)
	if err != nil {
		return err
	}
	b.addShare(s, a.Volume.Path, identityOf(&st), book)
	return nil
}

// openLedger opens the ledger of a volume for one mount of it, nil for one that
// changes nothing.
func (b *planner) openLedger(ctx context.Context, s *Spec) (*os.File, error) {
	if s.Readonly {
		return nil, nil
	}
	f, err := b.store.OpenLedger(ctx, s.Resolved.VolumeID)
	if err != nil {
		return nil, at(s, err)
	}
	return f, nil
}

// attach holds the volume of a named mount, once for all mounts of it.
func (b *planner) attach(ctx context.Context, s *Spec) (*volstore.Attachment, error) {
	if a := b.held[s.Resolved.VolumeID]; a != nil {
		return a, nil
	}
	mode, readonly := volstore.Shared, !b.writers[s.Resolved.VolumeID]
	holder := volstore.Holder{Sandbox: b.options.Sandbox, PID: b.options.PID, Readonly: readonly}
	if s.Resolved.VolumeKind == VolumeDisk && !readonly {
		mode = volstore.Exclusive
	}
	if s.Cache == CacheAlways { // what others wrote, or will read, passes that cache by
		mode, holder.Cache = volstore.Exclusive, s.Cache
	}
	a, err := b.store.AttachID(ctx, s.Resolved.VolumeID, mode, holder)
	if errdefs.Is(err, errdefs.VolumeNotFound) {
		return nil, goneError(s)
	}
	if err != nil {
		return nil, at(s, err)
	}
	b.plan.closers = append(b.plan.closers, a)
	if a.Volume.ID != s.Resolved.VolumeID || a.Volume.Kind != s.Resolved.VolumeKind {
		return nil, goneError(s)
	}
	b.held[a.Volume.ID] = a
	if a.Volume.Kind == VolumeDisk {
		b.plan.DiskLocks = append(b.plan.DiskLocks, a.Inherit())
	} else {
		b.plan.ShareLocks = append(b.plan.ShareLocks, a.Inherit())
	}
	return a, attached.Hit()
}

// addDisk adds an image; m says how the guest mounts it.
func (b *planner) addDisk(s *Spec, f *os.File, m agentproto.Mount) {
	tag := b.tags.tag(s.Guest)
	b.plan.Disks = append(b.plan.Disks, vmm.Disk{Serial: tag, File: f, Readonly: s.Readonly, Format: FormatRaw})
	m.Kind, m.Source = "disk", tag
	b.addGuest(s, m)
}

// addImage opens a raw image with its lock. The format is never probed: bytes
// that look like another format stay bytes.
func (b *planner) addImage(s *Spec) error {
	f, id, err := diskimg.OpenRaw(s.Source, s.Readonly)
	if err != nil {
		return at(s, err)
	}
	b.plan.closers = append(b.plan.closers, f)
	if err := sameObject(s, identity{id.Dev, id.Ino}); err != nil {
		return err
	}
	b.addDisk(s, f, agentproto.Mount{Fstype: s.Fstype})
	return nil
}
