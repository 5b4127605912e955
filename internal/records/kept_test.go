package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// keptBy returns a condition that keeps a file of a home, and copies database and
// journal to another home when the step of a commit is there.
func keptBy(t *testing.T, h, to home.Dir, step string, answer error) Condition {
	t.Helper()
	at := func(name string) error {
		if name != step {
			return nil
		}
		copyRecords(t, h, to)
		return answer
	}
	return Condition{
		Keep: KeptFile{filepath.Join(h.Staging(), "ID", "note"), []byte("content\n")},
		Journaled: func(kept bool) error {
			if !kept {
				t.Error("the file was not kept")
			}
			return at("journaled")
		},
		Synced: func() error { return at("synced") },
	}
}

// copyRecords copies by another process: closing a descriptor here would drop
// SQLite's locks.
func copyRecords(t *testing.T, from, to home.Dir) {
	t.Helper()
	for _, suffix := range []string{"", journalSuffix} {
		if out, err := exec.Command("cp", from.DB()+suffix, to.DB()+suffix).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}

// TestKeptFile: whoever opens the records after a power cut finds the file of a
// change that was undone by it, whole, and of no other.
func TestKeptFile(t *testing.T) {
	refusal := errors.New("no")
	for name, c := range map[string]struct {
		step   string
		answer error
		reader bool   // comes first, and rolls back
		torn   bool   // a part of the file is there
		want   string // what is there after all
	}{
		"journal on the disk":            {step: "journaled", want: "content\n"},
		"change on the disk":             {step: "synced", want: "content\n"},
		"read first":                     {step: "synced", reader: true, want: "content\n"},
		"torn":                           {step: "journaled", torn: true, want: "content\n"},
		"committed":                      {step: "after"},
		"refused at once":                {step: "after", answer: refusal},
		"refused when it is on the disk": {step: "synced", answer: refusal, want: "content\n"},
	} {
		t.Run(name, func(t *testing.T) {
			h, cut := home.Dir(t.TempDir()), home.Dir(t.TempDir())
			d := mustOpen(t, h)
			if err := mustOpen(t, cut).Close(); err != nil {
				t.Fatal(err)
			}
			when := keptBy(t, h, cut, c.step, c.answer)
			if c.step == "after" {
				when.Journaled = func(bool) error { return c.answer }
			}
			if err := d.InsertVolumeWhen(t.Context(), when, testVolume("a")); !errors.Is(err, c.answer) {
				t.Fatal(err)
			}
			if c.step == "after" {
				copyRecords(t, h, cut)
			}
			path := filepath.Join(cut.Staging(), "ID", "note")
			if c.torn {
				if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("cont\x00\x00\x00\x00\x00\x00"), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			if c.reader {
				if all, err := mustRead(t, cut).ListVolumes(t.Context()); err != nil || len(all) != 0 {
					t.Fatal(all, err)
				}
			}
			for round := range 2 {
				if err := mustOpen(t, cut).Close(); err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(path)
				if string(got) != c.want || (err == nil) != (c.want != "") {
					t.Errorf("round %d: the file holds %q, %v, want %q", round, got, err, c.want)
				}
				if c.want != "" && round == 0 {
					if err := os.WriteFile(path, []byte("later"), 0o600); err != nil {
						t.Fatal(err)
					}
					c.want = "later" // it is put back once
				}
			}
			if fi, err := os.Stat(cut.DB() + journalSuffix); err != nil || fi.Size() != journalSize {
				t.Errorf("the journal is not kept: %v, %v", fi, err)
			}
		})
	}
}

// TestKeptFilesTogether: of changes that are committed together each keeps its file.
// Where one refuses, all files are put back before the others are done again, each
// with a journal of its own.
func TestKeptFilesTogether(t *testing.T) {
	for _, refusing := range []string{"", "b", "c"} {
		h, cut := home.Dir(t.TempDir()), home.Dir(t.TempDir())
		d := mustOpen(t, h)
		if err := mustOpen(t, cut).Close(); err != nil {
			t.Fatal(err)
		}
		refusal := errors.New("no")
		told := map[string][]bool{}
		errs := map[string]error{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		<-d.turn // so that they queue up
		for i, name := range []string{"a", "b", "c"} {
			wg.Go(func() {
				err := d.InsertVolumeWhen(t.Context(), Condition{
					Keep: KeptFile{filepath.Join(h.Staging(), name, "note"), []byte(name)},
					Journaled: func(kept bool) error {
						told[name] = append(told[name], kept)
						if kept && i == 0 {
							copyRecords(t, h, cut)
						}
						if name == refusing {
							return refusal
						}
						return nil
					},
					Synced: func() error {
						left, err := os.ReadDir(h.Staging())
						if err != nil || refusing != "" != (len(left) == 3) {
							t.Errorf("%q refuses: put back before %s is committed: %v, %v", refusing, name, left, err)
						}
						return nil
					},
				}, testVolume(name))
				mu.Lock()
				defer mu.Unlock()
				errs[name] = err
			})
			waitForQueue(t, d, i+1)
		}
		d.give()
		wg.Wait()
		if err := mustOpen(t, cut).Close(); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a", "b", "c"} {
			got, err := os.ReadFile(filepath.Join(cut.Staging(), name, "note"))
			if err != nil || string(got) != name {
				t.Errorf("%s refuses: the file of %s holds %q, %v", refusing, name, got, err)
			}
			if refused := name == refusing; errors.Is(errs[name], refusal) != refused || (errs[name] == nil) == refused {
				t.Errorf("%s refuses: %s: %v", refusing, name, errs[name])
			}
		}
		if a := told["a"]; !slices.Equal(a, []bool{true}) {
			t.Errorf("%q refuses: a was told %v", refusing, a)
		}
	}
}

// cutHome returns a home as a power cut leaves it during a creation.
func cutHome(t *testing.T) home.Dir {
	t.Helper()
	h, cut := home.Dir(t.TempDir()), home.Dir(t.TempDir())
	d := mustOpen(t, h)
	if err := mustOpen(t, cut).Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.InsertVolumeWhen(t.Context(), keptBy(t, h, cut, "synced", nil), testVolume("a")); err != nil {
		t.Fatal(err)
	}
	return cut
}

// TestKeptIsNotOverwritten: a kept file is back before another change has a journal.
func TestKeptIsNotOverwritten(t *testing.T) {
	change := func(t *testing.T, d *DB) {
		t.Helper()
		err := d.update(t.Context(), "change", func(q querier) error {
			_, err := q.exec("INSERT INTO tombstone (id, name, dev, ino, birth_ns, removed_ns) VALUES ('1', 'x', 1, 2, 3, 4)")
			return err
		})
		if err := errors.Join(err, d.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for name, run := range map[string]func(t *testing.T, cut home.Dir) home.Dir{
		"no room for it": func(t *testing.T, cut home.Dir) home.Dir {
			if err := errors.Join(os.Remove(cut.Staging()), os.WriteFile(cut.Staging(), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			change(t, mustOpen(t, cut))
			if err := errors.Join(os.Remove(cut.Staging()), mustOpen(t, cut).Close()); err != nil {
				t.Fatal(err)
			}
			return cut
		},
		"cancelled while it opens": func(t *testing.T, cut home.Dir) home.Dir {
			for left := range 6 {
				if d, err := Open(&endingContext{t.Context(), left}, cut); err == nil {
					change(t, d)
					break
				}
			}
			return cut
		},
		"by a handle that was open": func(t *testing.T, cut home.Dir) home.Dir {
			h := home.Dir(t.TempDir())
			d := mustOpen(t, h)
			if _, err := d.ListVolumes(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, suffix := range []string{"", journalSuffix} {
				if out, err := exec.Command("dd", "if="+cut.DB()+suffix, "of="+h.DB()+suffix, "conv=notrunc", "status=none").CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			change(t, d)
			return h
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := run(t, cutHome(t))
			if got, err := os.ReadFile(filepath.Join(h.Staging(), "ID", "note")); err != nil || string(got) != "content\n" {
				t.Errorf("the file holds %q, %v", got, err)
			}
		})
	}
}

// endingContext is at its end after some looks at it.
type endingContext struct {
	context.Context
	left int
}

func (c *endingContext) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestKeptBeforeAMigration: a migration does not overwrite a kept file.
func TestKeptBeforeAMigration(t *testing.T) {
	h, cut := home.Dir(t.TempDir()), home.Dir(t.TempDir())
	d := mustOpen(t, h)
	if err := mustOpen(t, cut).Close(); err != nil {
		t.Fatal(err)
	}
	err := d.update(t.Context(), "go back", func(q querier) error {
		_, err := q.exec("CREATE INDEX volume_newest ON volume (created_ns DESC, id DESC)")
		if err == nil {
			_, err = q.exec("PRAGMA user_version=1")
		}
		return err
	})
	if err == nil {
		err = d.InsertVolumeWhen(t.Context(), keptBy(t, h, cut, "synced", nil), testVolume("a"))
	}
	if err := errors.Join(err, mustOpen(t, cut).Close()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(cut.Staging(), "ID", "note")); err != nil || string(got) != "content\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

// TestKeptAfterAFailedWrite: where the database cannot be written the change is
// undone, what it waits for is not asked for, and its file stays until it is
// forgotten.
func TestKeptAfterAFailedWrite(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	synced := 0
	when := Condition{
		Keep: KeptFile{filepath.Join(h.Staging(), "ID", "note"), []byte("content\n")},
		Journaled: func(bool) error {
			fi, err := os.Stat(h.DB())
			if err != nil {
				return err
			}
			return unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: uint64(fi.Size()), Max: unix.RLIM_INFINITY})
		},
		Synced: func() error { synced++; return nil },
	}
	err := d.updateWhen(t.Context(), "grow", when, func(q querier) error {
		_, err := q.exec("INSERT INTO reserve (filler) VALUES (zeroblob(400000))")
		return err
	})
	if err2 := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err == nil || err2 != nil || synced != 0 {
		t.Errorf("the change: %v, Synced called %d times, %v", err, synced, err2)
	}
	head, err := readHead(h.DB() + journalSuffix)
	if err != nil || head.kept() == 0 {
		t.Errorf("the file is not kept: %v", err)
	}
	if err := d.Forget(t.Context(), when.Keep); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, h).Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(h.Staging()); err != nil || len(left) != 0 {
		t.Errorf("put back though it was forgotten: %v, %v", left, err)
	}
}

// TestKeptTooLarge: a file that does not fit is not kept, and its change is told.
func TestKeptTooLarge(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	for size, want := range map[int]bool{maxKept / 2: true, maxKept + 1: false} {
		var told []bool
		when := Condition{
			Keep:      KeptFile{filepath.Join(h.Staging(), "ID", "note"), make([]byte, size)},
			Journaled: func(kept bool) error { told = append(told, kept); return nil },
		}
		if err := d.InsertVolumeWhen(t.Context(), when, testVolume(fmt.Sprint("v", size))); err != nil {
			t.Fatal(err)
		}
		if len(told) != 1 || told[0] != want {
			t.Errorf("%d bytes: told %v, want %v", size, told, want)
		}
	}
}

// FuzzKept: whatever a power cut or somebody else leaves in a journal, nothing is
// read beyond it and nothing is put outside of the home.
func FuzzKept(f *testing.F) {
	j := &journal{text: make([]byte, sectorSize), db: &DB{home: "/h"}}
	j.db.committing = []*change{{when: Condition{Keep: KeptFile{"/h/a/b/c", []byte("content")}}}}
	if !j.keep() {
		f.Fatal("not kept")
	}
	f.Add(j.text[sectorSize:], int64(0))
	f.Add([]byte{}, int64(-1))
	f.Fuzz(func(t *testing.T, text []byte, at int64) {
		if at < 0 {
			at = -(at + 1)
		}
		files, err := readKept(bytes.NewReader(text), at)
		if err != nil {
			t.Fatal(err)
		}
		size := 0
		for _, file := range files {
			if !filepath.IsLocal(file.Path) {
				t.Errorf("path %q", file.Path)
			}
			size += len(file.Path) + len(file.Content)
		}
		if size > len(text) {
			t.Errorf("%d bytes of %d", size, len(text))
		}
	})
}
