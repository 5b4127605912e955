package records

import (
	"context"
	"database/sql"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

var begun = failpoint.New("records.begun") // a change is complete but not committed

// view runs a read. fn is not called when there is no database; it may be
// called again after another process was in the way.
func (d *DB) view(ctx context.Context, what string, fn func(q querier) error) error {
	if err := d.take(ctx); err != nil {
		return d.wrap(err, what)
	}
	defer d.give()
	if d.sql == nil {
		return nil
	}
	err := d.patiently(ctx, func() error { return fn(reader{d}) })
	if sqliteCode(err) == codeHotJournal {
		if err = d.heal(ctx); err == nil {
			err = d.patiently(ctx, func() error { return fn(reader{d}) })
		}
	}
	return d.wrap(err, what)
}

// update runs a change in one immediate transaction; it is durable when update
// returns nil and undone otherwise. fn may be called again after another
// process was in the way. Once begun it is not cancelled.
func (d *DB) update(ctx context.Context, what string, fn func(q querier) error) error {
	if err := d.take(ctx); err != nil {
		return d.wrap(err, what)
	}
	defer d.give()
	if !d.writer {
		return errdefs.New(errdefs.Internal, "%s: the records are open for reading only", what)
	}
	return d.wrap(d.patiently(ctx, func() error { return d.transact(fn) }), what)
}

func (d *DB) transact(fn func(q querier) error) error {
	tx, err := d.sql.Begin()
	if err != nil {
		return err
	}
	if err := fn(writer{d, tx}); err != nil {
		_ = tx.Rollback()
		return err
	}
	if err := begun.Hit(); err != nil {
		_ = tx.Rollback()
		return err
	}
	return tx.Commit()
}

// patiently repeats fn while another process holds the database, until ctx ends
// or maxWait is over.
func (d *DB) patiently(ctx context.Context, fn func() error) error {
	err := fn()
	if !isBusy(err) {
		return err
	}
	for end := time.Now().Add(maxWait); isBusy(err) && time.Now().Before(end); err = fn() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return err
}

// querier runs prepared statements, inside a transaction or not.
type querier interface {
	query(query string, args ...any) (*sql.Rows, error)
	exec(query string, args ...any) (int64, error)
}

type reader struct{ d *DB }

func (r reader) query(query string, args ...any) (*sql.Rows, error) {
	s, err := r.d.stmt(query)
	if err != nil {
		return nil, err
	}
	return s.Query(args...)
}

func (r reader) exec(query string, args ...any) (int64, error) {
	s, err := r.d.stmt(query)
	if err != nil {
		return 0, err
	}
	return affected(s.Exec(args...))
}

type writer struct {
	d  *DB
	tx *sql.Tx
}

func (w writer) query(query string, args ...any) (*sql.Rows, error) {
	return w.tx.Query(query, args...)
}

func (w writer) exec(query string, args ...any) (int64, error) {
	return affected(w.tx.Exec(query, args...))
}

func affected(res sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// each calls scan for every row and closes rows.
func each(rows *sql.Rows, err error, scan func(*sql.Rows) error) error {
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
