package volstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/records"
)

var pointQuota = failpoint.New("volstore.quota.recorded") // the record has the new quota, the ledger not yet

// MaxInodes is the highest limit of inodes that can be set.
const MaxInodes = 1 << 40

// limitsNote is the content of the file limits. It is the host's alone: a file
// server gets the ledger, which has a copy.
type limitsNote struct {
	Version int   `json:"version"` // 1
	Inodes  int64 `json:"inodes"`
}

// writeLimits writes down a limit of inodes, durably but for the name; 0 means the
// default, for which there is no file.
func writeLimits(dir string, inodes int64) error {
	path := filepath.Join(dir, limitsName)
	if inodes == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(limitsNote{Version: 1, Inodes: inodes})
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return os.Rename(tmp, path)
}

// ownInodes is a volume's own limit of inodes; 0: it has none.
func (s *Store) ownInodes(id string) (int64, error) {
	path := filepath.Join(s.home.State(id), limitsName)
	b, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var n limitsNote
	if err := json.Unmarshal(b, &n); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	if n.Version != 1 || n.Inodes < 0 || n.Inodes > MaxInodes {
		return 0, fmt.Errorf("%s: version %d, inodes %d", path, n.Version, n.Inodes)
	}
	return n.Inodes, nil
}

// readSmall reads a small file that this package wrote: what else may lie there is
// not waited for, and neither followed nor read without end.
func readSmall(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const longest = 64 << 10 // a path, and some numbers
	return io.ReadAll(io.LimitReader(f, longest))
}

// limits are what the record and the file limits say.
func (s *Store) limits(v *Volume) (ledger.Limits, error) {
	own, err := s.ownInodes(v.ID)
	if err != nil {
		err = errdefs.Wrap(errdefs.Filesystem, err, "volume %q: its limit of files is not known", v.Name).
			WithHint("set it again: msb volume set-quota %s --inodes N", v.Name)
	}
	return limitsOf(v.QuotaMiB, own), err
}

// Quota is what SetQuota changes; nil leaves a limit as it is.
type Quota struct {
	MiB    *uint32 // 0: none
	Inodes *int64  // 0: the default, which goes with the quota
}

// SetQuota changes the limits of the directory volume with this id, attached or
// not; its writers know them within a second. Below the present use they refuse
// growth and nothing else. After a crash each of the two is the old limit or the
// new one.
//
// Errors: VolumeNotFound, InvalidConfig, Cancelled, IO.
func (s *Store) SetQuota(ctx context.Context, id string, q Quota) (*Volume, error) {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return nil, s.wrap("limit", id, err)
	}
	defer done()
	r, err := db.VolumeByID(ctx, id)
	if err != nil {
		return nil, s.wrap("limit", id, err)
	}
	v, err := s.setQuota(ctx, db, r, q)
	return v, s.wrap("limit", r.Name, err)
}

func (s *Store) setQuota(ctx context.Context, db *records.DB, r *records.Volume, q Quota) (*Volume, error) {
	if r.Kind != KindDir {
		return nil, errdefs.New(errdefs.InvalidConfig, "volume %q is a disk volume: its size is its limit", r.Name).
			WithHint("msb volume resize %s --size SIZE makes it larger", r.Name)
	}
	if q.Inodes != nil {
		if err := validateInodes(r.Name, *q.Inodes); err != nil {
			return nil, err
		}
	}
	lock, r, _, err := s.lockVolume(ctx, db, r)
	if err != nil {
		return nil, err
	}
	defer lock.unlock()
	if q.Inodes != nil {
		dir := s.home.State(r.ID)
		if err := errors.Join(writeLimits(dir, *q.Inodes), syncDir(dir)); err != nil {
			return nil, err
		}
	}
	if q.MiB != nil && *q.MiB != r.QuotaMiB {
		if err := db.SetVolumeQuota(ctx, r.ID, r.Name, *q.MiB); err != nil {
			return nil, err
		}
		r.QuotaMiB = *q.MiB
	}
	if err := pointQuota.Hit(); err != nil {
		return nil, err
	}
	_, _ = s.ensureState(r) // the next command does it otherwise
	v := s.volume(r)
	f, err := s.openLedger(v) // sets the limits
	if err != nil {
		return nil, err
	}
	return v, f.Close()
}

func validateInodes(name string, n int64) error {
	if n < 0 || n > MaxInodes {
		return errdefs.New(errdefs.InvalidConfig, "volume %q: a limit of %d files, want 1 to %d", name, n, int64(MaxInodes))
	}
	return nil
}
