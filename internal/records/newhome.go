package records

import (
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// ready.db is an empty database after all migrations and VACUUM. It is written
// by: go test ./internal/records -run TestReadyDatabase -update
//
//go:embed ready.db
var readyDB []byte

const (
	pageSize    = 4096
	journalSize = 1 << 20 // bytes; larger than any transaction here
)

var (
	homeJournal = failpoint.New("records.home.journal") // journal is durable
	homeWritten = failpoint.New("records.home.written") // database is durable under its temporary name
	homeLinked  = failpoint.New("records.home.linked")  // database has its name
)

// makeHome makes the directories, the journal and a finished database. It is
// safe against other processes doing the same, and against being killed: until
// the link there is no database, after it a complete one.
func makeHome(ctx context.Context, h home.Dir) error {
	if err := mkdirSynced(string(h)); err != nil {
		return err
	}
	lock, err := lockHome(ctx, h)
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(h.DB()); err == nil {
		return nil // another process was faster
	}
	if err := h.Ensure(); err != nil {
		return err
	}
	if err := syncDir(h.Volumes()); err != nil {
		return err
	}
	// A journal without a database belongs to a deleted one: never play it back.
	if err := writeSynced(h.DB()+journalSuffix, make([]byte, journalSize)); err != nil {
		return err
	}
	if err := homeJournal.Hit(); err != nil {
		return err
	}
	return linkDatabase(h)
}

// linkDatabase writes the database under a temporary name, closes it (closing
// it later would drop the locks of whoever opened it by then), and links it.
func linkDatabase(h home.Dir) error {
	tmp := h.DB() + ".new"
	if err := writeSynced(tmp, withReserve(readyDB, reserveFull)); err != nil {
		return err
	}
	if err := homeWritten.Hit(); err != nil {
		return err
	}
	if err := os.Link(tmp, h.DB()); err != nil {
		return err
	}
	if err := homeLinked.Hit(); err != nil {
		return err
	}
	return errors.Join(os.Remove(tmp), syncDir(string(h)))
}

// withReserve appends n free pages to a database without any (SQLite file
// format, 1.5 "The Freelist"): one trunk page naming n-1 leaf pages.
func withReserve(db []byte, n int) []byte {
	pages := len(db) / pageSize
	out := make([]byte, (pages+n)*pageSize)
	copy(out, db)
	binary.BigEndian.PutUint32(out[28:], uint32(pages+n)) // size in pages
	binary.BigEndian.PutUint32(out[32:], uint32(pages+1)) // first trunk page
	binary.BigEndian.PutUint32(out[36:], uint32(n))       // number of free pages
	trunk := out[pages*pageSize:]
	binary.BigEndian.PutUint32(trunk[4:], uint32(n-1))
	for i := range n - 1 {
		binary.BigEndian.PutUint32(trunk[8+4*i:], uint32(pages+2+i))
	}
	return out
}

// lockHome takes the lock that serializes making and migrating a home: a flock
// on its directory, which ends with the process. Closing the file frees it.
func lockHome(ctx context.Context, h home.Dir) (*os.File, error) {
	f, err := os.OpenFile(string(h), unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errorIsAny(err, unix.EWOULDBLOCK, unix.EINTR) {
			_ = f.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// mkdirSynced makes a directory (0700) and its parents; each new name is durable.
func mkdirSynced(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) && filepath.Dir(path) != path {
		if err := mkdirSynced(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeSynced(path string, data []byte) error {
	f, err := home.OpenFile(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(path string) error {
	f, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func errorIsAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}
