package records

import (
	"context"
	"database/sql"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write ready.db anew from the migrations")

// TestReadyDatabase compares the database that new homes get with what the
// migrations make. With -update it writes it.
func TestReadyDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "made.db")
	makeByMigration(t, path)
	if *update {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("ready.db", b, 0o644); err != nil {
			t.Fatal(err)
		}
		readyDB = b
	}
	ready := filepath.Join(t.TempDir(), "ready.db")
	if err := os.WriteFile(ready, withReserve(readyDB, reserveFull), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := describe(t, ready), describe(t, path); got != want {
		t.Errorf("ready.db is not what the migrations make; run: go test ./internal/records -run TestReadyDatabase -update\ngot:\n%s\nwant:\n%s", got, want)
	}
	db := openPlain(t, ready)
	var free int
	var verdict string
	if err := db.QueryRow("PRAGMA freelist_count").Scan(&free); err != nil || free != reserveFull {
		t.Errorf("freelist_count = %d, %v; want %d", free, err, reserveFull)
	}
	if err := db.QueryRow("PRAGMA integrity_check").Scan(&verdict); err != nil || verdict != "ok" {
		t.Errorf("integrity_check = %q, %v", verdict, err)
	}
}

func openPlain(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func makeByMigration(t *testing.T, path string) {
	t.Helper()
	db := openPlain(t, path)
	db.SetMaxOpenConns(1)
	if _, err := db.Exec(fmt.Sprintf("PRAGMA page_size=%d; PRAGMA journal_mode=DELETE", pageSize)); err != nil {
		t.Fatal(err)
	}
	if err := migrateDB(context.Background(), db); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("VACUUM"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// describe lists schema, versions and page size.
func describe(t *testing.T, path string) string {
	t.Helper()
	db := openPlain(t, path)
	var b strings.Builder
	for _, q := range []string{
		"SELECT type || ' ' || name || ': ' || coalesce(sql, '') FROM sqlite_schema ORDER BY type, name",
		"PRAGMA user_version", "PRAGMA page_size",
	} {
		rows, err := db.Query(q)
		err = each(rows, err, func(r *sql.Rows) error {
			var s string
			err := r.Scan(&s)
			fmt.Fprintln(&b, s)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}
