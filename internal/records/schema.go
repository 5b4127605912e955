package records

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

//go:embed migrations/*.sql
var migrations embed.FS

// schemaVersion is the number of the last migration, kept in SQLite's
// user_version: a start reads four bytes.
const schemaVersion = 2

var migrated = failpoint.New("records.migrated") // a migration is complete but not committed

// checkSchema compares the schema with the one that this program knows: equal
// passes, newer is refused, older is migrated. Where there is nothing to be undone
// the version is in the file, and need not be asked for in a transaction. It returns
// how the journal began.
func (d *DB) checkSchema(ctx context.Context) (journal journalHead, err error) {
	_, linked := d.link()
	journal, err = readHead(d.home.DB() + journalSuffix)
	if linked == nil && err == nil && journal.ended() && d.seen == schemaVersion {
		return journal, nil
	}
	return journal, d.askSchema(ctx)
}

func (d *DB) askSchema(ctx context.Context) error {
	have, err := d.version(ctx)
	if err != nil || have == schemaVersion {
		return err
	}
	if have > schemaVersion {
		return errdefs.New(errdefs.InvalidConfig, "the records in %s have schema %d, this program knows up to %d", d.home, have, schemaVersion).
			WithHint("use the msb that wrote them, or a newer one")
	}
	return d.bringUpToDate(ctx)
}

func (d *DB) version(ctx context.Context) (v int, err error) {
	err = d.view(ctx, "read the schema version", func(q querier) error {
		rows, err := q.query("PRAGMA user_version")
		return each(rows, err, func(r *sql.Rows) error { return r.Scan(&v) })
	})
	if d.sql == nil {
		return schemaVersion, err
	}
	return v, err
}

// bringUpToDate migrates an old schema. A handle for reading has another handle
// do it, or works on a private copy where the home is read-only.
func (d *DB) bringUpToDate(ctx context.Context) error {
	if d.writer {
		return d.migrateLocked(ctx)
	}
	w, err := Open(ctx, d.home)
	if err == nil {
		return w.Close()
	}
	if !isReadonly(err) {
		return err
	}
	if err := d.copyAside(); err != nil {
		return d.wrap(err, "copy the records aside")
	}
	return d.wrap(d.migrate(ctx), "migrate a copy of the records")
}

func (d *DB) migrateLocked(ctx context.Context) error {
	lock, err := lockHome(ctx, d.home)
	if err != nil {
		return d.wrap(err, "lock the home")
	}
	defer lock.Close()
	if have, err := d.version(ctx); err != nil || have == schemaVersion {
		return err // another process was faster
	}
	d.restoreNow(ctx) // a migration begins no transaction of ours
	if err := d.take(ctx); err != nil {
		return d.wrap(err, "migrate the records")
	}
	defer d.give()
	return d.wrap(d.migrate(ctx), "migrate the records")
}

func (d *DB) migrate(ctx context.Context) error {
	c, err := d.link()
	if err != nil {
		return err
	}
	return migrateDB(ctx, c)
}

// database is a *sql.DB or its only connection.
type database interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	BeginTx(ctx context.Context, opts *sql.TxOptions) (*sql.Tx, error)
}

// migrateDB runs the missing migrations, in the order of their file names. Each
// is one transaction, which its number in user_version is a part of.
func migrateDB(ctx context.Context, db database) error {
	ctx = context.WithoutCancel(ctx)
	var have int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&have); err != nil {
		return err
	}
	files, err := migrations.ReadDir("migrations")
	if err != nil {
		return err
	}
	for i, f := range files {
		if i < have {
			continue
		}
		text, err := migrations.ReadFile("migrations/" + f.Name())
		if err == nil {
			err = migrate(ctx, db, string(text), i+1)
		}
		if err != nil {
			return fmt.Errorf("migration %s: %w", f.Name(), err)
		}
	}
	return nil
}

func migrate(ctx context.Context, db database, text string, number int) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.Exec(text); err != nil {
		return err
	}
	if _, err := tx.Exec(fmt.Sprintf("PRAGMA user_version=%d", number)); err != nil {
		return err
	}
	if err := migrated.Hit(); err != nil {
		return err
	}
	return tx.Commit()
}

func isReadonly(err error) bool {
	switch sqliteCode(err) & 0xff {
	case codeReadonly, codeCantOpen:
		return true
	}
	return errorIsAny(err, unix.EROFS, unix.EACCES, unix.EPERM, os.ErrPermission)
}
