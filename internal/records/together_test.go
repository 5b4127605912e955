package records

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// Changes of many callers are committed together; each gets its own answer.
func TestChangesTogether(t *testing.T) {
	db, err := Open(t.Context(), home.Dir(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const names, callers = 40, 5
	<-db.turn // so that all of them queue up
	errs := make([]error, names*callers)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			v := &Volume{ID: fmt.Sprint("id", i), Name: fmt.Sprint("v", i%names), Kind: "dir", CreatedAt: time.Now()}
			errs[i] = db.update(t.Context(), "test", func(q querier) error { return insertRow(q, v, "") })
		})
	}
	waitForQueue(t, db, len(errs))
	before := changeCounter(t, db)
	db.give()
	wg.Wait()
	if n := changeCounter(t, db) - before; n != 1 {
		t.Errorf("%d commits", n)
	}
	won := map[int]int{}
	for i, err := range errs {
		switch {
		case err == nil:
			won[i%names]++
		case !errdefs.Is(err, errdefs.VolumeAlreadyExists):
			t.Errorf("caller %d: %v", i, err)
		}
	}
	all, err := db.ListVolumes(t.Context())
	if err != nil || len(all) != names || len(won) != names {
		t.Errorf("%d volumes, %d winners, %v", len(all), len(won), err)
	}
	for name, n := range won {
		if n != 1 {
			t.Errorf("v%d has %d winners", name, n)
		}
	}
}

// One whose time is over leaves the queue; one that breaks the transaction
// leaves the others alone.
func TestChangesApart(t *testing.T) {
	db, err := Open(t.Context(), home.Dir(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	<-db.turn
	var wg sync.WaitGroup
	start := func(ctx context.Context, to *error, fn func(q querier) error) {
		wg.Go(func() { *to = db.update(ctx, "test", fn) })
	}
	row := func(n string) func(q querier) error {
		return func(q querier) error {
			return insertRow(q, &Volume{ID: n, Name: n, Kind: "dir", CreatedAt: time.Now()}, "")
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	var gone, broken, refused, good, other error
	start(ctx, &gone, row("gone"))
	waitForQueue(t, db, 1)
	cancel()
	wg.Wait()
	ours := errors.New("refused")
	start(t.Context(), &good, row("good"))
	start(t.Context(), &broken, func(q querier) error { _, err := q.exec("no SQL"); return err })
	start(t.Context(), &refused, func(q querier) error { return errors.Join(row("undone")(q), ours) })
	start(t.Context(), &other, row("other"))
	waitForQueue(t, db, 4)
	db.give()
	wg.Wait()
	if !errdefs.Is(gone, errdefs.Cancelled) || good != nil || other != nil || broken == nil || !errors.Is(refused, ours) {
		t.Errorf("gone: %v, good: %v, other: %v, broken: %v, refused: %v", gone, good, other, broken, refused)
	}
	all, err := db.ListVolumes(t.Context())
	if err != nil || len(all) != 2 {
		t.Errorf("%d volumes, %v", len(all), err)
	}
}

func waitForQueue(t *testing.T, db *DB, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		db.queue.mu.Lock()
		have := len(db.queue.list)
		db.queue.mu.Unlock()
		if have == n {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d of %d changes are queued", have, n)
		}
	}
}

// changeCounter is the number of commits in the database's header.
func changeCounter(t *testing.T, db *DB) uint32 {
	t.Helper()
	b, err := os.ReadFile(db.home.DB())
	if err != nil {
		t.Fatal(err)
	}
	return binary.BigEndian.Uint32(b[24:])
}
