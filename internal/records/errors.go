package records

import (
	"context"
	"errors"

	"modernc.org/sqlite"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Result codes of SQLite (sqlite.org/rescode.html).
const (
	codeBusy             = 5
	codeReadonly         = 8
	codeCorrupt          = 11
	codeFull             = 13
	codeCantOpen         = 14
	codeNotADB           = 26
	codeSync             = 1034 // SQLITE_IOERR_FSYNC
	codeConstraintPK     = 1555
	codeConstraintUnique = 2067
	// codeHotJournal is SQLITE_READONLY_ROLLBACK: a killed writer left a
	// journal that this connection may not roll back.
	codeHotJournal = 776
)

// sqliteCode returns the extended result code in err's chain, 0 if there is none.
func sqliteCode(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return 0
}

func isBusy(err error) bool { return sqliteCode(err)&0xff == codeBusy }

// isUnique reports whether err is a violated UNIQUE or PRIMARY KEY constraint,
// on SQLite or (by SQLSTATE, so that the driver need not be imported) PostgreSQL.
func isUnique(err error) bool {
	switch sqliteCode(err) {
	case codeConstraintPK, codeConstraintUnique:
		return true
	}
	var pg interface{ SQLState() string }
	return errors.As(err, &pg) && pg.SQLState() == "23505"
}

// wrap turns an error of the database into the error of this package; what
// says what was being done. Errors that are typed already pass unchanged.
func (d *DB) wrap(err error, what string) error {
	var typed *errdefs.Error
	if err == nil || errors.As(err, &typed) {
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return errdefs.Wrap(errdefs.Cancelled, err, "%s", what)
	}
	switch sqliteCode(err) & 0xff {
	case codeFull:
		return errdefs.Wrap(errdefs.IO, err, "%s: no space left for the records in %s", what, d.home).
			WithHint("free some space, for example with: msb volume rm NAME")
	case codeReadonly, codeCantOpen:
		if wrong := d.irregular(); wrong != nil {
			return wrong
		}
		return errdefs.Wrap(errdefs.IO, err, "%s: the home %s is not writable", what, d.home).
			WithHint("set MSB_HOME to a directory that you may write to")
	case codeCorrupt, codeNotADB:
		return errdefs.Wrap(errdefs.IO, err, "%s: the records in %s are damaged", what, d.home).
			WithHint("put a copy of %s back, or move it away: directories of volumes can be adopted then, see msb volume repair", d.home.DB())
	case codeBusy:
		return errdefs.Wrap(errdefs.IO, err, "%s: the records in %s are locked by another process", what, d.home)
	}
	return errdefs.Wrap(errdefs.IO, err, "%s: records in %s", what, d.home)
}
