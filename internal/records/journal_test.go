package records

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

// TestTornJournal: a power cut leaves any of the sectors of a journal that was on
// its way to the disk, the others as they were: the database, which was not
// touched yet, stays as it was. Without the seal it would not.
func TestTornJournal(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	for i := range 40 { // the journal has much the same pages as before
		if err := d.InsertVolume(t.Context(), testVolume(fmt.Sprint("before", i))); err != nil {
			t.Fatal(err)
		}
	}
	db, old := fileNow(t, h.DB()), fileNow(t, h.DB()+"-journal")
	var journal []byte
	keep := KeptFile{filepath.Join(h.Staging(), "ID", "note"), bytes.Repeat([]byte("content\n"), 40)}
	err := d.InsertVolumeWhen(t.Context(), Condition{Keep: keep, Journaled: func(bool) error {
		journal = fileNow(t, h.DB()+"-journal")
		return nil
	}}, testVolume("a"))
	if err != nil {
		t.Fatal(err)
	}
	var differ []int
	for i := 0; i < len(journal); i += sectorSize {
		if !bytes.Equal(journal[i:i+sectorSize], old[i:i+sectorSize]) {
			differ = append(differ, i)
		}
	}
	if len(differ) < 8 || string(journal[:len(journalMagic)]) != journalMagic {
		t.Fatalf("%d sectors differ, the journal begins with %x", len(differ), journal[:sealEnd])
	}
	random := rand.New(rand.NewPCG(1, 2))
	damaged := 0
	for round := range 100 {
		mix, missing := bytes.Clone(old), 1+random.IntN(4)
		for _, i := range differ {
			if i == 0 || random.IntN(len(differ)) >= missing { // a journal without its header is none
				copy(mix[i:i+sectorSize], journal[i:])
			}
		}
		if !bytes.Equal(rolledBack(t, db, mix), db) {
			t.Errorf("round %d: the database is damaged", round)
		}
		clear(mix[sealAt:sealEnd])
		if !bytes.Equal(rolledBack(t, db, mix), db) {
			damaged++
		}
	}
	if damaged == 0 {
		t.Error("the seal is not needed")
	}
	t.Logf("%d sectors, %d of 100 torn journals without a seal damage the database", len(differ), damaged)
}

// fileNow reads a file by another process's eyes: closing a descriptor here would
// drop SQLite's locks.
func fileNow(t *testing.T, path string) []byte {
	t.Helper()
	b, err := exec.Command("cat", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// rolledBack returns what the first command makes of database and journal.
func rolledBack(t *testing.T, db, journal []byte) []byte {
	t.Helper()
	h := home.Dir(t.TempDir())
	for suffix, text := range map[string][]byte{"": db, "-journal": journal} {
		if err := os.WriteFile(h.DB()+suffix, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		d, err := Open(t.Context(), h)
		if err == nil {
			_, _ = d.ListVolumes(t.Context())
			err = d.Close()
		}
		if err != nil {
			return nil
		}
	}
	b, err := os.ReadFile(filepath.Join(string(h), filepath.Base(h.DB())))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestJournalIsNotWritten: of a journal that could not be written, or not all of it,
// the change is undone: nobody sees it, and the next one does not commit it.
func TestJournalIsNotWritten(t *testing.T) {
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	for _, limit := range []uint64{0, 512, 1024, 5000, 9000} {
		h := home.Dir(t.TempDir())
		d := mustOpen(t, h)
		for i := range 40 {
			if err := d.InsertVolume(t.Context(), testVolume(fmt.Sprint("before", i))); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: unix.RLIM_INFINITY}); err != nil {
			t.Fatal(err)
		}
		failed := d.InsertVolume(t.Context(), testVolume("failed"))
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unlimited); err != nil {
			t.Fatal(err)
		}
		if _, err := d.VolumeByName(t.Context(), "failed"); failed == nil || !errdefs.Is(err, errdefs.VolumeNotFound) {
			t.Errorf("limit %d: inserted: %v, found: %v", limit, failed, err)
		}
		if err := d.InsertVolume(t.Context(), testVolume("after")); err != nil {
			t.Errorf("limit %d: %v", limit, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		var verdict string
		var volumes int
		db := openPlain(t, h.DB())
		err := errors.Join(db.QueryRow("PRAGMA integrity_check").Scan(&verdict), db.QueryRow("SELECT count(*) FROM volume").Scan(&volumes))
		if err != nil || verdict != "ok" || volumes != 41 {
			t.Errorf("limit %d: %d volumes, %q, %v", limit, volumes, verdict, err)
		}
	}
}

// TestLargeTransaction: a journal that is too large to be held in memory is synced
// as SQLite does it, and undoes its transaction, by the process and after a kill.
func TestLargeTransaction(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	const volumes = 8000
	err := d.update(t.Context(), "fill", func(q querier) error {
		for i := range volumes {
			v := testVolume(fmt.Sprint("v", i))
			if err := insertRow(q, v, "{}"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	db := fileNow(t, h.DB())
	var hot, touched []byte
	undone := fmt.Errorf("undone")
	change := func(q querier) error {
		_, err := q.exec("UPDATE volume SET labels = '{\"a\":\"b\"}'")
		return err
	}
	err = d.updateWhen(t.Context(), "change all", Condition{Synced: func() error {
		touched, hot = fileNow(t, h.DB()), fileNow(t, h.DB()+"-journal")
		return undone
	}}, change)
	if err == nil {
		t.Fatal("committed")
	}
	if bytes.Contains(hot[:sectorSize], []byte(sealMark)) || bytes.Equal(touched, db) {
		t.Fatalf("the journal is sealed, or the database is not touched: %x", hot[:sectorSize])
	}
	if got := fileNow(t, h.DB()); !bytes.Equal(got[pageSize:], db[pageSize:len(got)]) {
		t.Error("undone by the process: the database differs")
	}
	if got := rolledBack(t, touched, hot); !bytes.Equal(got, db) {
		t.Error("undone after a kill: the database differs")
	}
	if all, err := d.ListVolumes(t.Context()); err != nil || len(all) != volumes {
		t.Errorf("%d volumes, %v", len(all), err)
	}
}
