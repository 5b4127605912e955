package records

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"sync"
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

// update runs a change in an immediate transaction; it is durable when update
// returns nil and undone otherwise. fn may be called again after another
// process was in the way. Once begun it is not cancelled.
//
// A commit waits for the disk five times. Changes that come meanwhile are
// queued, and whoever gets the next turn runs all of them in one transaction.
func (d *DB) update(ctx context.Context, what string, fn func(q querier) error) error {
	if !d.writer {
		return errdefs.New(errdefs.Internal, "%s: the records are open for reading only", what)
	}
	c := &change{ctx: ctx, fn: fn, done: make(chan struct{})}
	d.queue.add(c)
	if err := d.take(ctx); err != nil {
		if d.queue.remove(c) {
			return d.wrap(err, what)
		}
	} else {
		if batch := d.queue.drain(); len(batch) > 0 {
			d.runAll(batch)
		}
		d.give()
	}
	<-c.done // by now, or soon, by whoever took it
	return d.wrap(c.err, what)
}

// change is a call of update. err is set when done is closed.
type change struct {
	ctx  context.Context
	fn   func(q querier) error
	err  error
	done chan struct{}
}

// changeQueue holds changes that wait for the turn.
type changeQueue struct {
	mu   sync.Mutex
	list []*change // guarded by mu
}

func (q *changeQueue) add(c *change) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, c)
}

// remove withdraws a change; false means that somebody has taken it.
func (q *changeQueue) remove(c *change) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.list)
	q.list = slices.DeleteFunc(q.list, func(x *change) bool { return x == c })
	return len(q.list) < n
}

func (q *changeQueue) drain() []*change {
	q.mu.Lock()
	defer q.mu.Unlock()
	list := q.list
	q.list = nil
	return list
}

// runAll runs changes, together if there are several, and tells their callers.
// The caller has the turn.
func (d *DB) runAll(batch []*change) {
	defer func() {
		for _, c := range batch {
			close(c.done)
		}
	}()
	if len(batch) > 1 && d.runTogether(batch) {
		return
	}
	for _, c := range batch {
		c.err = d.patiently(c.ctx, func() error { return d.transact(c.fn) })
	}
}

// runTogether runs changes in one transaction, each with a savepoint, so that
// one that refuses leaves the others alone. It returns false, with nothing
// changed, if something else went wrong before the commit: an error of the
// database may have rolled everything back, and each change should meet its own.
func (d *DB) runTogether(batch []*change) bool {
	committing, err := d.transactTo(func(q querier) error {
		for _, c := range batch {
			if err := c.runInside(q); err != nil {
				return err
			}
		}
		return nil
	})
	switch {
	case err == nil:
		return true
	case !committing || isBusy(err):
		return false
	}
	for _, c := range batch { // whether it was one, only the database knows
		c.err = errors.Join(c.err, err)
	}
	return true
}

// runInside runs the change in somebody's transaction. The error is one of the
// database.
func (c *change) runInside(q querier) error {
	if _, err := q.exec("SAVEPOINT change"); err != nil {
		return err
	}
	if c.err = c.fn(q); sqliteCode(c.err) != 0 {
		return c.err
	}
	if c.err != nil {
		if _, err := q.exec("ROLLBACK TO change"); err != nil {
			return err
		}
	}
	_, err := q.exec("RELEASE change")
	return err
}

func (d *DB) transact(fn func(q querier) error) error {
	_, err := d.transactTo(fn)
	return err
}

// transactTo also tells whether it came to the commit.
func (d *DB) transactTo(fn func(q querier) error) (committing bool, err error) {
	tx, err := d.sql.Begin()
	if err != nil {
		return false, err
	}
	if err := fn(writer{d, tx}); err != nil {
		_ = tx.Rollback()
		return false, err
	}
	if err := begun.Hit(); err != nil {
		_ = tx.Rollback()
		return false, err
	}
	return true, tx.Commit()
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
