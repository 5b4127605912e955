package records

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// The reserve, in free pages. It is refilled to reserveFull below reserveLow;
// below reserveMin nothing is inserted, so that what is left serves removals.
const (
	reserveFull = 64
	reserveLow  = 32
	reserveMin  = 16
)

// insert is updateWhen for changes that need new pages: it keeps the reserve.
func (d *DB) insert(ctx context.Context, what string, when Condition, fn func(q querier) error) error {
	low := errors.New("the reserve is low")
	err := d.updateWhen(ctx, what, when, func(q querier) error {
		if n, err := freePages(q); err != nil || n < reserveLow {
			return cmp.Or(err, low)
		}
		return fn(q)
	})
	if !errors.Is(err, low) {
		return err
	}
	if err := d.refill(ctx, what); err != nil {
		return err
	}
	return d.updateWhen(ctx, what, when, fn)
}

// refill fills the reserve. It fails when a change could leave too little to
// removals.
func (d *DB) refill(ctx context.Context, what string) error {
	if err := d.take(ctx); err != nil {
		return d.wrap(err, what)
	}
	defer d.give()
	err := d.patiently(ctx, func() error { return d.keepReserve(reserveLow) })
	if err == nil {
		return nil
	}
	if n, err2 := freePages(session{d}); err2 == nil && n >= reserveMin {
		return nil // enough left for this one
	}
	return d.wrap(err, what)
}

func freePages(q querier) (n int, err error) {
	rows, err := q.query("PRAGMA freelist_count")
	err = each(rows, err, func(r *sql.Rows) error { return r.Scan(&n) })
	return n, err
}

// keepReserve refills the reserve when it has fallen below low. The caller has
// the turn and is outside a transaction.
//
// Pages become free by storing and removing a row that fills them, in two
// commits: the first makes the file system allocate them. In one commit SQLite
// would leave a hole, which reserves nothing.
func (d *DB) keepReserve(low int) error {
	n, err := freePages(session{d})
	if err != nil || n >= low {
		return err
	}
	filler := strings.Repeat("0", reserveFull*pageSize)
	err = d.transact(func(q querier) error {
		_, err := q.exec("INSERT INTO reserve (filler) VALUES ($1)", filler)
		return err
	})
	if err != nil {
		return err
	}
	return d.transact(func(q querier) error {
		_, err := q.exec("DELETE FROM reserve")
		return err
	})
}

// restoreJournal gives a journal that was deleted, or did not come along with a
// copy of the home, the size that it has in a new one. The lock for writing keeps
// every transaction away, and a journal that is hot has been played back by then.
func (d *DB) restoreJournal(ctx context.Context) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	defer d.give()
	return d.patiently(ctx, func() error {
		return d.transact(func(querier) error { return lengthenJournal(d.home) })
	})
}

func lengthenJournal(h home.Dir) error {
	path := h.DB() + journalSuffix
	f, err := home.OpenFile(path, unix.O_RDWR)
	isNew := errors.Is(err, fs.ErrNotExist)
	if isNew {
		f, err = home.OpenFile(path, unix.O_RDWR|unix.O_CREAT)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() >= journalSize {
		return err
	}
	if _, err = f.WriteAt(make([]byte, journalSize-fi.Size()), fi.Size()); err == nil {
		err = f.Sync()
	}
	if err != nil { // take nothing from a full disk
		return errors.Join(err, f.Truncate(fi.Size()))
	}
	if isNew {
		return syncDir(string(h))
	}
	return nil
}
