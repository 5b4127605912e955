package volstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// told is what repair said of one kind: names and actions.
func told(found []Finding, kind FindingKind) (out []string) {
	for _, f := range found {
		if f.Kind == kind {
			out = append(out, strings.TrimSpace(f.Name+" "+f.Action))
		}
	}
	return out
}

func mustRepair(t *testing.T, s *Store) []Finding {
	t.Helper()
	found, err := s.Repair(t.Context())
	if err != nil {
		t.Errorf("repair: %v", err)
	}
	return found
}

// TestTrashThatIsNoDirectory: what is deleted is gone, also where a pipe, a link
// or a file lies in the trash; what a link names stays.
func TestTrashThatIsNoDirectory(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	writeMarker(t, v.Path)
	at := func(name string) string { return filepath.Join(h.Trash(), name) }
	err := errors.Join(os.WriteFile(at("file"), nil, 0), unix.Mkfifo(at("pipe"), 0o600), os.Symlink(v.Path, at("link")),
		os.Symlink("loop", at("loop")), os.Mkdir(at("dir"), 0))
	if err != nil {
		t.Fatal(err)
	}
	found, err := s.Check(t.Context())
	if got := told(found, FoundTrash); err != nil || len(got) != 5 {
		t.Errorf("check: %q, %v", got, err)
	}
	if got := told(mustRepair(t, s), FoundTrash); !slices.Equal(got, []string{"deleted", "deleted", "deleted", "deleted", "deleted"}) {
		t.Errorf("repair: %q", got)
	}
	if left, err := listNames(h.Trash()); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	if !exists(filepath.Join(v.Path, marker)) {
		t.Error("a link was followed")
	}
	if got := mustRepair(t, s); len(got) != 0 {
		t.Errorf("again: %+v", got)
	}
}

// TestStagingThatIsNoDirectory is reported in the same way by both, and left alone.
func TestStagingThatIsNoDirectory(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "v"})
	path := filepath.Join(h.Staging(), "pipe")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := s.Check(t.Context())
	for _, found := range [][]Finding{found, mustRepair(t, s)} {
		if len(found) != 1 || found[0].Path != path || found[0].Action != "" || found[0].Detail == "" {
			t.Errorf("%+v, %v", found, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Error(err)
	}
}

// TestTrashOfAnotherReaper: repair does not say that it has deleted what another
// process is deleting.
func TestTrashOfAnotherReaper(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "v"})
	path := filepath.Join(h.Trash(), "busy")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := child(h, "lock "+path, "")
	stdin, err := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	got := told(mustRepair(t, s), FoundTrash)
	if want := fmt.Sprintf("being deleted by process %d", cmd.Process.Pid); !slices.Equal(got, []string{want}) || !exists(path) {
		t.Errorf("%q, not %q", got, want)
	}
	if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if got := told(mustRepair(t, s), FoundTrash); !slices.Equal(got, []string{"deleted"}) || exists(path) {
		t.Errorf("afterwards: %q", got)
	}
}

// TestLargeTrashIsReportedOnce: what the background deletes is said to be.
func TestLargeTrashIsReportedOnce(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "v"})
	started := false
	s.SetReaper(func(home.Dir) (func(), error) { return func() { started = true }, nil })
	for _, id := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(h.Trash(), id), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for i := range reapAtOnce + 1 {
		if err := os.WriteFile(filepath.Join(h.Trash(), "a", fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const want = "deleting in the background"
	if got := told(mustRepair(t, s), FoundTrash); !slices.Equal(got, []string{want, want}) || !started {
		t.Errorf("%q, started %t", got, started)
	}
	if err := s.ReapTrash(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestTrashThatCannotBeDeleted is reported once, with the reason and a way out,
// and is an error.
func TestTrashThatCannotBeDeleted(t *testing.T) {
	s, h := newStore(t)
	mustCreate(t, s, Spec{Name: "v"})
	path := filepath.Join(h.Trash(), "stuck")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	free := makeStuck(t, path)
	found, err := s.Repair(t.Context())
	var e *errdefs.Error
	if !errors.As(err, &e) || !strings.Contains(err.Error(), path+" cannot be deleted: ") {
		t.Errorf("error: %v", err)
	}
	if len(found) != 1 || found[0].Kind != FoundTrash || found[0].Action != "" || found[0].Detail == "" {
		t.Errorf("%+v", found)
	}
	if _, err := s.Create(t.Context(), Spec{Name: "w"}); err != nil {
		t.Errorf("it keeps others from their work: %v", err)
	}
	free()
	if got := told(mustRepair(t, s), FoundTrash); !slices.Equal(got, []string{"deleted"}) {
		t.Errorf("afterwards: %q", got)
	}
}

// makeStuck makes a directory immutable, until free is called.
func makeStuck(t *testing.T, path string) (free func()) {
	t.Helper()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, immutable); err != nil {
		_ = f.Close()
		prereq.Root(t, "make a file immutable")
		prereq.Missing(t, "a file system with immutable files: %v", err)
	}
	free = func() {
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0)
		_ = f.Close()
	}
	t.Cleanup(free)
	return free
}

// TestBadImages: an image that is missing, no file or cut off is found, and its
// volume cannot be resized, not to its own size either.
func TestBadImages(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	kept := v.DiskPath + ".kept"
	if err := os.Rename(v.DiskPath, kept); err != nil {
		t.Fatal(err)
	}
	for what, put := range map[string]func() error{
		"is missing":          func() error { return os.WriteFile(v.DiskPath+".other", nil, 0o600) },
		"is no regular file":  func() error { return unix.Mkfifo(v.DiskPath, 0o600) },
		"has 100 of 4194304":  func() error { return os.WriteFile(v.DiskPath, make([]byte, 100), 0o600) },
		"is no regular file:": func() error { return os.Symlink(kept, v.DiskPath) },
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
		found, err := s.Check(t.Context())
		for _, found := range [][]Finding{found, mustRepair(t, s)} {
			if len(found) != 1 || found[0].Kind != FoundImage || found[0].Name != "d" || found[0].Action != "" || !strings.Contains(found[0].Detail, what) {
				t.Errorf("%s: %+v, %v", what, found, err)
			}
		}
		for _, size := range []uint32{4, 8} {
			if _, err := s.Grow(t.Context(), "d", size); !errdefs.Is(err, errdefs.Filesystem) || !strings.Contains(err.Error(), strings.TrimSuffix(what, ":")) {
				t.Errorf("%s: grow to %d: %v", what, size, err)
			}
		}
		_ = os.Remove(v.DiskPath)
	}
	if err := os.Rename(kept, v.DiskPath); err != nil {
		t.Fatal(err)
	}
}

// TestKilledGrowIsRecorded: the command after a killed Grow records the new
// size, and repair says so, whether the image has a mark or not.
func TestKilledGrowIsRecorded(t *testing.T) {
	needMkfs(t)
	for _, point := range []string{"volstore.grow.lengthened", "volstore.grow.recorded"} {
		for name, next := range map[string]func(s *Store) []Finding{
			"create": func(s *Store) []Finding { _, err := s.Create(t.Context(), Spec{Name: "other"}); return failed(err) },
			"repair": func(s *Store) []Finding { return mustRepair(t, s) },
		} {
			s, h := newStore(t)
			mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
			if err := child(h, "grow d", point+"=kill").Run(); err == nil {
				t.Fatal("not killed")
			}
			found, err := s.Check(t.Context())
			if pending := told(found, FoundResize); err != nil || (len(pending) == 1) != (point == "volstore.grow.lengthened") {
				t.Errorf("%s: check: %q, %v", point, pending, err)
			}
			got := told(next(s), FoundResize)
			if want := "d recorded the size of its image, 8 MiB"; name == "repair" && point == "volstore.grow.lengthened" && !slices.Equal(got, []string{want}) {
				t.Errorf("%s: repair said %q", point, got)
			}
			if v, err := s.Get(t.Context(), "d"); err != nil || v.CapacityBytes != 8*mib {
				t.Errorf("%s, then %s: %+v, %v", point, name, v, err)
			}
			if left, err := listNames(h.Staging()); err != nil || len(left) > 0 {
				t.Errorf("%s, then %s: left %q, %v", point, name, left, err)
			}
		}
	}
}

// failed is a finding that no test expects.
func failed(err error) []Finding {
	if err == nil {
		return nil
	}
	return []Finding{{Kind: FoundResize, Action: err.Error()}}
}

// TestRepairRecordsALongerImage: one that nobody has marked, and not while it is held.
func TestRepairRecordsALongerImage(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	a, err := s.Attach(t.Context(), "d", Exclusive, Holder{PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(v.DiskPath, 16*mib); err != nil {
		t.Fatal(err)
	}
	if got := mustRepair(t, s); len(got) != 0 {
		t.Errorf("while it is held: %+v", got)
	}
	if err := errors.Join(a.MarkClean(), a.Close()); err != nil {
		t.Fatal(err)
	}
	if got := told(mustRepair(t, s), FoundResize); !slices.Equal(got, []string{"d recorded the size of its image, 16 MiB"}) {
		t.Errorf("%q", got)
	}
	if got := sizes(t, s, "d"); got[0] != 16 {
		t.Errorf("sizes %v", got)
	}
}

// TestBusyByResize: who is kept out by a resize is told so.
func TestBusyByResize(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	a, err := s.hold(context.Background(), v, Exclusive, Holder{PID: os.Getpid(), Task: taskResize})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	var e *errdefs.Error
	err = s.Remove(t.Context(), "v")
	if !errors.Is(err, errdefs.ErrVolumeInUse) || !errors.As(err, &e) || e.Hint == "" || !strings.Contains(err.Error(), fmt.Sprintf("is being resized by process %d", os.Getpid())) {
		t.Error(err)
	}
}

// TestDamagedRecord: a record that somebody has edited stops nobody but who wants
// that volume. The error names it and the way out, which restores it.
func TestDamagedRecord(t *testing.T) {
	s, h := newStore(t)
	for column, broken := range map[string]string{"labels": "no JSON", "created_ns": "yesterday", "dev": "x"} {
		want := mustCreate(t, s, Spec{Name: "v" + column[:1], Labels: map[string]string{"protect": "yes"}})
		other := mustCreate(t, s, Spec{Name: "other"})
		editRecord(t, h, "UPDATE volume SET "+column+" = ? WHERE id = ?", broken, want.ID)

		all, err := s.List(t.Context(), Filter{})
		if len(all) == 0 || slices.ContainsFunc(all, func(v *Volume) bool { return v.ID == want.ID }) || !slices.ContainsFunc(all, func(v *Volume) bool { return v.ID == other.ID }) {
			t.Errorf("%s: listed %+v", column, all)
		}
		_, get := s.Get(t.Context(), want.Name)
		_, prune := s.Prune(t.Context(), PruneFilter{})
		for op, err := range map[string]error{"list": err, "get": get, "prune": prune, "remove": s.Remove(t.Context(), want.Name)} {
			var e *errdefs.Error
			if !errors.As(err, &e) || !strings.Contains(e.Hint, "volume repair") || !strings.Contains(err.Error(), `the record of volume "`+want.Name+`" is damaged: `+column) || strings.ContainsAny(err.Error(), "\x1e\x1f") {
				t.Errorf("%s: %s: %v", column, op, err)
			}
		}
		if err := s.Remove(t.Context(), "other"); err != nil {
			t.Errorf("%s: %v", column, err)
		}
		found, err := s.Check(t.Context())
		found = slices.DeleteFunc(found, func(f Finding) bool { return f.Kind == FoundTrash }) // of other
		if err != nil || len(found) != 1 || found[0].Kind != FoundRecord || found[0].Detail == "" {
			t.Errorf("%s: check: %+v, %v", column, found, err)
		}
		if got := told(mustRepair(t, s), FoundRecord); !slices.Equal(got, []string{want.Name + " restored its damaged record from the copy"}) {
			t.Errorf("%s: repair: %+v", column, got)
		}
		if v, err := s.Get(t.Context(), want.Name); err != nil || !reflect.DeepEqual(v, want) {
			t.Errorf("%s: %+v, %v, not %+v", column, v, err, want)
		}
	}
}

// TestDamagedRecordWithoutACopy is left alone.
func TestDamagedRecordWithoutACopy(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	note := filepath.Join(h.State(v.ID), noteName)
	editRecord(t, h, "UPDATE volume SET labels = ?", "broken")
	if err := os.Rename(note, note+".away"); err != nil {
		t.Fatal(err)
	}
	found := mustRepair(t, s)
	if len(found) != 1 || found[0].Kind != FoundRecord || found[0].Action != "" || !strings.Contains(found[0].Detail, h.DB()) {
		t.Errorf("%+v", found)
	}
	if err := os.Rename(note+".away", note); err != nil {
		t.Fatal(err)
	}
	mustRepair(t, s)
}

func editRecord(t *testing.T, h home.Dir, query string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite", h.DB())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestKilledGrowOfAnotherImage: the length of an image that is not the volume's is
// nothing to record.
func TestKilledGrowOfAnotherImage(t *testing.T) {
	needMkfs(t)
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	if err := child(h, "grow d", "volstore.grow.lengthened=kill").Run(); err == nil {
		t.Fatal("not killed")
	}
	away := filepath.Join(t.TempDir(), "d")
	if err := errors.Join(os.Rename(v.Path, away), os.CopyFS(v.Path, os.DirFS(away)), os.Truncate(v.DiskPath, 32*mib)); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, Spec{Name: "other"})
	mustRepair(t, s)
	if v, err := s.Get(t.Context(), "d"); err != nil || v.CapacityBytes != 4*mib {
		t.Errorf("%+v, %v", v, err)
	}
	if err := errors.Join(os.RemoveAll(v.Path), os.Rename(away, v.Path)); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, s, Spec{Name: "more"})
	if got := sizes(t, s, "d"); got[0] != 8 {
		t.Errorf("sizes %v", got)
	}
}
