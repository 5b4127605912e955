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
	err := d.patiently(ctx, func() error { return fn(session{d}) })
	if sqliteCode(err) == codeHotJournal {
		if err = d.heal(ctx); err == nil {
			err = d.patiently(ctx, func() error { return fn(session{d}) })
		}
	}
	return d.wrap(err, what)
}

// update runs a change in an immediate transaction; it is durable when update
// returns nil and undone otherwise. fn may be called again after another
// process was in the way. Once begun it is not cancelled.
//
// A commit waits for the disk three times. Changes that come meanwhile are
// queued, and whoever gets the next turn runs all of them in one transaction.
func (d *DB) update(ctx context.Context, what string, fn func(q querier) error) error {
	return d.updateWhen(ctx, what, Condition{}, fn)
}

// Condition is what a change waits for in the course of its commit, and must not
// use the records. An error undoes the change. A nil function is none.
type Condition struct {
	// Keep is a file that must not be lost if the change is undone, by a power cut
	// too: the next [Open], or the next change, puts it back.
	Keep KeptFile
	// Journaled is called, once, when the journal is on the disk: whatever follows, the
	// change can be undone. kept tells whether Keep is there, too.
	Journaled func(kept bool) error
	// Synced is called, once, when the change is on the disk and the end of the journal
	// is all that is missing.
	Synced func() error
}

// updateWhen is update with a condition.
func (d *DB) updateWhen(ctx context.Context, what string, when Condition, fn func(q querier) error) error {
	if !d.writer {
		return errdefs.New(errdefs.Internal, "%s: the records are open for reading only", what)
	}
	c := &change{ctx: ctx, fn: fn, when: when, done: make(chan struct{})}
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
	when Condition
	err  error
	done chan struct{}

	journaled, synced bool  // when's functions were called
	answer            error // of the first that failed
}

// isJournaled calls when.Journaled the first time.
func (c *change) isJournaled(kept bool) error {
	if !c.journaled {
		c.journaled = true
		if c.when.Journaled != nil {
			c.answer = c.when.Journaled(kept)
		}
	}
	return c.answer
}

// isSynced calls when.Synced the first time.
func (c *change) isSynced() error {
	if !c.synced && c.answer == nil {
		c.synced = true
		if c.when.Synced != nil {
			c.answer = c.when.Synced()
		}
	}
	return c.answer
}

// awaitJournaled is called in the course of a commit, when the journal is durable,
// with the files of the changes if kept. An error undoes the transaction.
func (d *DB) awaitJournaled(kept bool) error {
	changes := d.committing
	for _, c := range changes {
		if err := c.isJournaled(kept); err != nil {
			d.committing = nil // undoing syncs the database, too
			d.dropKept = len(changes) == 1
			return err
		}
	}
	return nil
}

// awaitSynced is called in the course of a commit, when the database is durable
// and the journal still there. An error undoes the transaction.
func (d *DB) awaitSynced() error {
	err := d.awaitJournaled(false) // of a transaction that has written nothing
	changes := d.committing
	d.committing = nil
	for _, c := range changes {
		if err := c.isSynced(); err != nil {
			return err
		}
	}
	d.dropKept = d.dropKept || len(changes) > 0 && err == nil
	return err
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
		if c.err = c.answer; c.err != nil {
			continue
		}
		c.err = d.patiently(c.ctx, func() error {
			_, err := d.transactTo(&[]*change{c}, c.fn)
			return err
		})
		if c.answer != nil {
			c.err = c.answer
		}
	}
}

// runTogether runs changes in one transaction, each with a savepoint, so that
// one that refuses leaves the others alone. It returns false, with nothing
// changed, if something else went wrong before the commit: an error of the
// database may have rolled everything back, and each change should meet its own.
func (d *DB) runTogether(batch []*change) bool {
	var accepted []*change
	committing, err := d.transactTo(&accepted, func(q querier) error {
		for _, c := range batch {
			if err := c.runInside(q); err != nil {
				return err
			}
			if c.err == nil {
				accepted = append(accepted, c)
			}
		}
		return nil
	})
	switch {
	case err == nil:
		return true
	case !committing || isBusy(err) || slices.ContainsFunc(batch, func(c *change) bool { return c.answer != nil }):
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
	_, err := d.transactTo(nil, fn)
	return err
}

// transactTo also tells whether it came to the commit, and commits when those
// changes are ready that fn has made, nil for none.
func (d *DB) transactTo(changes *[]*change, fn func(q querier) error) (committing bool, err error) {
	q := session{d}
	if _, err := q.exec("BEGIN IMMEDIATE"); err != nil {
		return false, err
	}
	d.restoreKept()
	// After some errors SQLite has rolled back itself, and refuses to do it again.
	rollback := func() { _, _ = q.exec("ROLLBACK") }
	if err := fn(q); err != nil {
		rollback()
		return false, err
	}
	if err := begun.Hit(); err != nil {
		rollback()
		return false, err
	}
	d.dropKept = false
	if changes != nil {
		d.committing = *changes
	}
	_, err = q.exec("COMMIT")
	if err == nil {
		return true, d.awaitSynced() // a transaction that has written nothing syncs nothing
	}
	d.committing = nil
	rollback()
	return true, err
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

// session runs statements on the one connection, in its transaction if there
// is one. Whoever uses it has the turn.
type session struct{ d *DB }

func (s session) query(query string, args ...any) (*sql.Rows, error) {
	st, err := s.d.stmt(query)
	if err != nil {
		return nil, err
	}
	return st.Query(args...)
}

func (s session) exec(query string, args ...any) (int64, error) {
	st, err := s.d.stmt(query)
	if err != nil {
		return 0, err
	}
	return affected(st.Exec(args...))
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
