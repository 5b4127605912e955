package volstore

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/diskimg"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

// AdoptOptions of Adopt. With Kind "" a directory that holds disk.raw and
// nothing else is a disk volume, any other a directory volume.
type AdoptOptions struct {
	Kind     string
	QuotaMiB uint32 // directory volumes only
	Labels   map[string]string
}

// Adopt makes a volume of a stranger's directory volumes/NAME, as it is. If NAME
// is a volume whose directory was replaced (restored from a backup), the volume
// takes the directory that is there now; its other attributes stay.
//
// Errors: VolumeNotFound when there is no such directory; VolumeAlreadyExists
// when it is the volume's own; InvalidConfig; Cancelled; IO.
func (s *Store) Adopt(ctx context.Context, name string, opt AdoptOptions) (*Volume, error) {
	if err := ValidateName(name); err != nil {
		return nil, s.hintAtName(name, err)
	}
	if err := validateLabels(name, opt.Labels); err != nil {
		return nil, err
	}
	v, err := s.adopt(ctx, name, opt)
	return v, s.wrap("adopt", name, err)
}

func (s *Store) adopt(ctx context.Context, name string, opt AdoptOptions) (*Volume, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, err
	}
	defer done()
	lock, err := s.lockNames(ctx, name)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	found, err := s.settle(ctx, db, lock)
	if err != nil {
		return nil, err
	}
	if r := found.records[name]; r != nil {
		return s.readopt(ctx, db, r)
	}
	st, err := s.stageStranger(name, opt)
	if err != nil {
		return nil, err
	}
	defer st.drop()
	return s.publish(ctx, db, lock, st)
}

// stageStranger makes the staging directory of an adoption: without data, and
// with the identity of what lies at the name.
func (s *Store) stageStranger(name string, opt AdoptOptions) (_ *staging, err error) {
	dir, err := openDir(s.home.Volume(name), 0)
	if word := otherThanDir(s.home.Volume(name)); err != nil && word != "" {
		return nil, notDirectory(name, s.home.Volume(name), word)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, errdefs.New(errdefs.VolumeNotFound, "volume %q: there is no directory %s to adopt", name, s.home.Volume(name)).
			WithHint("put it there first; msb volume repair lists what can be adopted, msb volume create makes an empty volume")
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := adoptable(name, dir.Name()); err != nil {
		return nil, err
	}
	kind, capacity, fstype, err := look(dir, opt.Kind)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.InvalidConfig, err, "volume %q cannot be a disk volume", name).
			WithHint("as a directory volume it can be adopted with: msb volume adopt %s --kind dir", name)
	}
	sp := Spec{Name: name, Kind: KindDir, QuotaMiB: opt.QuotaMiB, Labels: opt.Labels}
	if kind == KindDisk && opt.QuotaMiB != 0 {
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q: a disk volume has no quota; its size is its limit", name)
	}
	st, err := s.newStaging(sp)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			st.drop()
		}
	}()
	st.adopt = true
	if kind == KindDisk {
		st.record.Kind, st.record.CapacityBytes = KindDisk, capacity
		st.record.DiskFormat, st.record.DiskFstype = "raw", fstype
	}
	if st.record.Identity, err = identityOf(dir); err != nil {
		return nil, err
	}
	st.seal(nil)
	return st, errors.Join(dir.Sync(), syncDir(s.home.Volumes()))
}

// adoptable refuses a directory that could never be removed or renamed: one that
// something is mounted on, or another user's.
func adoptable(name, path string) error {
	if err := noMounts(name, path); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	own := int(st.Uid) == os.Geteuid() // who may change its mode
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil && !own {
		return errdefs.Wrap(errdefs.InvalidConfig, err, "volume %q: %s belongs to user %d", name, path, st.Uid).
			WithHint("change its owner first (chown), or adopt it as that user or as root")
	}
	return nil
}

// look decides of what kind a directory is, and reads a disk's size and type.
func look(dir *os.File, asked string) (kind string, capacity int64, fstype string, err error) {
	image := filepath.Join(dir.Name(), home.DiskFile)
	names, err := dir.Readdirnames(2)
	only := err == nil && len(names) == 1 && names[0] == home.DiskFile
	if asked == KindDir || (asked == "" && !only) {
		return KindDir, 0, "", nil
	}
	f, _, err := diskimg.OpenRaw(image, true)
	if err != nil {
		return "", 0, "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", 0, "", err
	}
	magic := make([]byte, 2)
	if _, err := f.ReadAt(magic, 1024+56); err == nil && binary.LittleEndian.Uint16(magic) == 0xef53 {
		fstype = "ext4" // or an older one that the ext4 driver mounts
	}
	return KindDisk, fi.Size(), fstype, nil
}

// readopt gives a volume the directory that lies at its name.
func (s *Store) readopt(ctx context.Context, db *records.DB, r *records.Volume) (*Volume, error) {
	id, ok, err := identityAt(s.home.Volume(r.Name))
	if err != nil {
		return nil, err
	}
	if !ok {
		if word := otherThanDir(s.home.Volume(r.Name)); word != "" {
			return nil, notDirectory(r.Name, s.home.Volume(r.Name), word)
		}
		return nil, errdefs.New(errdefs.Filesystem, "volume %q: its data directory %s is missing", r.Name, s.home.Volume(r.Name)).
			WithHint("put a directory there first, or remove the volume")
	}
	if id.Same(r.Identity) {
		return nil, alreadyExists(r.Name)
	}
	if err := adoptable(r.Name, s.home.Volume(r.Name)); err != nil {
		return nil, err
	}
	held, err := s.lockUnattachedNamed(ctx, r)
	if err != nil {
		return nil, err
	}
	defer unlock(held)
	if err := s.forgetUse(r); err != nil {
		return nil, err
	}
	if err := db.SetVolumeIdentity(ctx, r.ID, r.Name, id); err != nil {
		return nil, err
	}
	r.Identity = id
	if _, err := s.ensureState(r); err != nil {
		return nil, err
	}
	return s.volume(r), nil
}

// forgetUse removes the ledger of a volume: it is of another directory. The next
// writer makes one and counts.
func (s *Store) forgetUse(r *records.Volume) error {
	if err := os.Remove(s.ledgerPath(r.ID)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return syncDir(s.home.State(r.ID))
}
