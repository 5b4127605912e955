package records

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"io/fs"
	"os"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

//go:embed migrations/*.sql
var migrations embed.FS

// schemaVersion is the number of the last migration, kept in SQLite's
// user_version so that a start needs to read four bytes and not goose's table.
const schemaVersion = 1

var migrated = failpoint.New("records.migrated") // schema changed, user_version not yet

// checkSchema compares the schema with the one that this program knows: equal
// passes, newer is refused, older is migrated.
func (d *DB) checkSchema(ctx context.Context) error {
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
	return d.wrap(migrateDB(ctx, d.sql), "migrate a copy of the records")
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
	if err := d.take(ctx); err != nil {
		return d.wrap(err, "migrate the records")
	}
	defer d.give()
	return d.wrap(migrateDB(ctx, d.sql), "migrate the records")
}

// migrateDB runs the missing migrations. Each is one transaction; a killed run
// is continued by the next start, because user_version is set last.
func migrateDB(ctx context.Context, db *sql.DB) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		return err
	}
	if _, err := p.Up(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	if err := migrated.Hit(); err != nil {
		return err
	}
	_, err = db.Exec(fmt.Sprintf("PRAGMA user_version=%d", schemaVersion))
	return err
}

func isReadonly(err error) bool {
	switch sqliteCode(err) & 0xff {
	case codeReadonly, codeCantOpen:
		return true
	}
	return errorIsAny(err, unix.EROFS, unix.EACCES, unix.EPERM, os.ErrPermission)
}
