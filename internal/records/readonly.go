package records

import (
	"context"
	"database/sql"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// heal deals with a journal that a killed writer left (see the package
// comment). The caller has the turn.
func (d *DB) heal(ctx context.Context) error {
	if d.writer {
		return errors.New("a journal of a killed writer cannot be rolled back: the home is read-only")
	}
	w := newDB(d.home)
	defer w.Close()
	if err := w.connect(d.home.DB(), "rw"); err != nil {
		return err
	}
	err := d.patiently(ctx, func() error {
		rows, err := session{w}.query("PRAGMA user_version")
		return each(rows, err, func(*sql.Rows) error { return nil })
	})
	if err == nil || !isReadonly(err) {
		return err
	}
	w.disconnect()
	return d.copyAside()
}

// SQLite's lock bytes (sqlite.org/fileformat2.html, "The Lock-Byte Page").
const (
	lockPending = 0x40000000
	lockShared  = lockPending + 2
	lockLen     = 510
)

// copyAside copies database and journal to a private directory and connects to
// the copy, which SQLite rolls back at the first read. A shared lock keeps
// writers that reach the files by another mount from changing them meanwhile;
// closing our descriptor cannot drop a lock of this process that matters,
// since nobody can write here.
func (d *DB) copyAside() error {
	d.disconnect()
	if err := d.irregular(); err != nil {
		return err
	}
	src, err := os.Open(d.home.DB())
	if err != nil {
		return err
	}
	defer src.Close()
	lk := unix.Flock_t{Type: unix.F_RDLCK, Start: lockShared, Len: lockLen}
	if err := unix.FcntlFlock(src.Fd(), unix.F_OFD_SETLK, &lk); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	dir, err := privateDir()
	if err != nil {
		return err
	}
	d.copied = dir
	to := filepath.Join(dir, filepath.Base(d.home.DB()))
	if err := copyTo(to, src); err != nil {
		return err
	}
	journal, err := os.Open(d.home.DB() + journalSuffix)
	if err == nil {
		defer journal.Close()
		err = copyTo(to+journalSuffix, journal)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return d.connect(to, "rw")
}

// privateDir makes a temporary directory, in memory when the temporary file
// system cannot take one.
func privateDir() (string, error) {
	dir, err := os.MkdirTemp("", "msb-records-")
	if err != nil {
		if shm, err2 := os.MkdirTemp("/dev/shm", "msb-records-"); err2 == nil {
			return shm, nil
		}
	}
	return dir, err
}

func copyTo(path string, src io.Reader) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, src)
	return errors.Join(err, f.Close())
}

// stamp is what can be seen of a file without opening it.
type stamp struct {
	dev, ino uint64
	size     int64
	mtime    unix.Timespec
	mode     uint32
}

// regular tells that it was a file.
func (s stamp) regular() bool { return s.mode&unix.S_IFMT == unix.S_IFREG }

func stampOf(path string) stamp {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return stamp{}
	}
	return stamp{st.Dev, st.Ino, st.Size, st.Mtim, st.Mode}
}

// Stale reports whether the handle no longer shows the home's records: the
// database appeared, went or was replaced, or a private copy is out of date.
// It costs one stat (three for a copy).
func (d *DB) Stale() bool {
	now := stampOf(d.home.DB())
	if d.copied != "" {
		return now != d.at || stampOf(d.home.DB()+journalSuffix) != d.journalAt
	}
	return now.dev != d.at.dev || now.ino != d.at.ino
}
