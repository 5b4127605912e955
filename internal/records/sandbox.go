package records

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

const sandboxColumns = "id, name, status, image, config, labels, created_ns, updated_ns, last_error"

// InsertSandbox stores a new sandbox; zero times become now. Errors:
// SandboxAlreadyExists when the name or id is taken.
func (d *DB) InsertSandbox(ctx context.Context, s *Sandbox) error {
	labels, err := encodeLabels(s.Labels)
	if err != nil {
		return err
	}
	if s.CreatedAt.IsZero() {
		s.CreatedAt = time.Now().UTC()
	}
	if s.UpdatedAt.IsZero() {
		s.UpdatedAt = s.CreatedAt
	}
	return d.insert(ctx, "record the sandbox "+s.Name, Condition{}, func(q querier) error {
		_, err := q.exec("INSERT INTO sandbox ("+sandboxColumns+") VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9)",
			s.ID, s.Name, s.Status, s.Image, string(s.Config), labels, s.CreatedAt.UnixNano(), s.UpdatedAt.UnixNano(), s.LastError)
		if isUnique(err) {
			return errdefs.New(errdefs.SandboxAlreadyExists, "sandbox %q already exists", s.Name)
		}
		return err
	})
}

func sandboxNotFound(name string) error {
	return errdefs.New(errdefs.SandboxNotFound, "sandbox %q not found", name)
}

// SandboxByName returns one sandbox. Errors: SandboxNotFound.
func (d *DB) SandboxByName(ctx context.Context, name string) (*Sandbox, error) {
	return d.oneSandbox(ctx, "name", name)
}

// SandboxByID returns one sandbox. Errors: SandboxNotFound.
func (d *DB) SandboxByID(ctx context.Context, id string) (*Sandbox, error) {
	return d.oneSandbox(ctx, "id", id)
}

func (d *DB) oneSandbox(ctx context.Context, column, value string) (*Sandbox, error) {
	found, err := d.sandboxes(ctx, 0, nil, "WHERE "+column+" = $1", value)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, sandboxNotFound(value)
	}
	return found[0], nil
}

// ListSandboxes returns sandboxes, newest first, equal times by descending id.
// next is the cursor of the following page, "" after the last one. A sandbox
// made meanwhile never moves others between pages. Errors: InvalidArgument for
// a cursor that no page returned.
func (d *DB) ListSandboxes(ctx context.Context, f SandboxFilter) (page []*Sandbox, next string, err error) {
	tail, args := "", []any(nil)
	if f.Cursor != "" {
		created, id, err := parseCursor(f.Cursor)
		if err != nil {
			return nil, "", err
		}
		tail, args = "WHERE created_ns < $1 OR (created_ns = $1 AND id < $2) ", []any{created, id}
	}
	want := 0
	if f.Limit > 0 {
		want = f.Limit + 1 // one more tells whether there is a next page
	}
	page, err = d.sandboxes(ctx, want, f.Labels, tail+"ORDER BY created_ns DESC, id DESC", args...)
	if err != nil || f.Limit <= 0 || len(page) <= f.Limit {
		return page, "", err
	}
	page = page[:f.Limit]
	last := page[f.Limit-1]
	return page, fmt.Sprintf("%d.%s", last.CreatedAt.UnixNano(), last.ID), nil
}

func parseCursor(c string) (created int64, id string, err error) {
	if n, err := fmt.Sscanf(c, "%d.%s", &created, &id); err != nil || n != 2 {
		return 0, "", errdefs.New(errdefs.InvalidArgument, "%q is not a cursor of a sandbox list", c)
	}
	return created, id, nil
}

// sandboxes reads rows that carry labels, at most limit of them (0: all).
func (d *DB) sandboxes(ctx context.Context, limit int, labels map[string]string, tail string, args ...any) ([]*Sandbox, error) {
	var out []*Sandbox
	err := d.view(ctx, "read the sandboxes", func(q querier) error {
		out = nil
		rows, err := q.query("SELECT "+sandboxColumns+" FROM sandbox "+tail, args...)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() && (limit == 0 || len(out) < limit) {
			s, err := scanSandbox(rows)
			if err != nil {
				return err
			}
			if HasLabels(s.Labels, labels) {
				out = append(out, s)
			}
		}
		return rows.Err()
	})
	return out, err
}

func scanSandbox(r *sql.Rows) (*Sandbox, error) {
	var s Sandbox
	var config, labels string
	var created, updated int64
	if err := r.Scan(&s.ID, &s.Name, &s.Status, &s.Image, &config, &labels, &created, &updated, &s.LastError); err != nil {
		return nil, err
	}
	s.Config = []byte(config)
	s.CreatedAt, s.UpdatedAt = time.Unix(0, created).UTC(), time.Unix(0, updated).UTC()
	var err error
	s.Labels, err = decodeLabels(labels)
	return &s, err
}

// UpdateSandbox stores a new status and last error; a nil config keeps the
// stored one. Errors: SandboxNotFound.
func (d *DB) UpdateSandbox(ctx context.Context, id, status, lastError string, config []byte) error {
	query, args := "UPDATE sandbox SET status = $2, last_error = $3, updated_ns = $4 WHERE id = $1",
		[]any{id, status, lastError, time.Now().UnixNano()}
	if config != nil {
		query, args = "UPDATE sandbox SET status = $2, last_error = $3, updated_ns = $4, config = $5 WHERE id = $1", append(args, string(config))
	}
	return d.changeSandbox(ctx, id, query, args...)
}

// DeleteSandbox removes the record of a sandbox. Errors: SandboxNotFound.
func (d *DB) DeleteSandbox(ctx context.Context, id string) error {
	return d.changeSandbox(ctx, id, "DELETE FROM sandbox WHERE id = $1", id)
}

func (d *DB) changeSandbox(ctx context.Context, id, query string, args ...any) error {
	return d.update(ctx, "change the record of sandbox "+id, func(q querier) error {
		n, err := q.exec(query, args...)
		if err == nil && n == 0 {
			return sandboxNotFound(id)
		}
		return err
	})
}

// HasLabels reports whether have contains every label of want.
func HasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}
