package volstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// AttachMode says with whom a volume may be shared.
type AttachMode uint8

// The modes.
const (
	Shared    AttachMode = iota // any number of holders
	Exclusive                   // one holder
)

// Holder describes who has a volume attached.
type Holder struct {
	Sandbox  string    `json:"sandbox"`
	PID      int       `json:"pid"`
	Readonly bool      `json:"readonly"`
	Cache    string    `json:"cache,omitempty"` // cache mode of a directory volume that is held alone for it
	Since    time.Time `json:"since"`
	Task     string    `json:"task,omitempty"` // taskResize of who makes an image longer
}

const taskResize = "resize"

// String is the holder for messages.
func (h Holder) String() string {
	how := "read-write"
	if h.Readonly {
		how = "read-only"
	}
	if h.Cache != "" {
		how += ", cache=" + h.Cache
	}
	if h.Sandbox == "" {
		return fmt.Sprintf("process %d (%s)", h.PID, how)
	}
	return fmt.Sprintf("sandbox %q (%s)", h.Sandbox, how)
}

// Attachment is a volume held by one sandbox. It is held until Close, and as
// long as a process lives that inherited it.
type Attachment struct {
	Volume Volume
	Disk   *os.File // image of a disk volume with QEMU's image locks, nil for a directory

	lock  *os.File
	heirs bool   // lock was given away
	clean string // path of the clean mark that was taken away; "" for directories and readers
	after func() // counts a directory volume whose writer was killed; nil for disks and readers
}

// Inherit returns the file that the process which serves the volume is to
// inherit, beside Disk: the attachment then lasts until its end.
func (a *Attachment) Inherit() *os.File {
	a.heirs = true
	return a.lock
}

// Close gives up this process's part of the attachment.
func (a *Attachment) Close() error {
	var err error
	for _, f := range []*os.File{a.Disk, a.lock} {
		if f == nil {
			continue
		}
		if !a.heirs {
			release(f)
		}
		err = errors.Join(err, f.Close())
	}
	a.Disk, a.lock = nil, nil
	if a.after != nil {
		a.after()
		a.after = nil
	}
	return err
}

// Attach takes the attach lock of the volume with this name, then reads its
// record again, so that it cannot race a removal. h.Since is set to now.
//
// A disk volume that may be written is checked first if its last holder did not
// end cleanly; see SetChecker and Attachment.MarkClean.
//
// Errors: VolumeNotFound; InvalidConfig with the cause ErrVolumeInUse, naming
// the holders; Filesystem when the image is damaged beyond repair; Cancelled; IO.
func (s *Store) Attach(ctx context.Context, name string, mode AttachMode, h Holder) (*Attachment, error) {
	v, err := s.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	return s.AttachID(ctx, v.ID, mode, h)
}

// AttachID is Attach for the volume with this id and no successor of its name.
func (s *Store) AttachID(ctx context.Context, id string, mode AttachMode, h Holder) (*Attachment, error) {
	v, err := s.GetByID(ctx, id)
	if err != nil {
		return nil, err
	}
	a, err := s.attach(ctx, v, mode, h)
	return a, s.wrap("attach", v.Name, err)
}

// attach is hold for a user of the volume: an image it may write is checked
// first, if need be.
func (s *Store) attach(ctx context.Context, v *Volume, mode AttachMode, h Holder) (*Attachment, error) {
	a, err := s.hold(ctx, v, mode, h)
	if err != nil || a.Disk == nil || h.Readonly {
		return a, err
	}
	if err := s.prepareImage(ctx, a); err != nil {
		_ = a.Close()
		return nil, err
	}
	return a, nil
}

// hold takes the attach lock and that of an image, and notes the holder.
func (s *Store) hold(ctx context.Context, v *Volume, mode AttachMode, h Holder) (_ *Attachment, err error) {
	lock, err := s.openAttach(ctx, v)
	if err != nil {
		return nil, err
	}
	a := &Attachment{lock: lock}
	defer func() {
		if err != nil {
			_ = a.Close()
		}
	}()
	how := unix.LOCK_SH
	if mode == Exclusive {
		how = unix.LOCK_EX
	}
	if err := s.tryAttachLock(ctx, lock, how, v.Name); err != nil {
		return nil, hintCache(err, v.Kind, mode)
	}
	now, err := s.GetByID(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	a.Volume = *now
	if now.Kind == KindDisk {
		a.Disk, err = openImage(ctx, lock, now.DiskPath, h.Readonly)
		if holders, _ := readHolders(lock); errors.Is(err, errdefs.ErrVolumeInUse) && len(holders) > 0 {
			err = inUse(now.Name, holders)
		}
		if err == nil {
			err = s.noteLength(ctx, a)
		}
		if err != nil {
			return nil, err
		}
	}
	if now.Kind == KindDir && !h.Readonly {
		a.after = func() { s.countUnsettled(now) }
	}
	h.Since = time.Now().UTC()
	writeHolder(lock, h)
	return a, nil
}

// openAttach opens the attach file, which the first attachment makes; a state
// directory lost in a power cut is made anew first.
func (s *Store) openAttach(ctx context.Context, v *Volume) (*os.File, error) {
	path := filepath.Join(s.home.State(v.ID), attachName)
	f, err := openFile(path, unix.O_RDWR)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	// With the name locked: see lockUnattachedNamed.
	err = s.settledByID(ctx, &v.Volume, func() error { return touch(path) })
	if err != nil {
		return nil, err
	}
	f, err = openFile(path, unix.O_RDWR)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, records.VolumeNotFound(v.Name) // removed since
	}
	return f, err
}

// settleByID settles the name of a volume. Errors: VolumeNotFound.
func (s *Store) settleByID(ctx context.Context, r *records.Volume) error {
	return s.settledByID(ctx, r, func() error { return nil })
}

// settledByID settles the name of a volume and does something while it is locked.
func (s *Store) settledByID(ctx context.Context, r *records.Volume, then func() error) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	lock, _, _, err := s.lockVolume(ctx, db, r)
	if err != nil {
		return err
	}
	defer lock.unlock()
	return then()
}

// Waiting for an attachment to end. attachPatience is for a lock whose holder is
// not known: an attachment in the making, or a removal that may yet give up.
// orphanPatience is for one whose holder has ended: what it left behind, killed
// with it, is still being taken down.
const (
	attachPatience = time.Second
	orphanPatience = 5 * time.Second
)

// tryAttachLock takes the attach lock in the given way. It does not wait for a
// holder that is alive.
func (s *Store) tryAttachLock(ctx context.Context, f *os.File, how int, name string) error {
	return poll(ctx, 20*time.Millisecond, func(waited time.Duration) (bool, error) {
		ok, err := tryFlock(f, how)
		if ok || err != nil {
			return true, err
		}
		holders, err := readHolders(f)
		if err != nil {
			return true, err
		}
		if linkCount(f) == 0 {
			return true, records.VolumeNotFound(name)
		}
		patience := attachPatience
		if len(holders) > 0 {
			patience = orphanPatience
		}
		if slices.ContainsFunc(holders, Holder.alive) || waited > patience {
			return true, inUse(name, holders)
		}
		return false, nil
	})
}

// openImage opens the image of a volume whose attach lock is held. A process that
// is being taken down gives up the two locks one after the other.
func openImage(ctx context.Context, lock *os.File, path string, readonly bool) (image *os.File, err error) {
	err = poll(ctx, 20*time.Millisecond, func(waited time.Duration) (bool, error) {
		f, _, err := diskimg.OpenRaw(path, readonly)
		if !errors.Is(err, errdefs.ErrVolumeInUse) {
			image = f
			return true, err
		}
		holders, readErr := readHolders(lock)
		return readErr != nil || slices.ContainsFunc(holders, Holder.alive) || waited > attachPatience, err
	})
	return image, err
}

// alive reports whether the process that attached the volume is there. One of
// another PID namespace seems not to be: it costs a wait.
func (h Holder) alive() bool {
	return h.PID <= 0 || !errors.Is(unix.Kill(h.PID, 0), unix.ESRCH)
}

// linkCount returns how many names an open file has.
func linkCount(f *os.File) uint64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 1 // it was open
	}
	return uint64(st.Nlink)
}

// Holders lists who has the volume with this id attached.
func (s *Store) Holders(ctx context.Context, id string) ([]Holder, error) {
	f, err := openFile(filepath.Join(s.home.State(id), attachName), unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		if !exists(filepath.Join(s.home.State(id), aliveName)) { // removed, perhaps
			_, err = s.GetByID(ctx, id)
			return nil, err
		}
		return nil, nil
	}
	if err != nil {
		return nil, s.wrap("inspect", id, err)
	}
	defer f.Close()
	hs, err := readHolders(f)
	return hs, s.wrap("inspect", id, err)
}

// The attach file holds one record of holderSize bytes per holder. Beside the
// flock on the file, a holder has an OFD lock on byte i, through the same open
// file: both go where the descriptor is inherited and both end with its last
// holder. A record counts only while its byte is locked.
const (
	holderSize = 512
	maxHolders = 4096
)

// writeHolder notes the holder in the first free slot. An attachment without a
// note (full disk) is as good a lock, only nameless.
func writeHolder(f *os.File, h Holder) {
	b, err := json.Marshal(h)
	if err != nil || len(b) >= holderSize {
		return
	}
	record := append(b, bytes.Repeat([]byte{'\n'}, holderSize-len(b))...)
	for i := range int64(maxHolders) {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: i, Len: 1}
		if unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk) == nil {
			_, _ = f.WriteAt(record, i*holderSize)
			return
		}
	}
}

func readHolders(f *os.File) ([]Holder, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var out []Holder
	buf := make([]byte, holderSize)
	for i := range min(fi.Size()/holderSize, maxHolders) {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: i, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
			return nil, err
		}
		if lk.Type == unix.F_UNLCK {
			continue
		}
		if _, err := f.ReadAt(buf, i*holderSize); err != nil {
			return nil, err
		}
		var h Holder
		if json.Unmarshal(buf, &h) == nil {
			out = append(out, h)
		}
	}
	return out, nil
}
