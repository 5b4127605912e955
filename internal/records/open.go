package records

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// DB is an open record database. It is safe for concurrent use; calls of one
// handle run one after the other.
type DB struct {
	home home.Dir
	turn chan struct{} // holds one token; whoever has it uses sql and stmts

	queue changeQueue // of update

	owner      uint64     // of the files, for the VFS; 0: not connected
	seen       uint32     // the schema's version, in the file when it was connected
	committing []*change  // in the transaction that is being committed, before its changes are ready
	dropKept   bool       // when the transaction ends, nobody needs what its journal keeps
	carried    []KeptFile // of a transaction that was undone: for the next journal, until there is room; relative
	forget     string     // a kept file that is not wanted any more; relative

	sql    *sql.DB   // nil: there is no database, every read is empty
	conn   *sql.Conn // nil until needed
	stmts  map[string]*sql.Stmt
	writer bool
	copied string // private directory holding a copy of the database, or ""

	at, journalAt stamp // the files when the handle was opened, for Stale

	shut bool // Close was called
}

// Waiting for other processes: SQLite's own busy handler retries for a quarter
// of a second, then update and view look at ctx and try again.
const (
	busyTimeoutMS = "250"
	maxWait       = 30 * time.Second
)

// Open opens the records of a home for reading and writing. A home without a
// database gets a complete one; an old schema is migrated, a newer one refused
// untouched. A foreign home is refused.
func Open(ctx context.Context, h home.Dir) (*DB, error) {
	if err := h.Foreign(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(h.DB()); errors.Is(err, fs.ErrNotExist) {
		if err := h.Check(); err != nil {
			return nil, err
		}
		if err := makeHome(ctx, h); err != nil {
			return nil, h.Unusable(err)
		}
	}
	d := newDB(h)
	d.writer = true
	if err := d.connect(h.DB(), "rw"); err != nil {
		return nil, err
	}
	journal, err := d.checkSchema(ctx)
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	if journal.kept() != 0 {
		d.restoreNow(ctx)
	}
	if d.journalAt.size < journalSize {
		_ = d.restoreJournal(ctx) // else a later writer does, where there is room
	}
	return d, nil
}

// OpenReader opens the records for reading. It writes nothing and needs no
// space. Without a database every read is empty. See the package comment for a
// journal left by a killed writer.
func OpenReader(ctx context.Context, h home.Dir) (*DB, error) {
	d := newDB(h)
	if d.at == (stamp{}) {
		if _, err := os.Stat(h.DB()); errors.Is(err, fs.ErrNotExist) {
			return d, nil
		}
	}
	if err := d.connect(h.DB(), "ro"); err != nil {
		return nil, err
	}
	if _, err := d.checkSchema(ctx); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

func newDB(h home.Dir) *DB {
	d := &DB{home: h, turn: make(chan struct{}, 1), at: stampOf(h.DB()), journalAt: stampOf(h.DB() + journalSuffix)}
	d.turn <- struct{}{}
	return d
}

// irregular tells what is wrong with the home or lies in the place of the database
// or its journal, if something is: SQLite would wait for a pipe, and has one error
// for all of that.
func (d *DB) irregular() error {
	if err := d.home.Check(); err != nil {
		return err
	}
	for _, path := range []string{d.home.DB(), d.home.DB() + journalSuffix} {
		if err := home.CheckRegular(path); err != nil {
			return errdefs.Wrap(errdefs.IO, err, "the records in %s", d.home).
				WithHint("move %s away, and put a copy back if you have one", path)
		}
	}
	return nil
}

// connect replaces the connection. Nothing is read or locked yet.
func (d *DB) connect(path, mode string) error {
	d.disconnect()
	if !d.at.regular() || !d.journalAt.regular() {
		if err := d.irregular(); err != nil {
			return err
		}
	}
	if err := registerVFS(); err != nil {
		return d.wrap(err, "open")
	}
	q := "vfs=" + vfsName + "&" + ownerParam + "=" + own(d) + "&mode=" + mode + "&_txlock=immediate&_pragma=busy_timeout(" + busyTimeoutMS + ")"
	if mode == "rw" {
		q += "&_pragma=journal_mode(PERSIST)&_pragma=synchronous(FULL)&_pragma=journal_size_limit(-1)"
	}
	u := url.URL{Scheme: "file", Path: path, RawQuery: q}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return d.wrap(err, "open")
	}
	d.sql, d.stmts = db, map[string]*sql.Stmt{}
	return nil
}

func (d *DB) disconnect() {
	for _, s := range d.stmts {
		_ = s.Close()
	}
	if d.conn != nil {
		_ = d.conn.Close()
	}
	if d.sql != nil {
		_ = d.sql.Close()
	}
	d.sql, d.conn, d.stmts = nil, nil, nil
	disown(d)
}

// Close waits for the call in progress and releases the database. Later calls
// of other methods fail; a second Close does nothing.
func (d *DB) Close() error {
	<-d.turn
	defer d.give()
	if d.shut {
		return nil
	}
	d.shut = true
	d.disconnect()
	if d.copied != "" {
		return os.RemoveAll(d.copied)
	}
	return nil
}

// link returns the one connection. The caller has the turn.
func (d *DB) link() (*sql.Conn, error) {
	if d.conn != nil {
		return d.conn, nil
	}
	c, err := d.sql.Conn(context.Background())
	if err == nil {
		d.conn = c
	}
	return c, err
}

// stmt returns the prepared form of a statement. The caller has the turn.
func (d *DB) stmt(query string) (*sql.Stmt, error) {
	if s := d.stmts[query]; s != nil {
		return s, nil
	}
	c, err := d.link()
	if err != nil {
		return nil, err
	}
	s, err := c.PrepareContext(context.Background(), query)
	if err == nil {
		d.stmts[query] = s
	}
	return s, err
}

// take waits for the handle's turn.
func (d *DB) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-d.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	if d.shut {
		d.give()
		return errdefs.New(errdefs.InvalidHandle, "the records of %s are closed", d.home)
	}
	return nil
}

func (d *DB) give() { d.turn <- struct{}{} }
