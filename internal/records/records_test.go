package records

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

const (
	childVar = "MSB_TEST_RECORDS_HOME"
	loseVar  = "MSB_TEST_RECORDS_LOSE_JOURNAL" // the child deletes its journal once the home is open
)

// TestMain lets the test binary stand in for a process that opens a home and
// adds one volume.
func TestMain(m *testing.M) {
	if h := os.Getenv(childVar); h != "" {
		if err := failpoint.ArmFromEnv(); err != nil {
			panic(err)
		}
		if err := childMain(home.Dir(h)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func childMain(h home.Dir) error {
	d, err := Open(context.Background(), h)
	if err != nil {
		return err
	}
	defer d.Close()
	if os.Getenv(loseVar) != "" {
		if err := os.Remove(h.DB() + "-journal"); err != nil {
			return err
		}
	}
	return d.InsertVolume(context.Background(), testVolume(fmt.Sprintf("p%d", os.Getpid())))
}

func childCommand(h home.Dir, failpoints string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+string(h), failpoint.EnvVar+"="+failpoints)
	return cmd
}

func testVolume(name string) *Volume {
	return &Volume{
		ID: "id-" + name, Name: name, Kind: "disk", QuotaMiB: 7, CapacityBytes: 1 << 40, DiskFormat: "raw", DiskFstype: "ext4",
		Labels:    map[string]string{"a": "1", "quo\"te": "b,c\":\"\n<"},
		CreatedAt: time.Unix(1700000000, 123456789).UTC(),
		Identity:  Identity{Dev: 1<<64 - 1, Ino: 1 << 63, BirthNS: -5},
	}
}

func mustOpen(t *testing.T, h home.Dir) *DB {
	t.Helper()
	d, err := Open(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func mustRead(t *testing.T, h home.Dir) *DB {
	t.Helper()
	d, err := OpenReader(t.Context(), h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func names(t *testing.T, d *DB) []string {
	t.Helper()
	all, err := d.ListVolumes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, v := range all {
		out = append(out, v.Name)
	}
	return out
}

func TestVolumeRecord(t *testing.T) {
	h := home.Dir(filepath.Join(t.TempDir(), "deep", "home?x#y%41"))
	d := mustOpen(t, h)
	v := testVolume("a")
	if err := d.InsertVolume(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]*DB{"writer": d, "reader": mustRead(t, h)} {
		got, err := r.VolumeByName(t.Context(), "a")
		if diff := cmp.Diff(v, got); err != nil || diff != "" {
			t.Errorf("%s: VolumeByName: %v\n%s", name, err, diff)
		}
	}
	if err := d.InsertVolume(t.Context(), v); !errdefs.Is(err, errdefs.VolumeAlreadyExists) {
		t.Errorf("second insert: %v", err)
	}
	if err := d.DeleteVolume(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	if err := d.DeleteVolume(t.Context(), v); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("second delete: %v", err)
	}
	tombs, err := d.Tombstones(t.Context())
	if err != nil || len(tombs) != 1 || tombs[0].Identity != v.Identity {
		t.Errorf("tombstones: %+v, %v", tombs, err)
	}
	if err := d.InsertVolume(t.Context(), v, v.ID); err != nil {
		t.Errorf("insert after delete: %v", err)
	}
	if tombs, _ := d.Tombstones(t.Context()); len(tombs) != 0 {
		t.Errorf("settled tombstone is still there: %+v", tombs)
	}
}

func TestListNewestFirst(t *testing.T) {
	d := mustOpen(t, home.Dir(t.TempDir()))
	for i, name := range []string{"old", "tie-a", "tie-b", "new"} {
		v := testVolume(name)
		v.CreatedAt = time.Unix(0, []int64{1, 5, 5, 5_000_000_000}[i])
		if err := d.InsertVolume(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"new", "tie-b", "tie-a", "old"}, names(t, d)); diff != "" {
		t.Error(diff)
	}
}

func TestSandboxRecords(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	for i := range 7 {
		s := &Sandbox{ID: fmt.Sprint("id", i), Name: fmt.Sprint("s", i), Status: "created", Config: []byte(`{"a":1}`),
			Labels: map[string]string{"odd": fmt.Sprint(i % 2)}, CreatedAt: time.Unix(0, int64(i/2)+1).UTC()}
		if err := d.InsertSandbox(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.InsertSandbox(t.Context(), &Sandbox{ID: "x", Name: "s1"}); !errdefs.Is(err, errdefs.SandboxAlreadyExists) {
		t.Errorf("name taken: %v", err)
	}
	if err := d.UpdateSandbox(t.Context(), "id3", "running", "oops", nil); err != nil {
		t.Fatal(err)
	}
	s, err := d.SandboxByName(t.Context(), "s3")
	if err != nil || s.Status != "running" || s.LastError != "oops" || string(s.Config) != `{"a":1}` || s.UpdatedAt.Equal(s.CreatedAt) {
		t.Errorf("after update: %+v, %v", s, err)
	}
	if got, want := pages(t, d, SandboxFilter{Limit: 2}), "s6|s5 s4|s3 s2|s1 s0"; got != "s6 s5|s4 s3|s2 s1|s0" {
		t.Errorf("pages = %q (not %q)", got, want)
	}
	if got := pages(t, d, SandboxFilter{Limit: 3, Labels: map[string]string{"odd": "0"}}); got != "s6 s4 s2|s0" {
		t.Errorf("pages of even ones = %q", got)
	}
	if _, _, err := d.ListSandboxes(t.Context(), SandboxFilter{Cursor: "?"}); !errdefs.Is(err, errdefs.InvalidArgument) {
		t.Errorf("bad cursor: %v", err)
	}
	if err := d.DeleteSandbox(t.Context(), "id3"); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		d.DeleteSandbox(t.Context(), "id3"), d.UpdateSandbox(t.Context(), "id3", "", "", nil), second(d.SandboxByName(t.Context(), "s3")),
	} {
		if !errdefs.Is(err, errdefs.SandboxNotFound) {
			t.Errorf("gone sandbox: %v", err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func pages(t *testing.T, d *DB, f SandboxFilter) (out string) {
	t.Helper()
	for {
		page, next, err := d.ListSandboxes(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range page {
			if i > 0 {
				out += " "
			}
			out += s.Name
		}
		if next == "" {
			return out
		}
		out, f.Cursor = out+"|", next
	}
}

func TestReaderOfNothing(t *testing.T) {
	h := home.Dir(filepath.Join(t.TempDir(), "none"))
	d := mustRead(t, h)
	if got := names(t, d); len(got) != 0 {
		t.Errorf("volumes %v", got)
	}
	if _, err := d.VolumeByName(t.Context(), "a"); !errdefs.Is(err, errdefs.VolumeNotFound) {
		t.Errorf("VolumeByName: %v", err)
	}
	if _, err := os.Stat(string(h)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the home was made by a reader: %v", err)
	}
	if d.Stale() {
		t.Error("stale before the home exists")
	}
	mustOpen(t, h)
	if !d.Stale() {
		t.Error("not stale after the home was made")
	}
}

func TestPeerHomeIsRefused(t *testing.T) {
	h := home.Dir(t.TempDir())
	if err := os.MkdirAll(filepath.Dir(h.PeerDB()), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.PeerDB(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), h)
	var e *errdefs.Error
	if !errors.As(err, &e) || e.Kind != errdefs.InvalidConfig || e.Hint == "" {
		t.Errorf("Open: %v", err)
	}
	if entries, _ := os.ReadDir(string(h)); len(entries) != 1 {
		t.Errorf("the peer's home was written: %v", entries)
	}
	if got := names(t, mustRead(t, h)); len(got) != 0 {
		t.Errorf("volumes %v", got)
	}
}

func TestNewerSchemaIsRefusedUntouched(t *testing.T) {
	h := home.Dir(t.TempDir())
	mustOpen(t, h).Close()
	plain := openPlain(t, h.DB())
	if _, err := plain.Exec(fmt.Sprintf("PRAGMA user_version=%d", schemaVersion+1)); err != nil {
		t.Fatal(err)
	}
	plain.Close()
	before := snapshot(t, string(h))
	for name, open := range map[string]func(context.Context, home.Dir) (*DB, error){"Open": Open, "OpenReader": OpenReader} {
		if _, err := open(t.Context(), h); !errdefs.Is(err, errdefs.InvalidConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if diff := cmp.Diff(before, snapshot(t, string(h))); diff != "" {
		t.Error(diff)
	}
}

func TestOldSchemaIsMigrated(t *testing.T) {
	for name, open := range map[string]func(context.Context, home.Dir) (*DB, error){"Open": Open, "OpenReader": OpenReader} {
		t.Run(name, func(t *testing.T) {
			h := home.Dir(t.TempDir())
			if err := h.Ensure(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(h.DB(), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			d, err := open(t.Context(), h)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if v, err := d.version(t.Context()); err != nil || v != schemaVersion {
				t.Errorf("version %d, %v", v, err)
			}
			if got := names(t, d); len(got) != 0 {
				t.Errorf("volumes %v", got)
			}
		})
	}
}

// TestMigrationKeepsVolumes: volumes of the first schema are there after a
// migration.
func TestMigrationKeepsVolumes(t *testing.T) {
	h := home.Dir(t.TempDir())
	first, err := migrations.ReadFile("migrations/00001_first.sql")
	if err != nil {
		t.Fatal(err)
	}
	old := openPlain(t, h.DB())
	for _, text := range []string{string(first), "PRAGMA user_version=1",
		"INSERT INTO volume (" + volumeColumns + ") VALUES ('1','a','dir',0,0,'','','{}',1,1,2,3,'')"} {
		if _, err := old.Exec(text); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{{"a"}, {"a", "b"}} {
		d := mustOpen(t, h)
		got := names(t, d)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("volumes %v, want %v", got, want)
		}
		if len(want) == 1 {
			if err := d.InsertVolume(t.Context(), testVolume("b")); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// snapshot maps every file below dir to its content and times.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		var data []byte
		if fi.Mode().IsRegular() {
			data, err = os.ReadFile(path)
		}
		out[path] = fmt.Sprint(fi.Mode(), fi.ModTime(), fi.Size(), string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestReadingWritesNothing(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	if err := d.InsertVolume(t.Context(), testVolume("a")); err != nil {
		t.Fatal(err)
	}
	d.Close()
	before := snapshot(t, string(h))
	r := mustRead(t, h)
	if diff := cmp.Diff([]string{"a"}, names(t, r)); diff != "" {
		t.Error(diff)
	}
	r.Close()
	if diff := cmp.Diff(before, snapshot(t, string(h))); diff != "" {
		t.Error(diff)
	}
}

// hotHome makes a home whose database holds an uncommitted volume "ghost" and
// whose journal says how to undo it, as a writer killed during its commit leaves it.
func hotHome(t *testing.T, dir string) home.Dir {
	t.Helper()
	h := home.Dir(filepath.Join(dir, "live"))
	d := mustOpen(t, h)
	if err := d.InsertVolume(t.Context(), testVolume("real")); err != nil {
		t.Fatal(err)
	}
	dead := home.Dir(filepath.Join(dir, "dead"))
	if err := dead.Ensure(); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	err := d.update(t.Context(), "ghost", func(q querier) error {
		// More than the page cache holds: SQLite writes pages before the commit.
		for i := range 800 {
			name := fmt.Sprint("ghost", i, strings.Repeat("-", 1000))
			if _, err := q.exec("INSERT INTO volume ("+volumeColumns+") VALUES ($1,$1,'dir',0,0,'','','',0,0,0,0,'')", name); err != nil {
				return err
			}
		}
		copyFile(t, h.DB(), dead.DB())
		copyFile(t, h.DB()+"-journal", dead.DB()+"-journal")
		return stop
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	return dead
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestHotJournal(t *testing.T) {
	for name, open := range map[string]func(*testing.T, home.Dir) *DB{"reader": mustRead, "writer": mustOpen} {
		t.Run(name, func(t *testing.T) {
			h := hotHome(t, t.TempDir())
			if diff := cmp.Diff([]string{"real"}, names(t, open(t, h))); diff != "" {
				t.Error(diff)
			}
		})
	}
	t.Run("appears under an open reader", func(t *testing.T) {
		dir := t.TempDir()
		h := hotHome(t, dir)
		live := home.Dir(filepath.Join(dir, "live"))
		r := mustRead(t, live)
		names(t, r)
		// What the kill leaves, put in place while the reader has no lock.
		copyFile(t, h.DB(), live.DB())
		copyFile(t, h.DB()+"-journal", live.DB()+"-journal")
		if diff := cmp.Diff([]string{"real"}, names(t, r)); diff != "" {
			t.Error(diff)
		}
	})
}

func TestHotJournalOnReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	h := hotHome(t, t.TempDir())
	storetest.MakeReadonly(t, string(h))
	r := mustRead(t, h)
	if diff := cmp.Diff([]string{"real"}, names(t, r)); diff != "" {
		t.Error(diff)
	}
	copied := r.copied
	if copied == "" || r.Stale() {
		t.Errorf("copied to %q, stale %v", copied, r.Stale())
	}
	r.Close()
	if _, err := os.Stat(copied); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("private copy is left: %v", err)
	}
	if _, err := Open(t.Context(), h); !errdefs.Is(err, errdefs.IO) {
		t.Errorf("Open: %v", err)
	}
}

func TestReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	if err := d.InsertVolume(t.Context(), testVolume("a")); err != nil {
		t.Fatal(err)
	}
	d.Close()
	storetest.MakeReadonly(t, string(h))
	if diff := cmp.Diff([]string{"a"}, names(t, mustRead(t, h))); diff != "" {
		t.Error(diff)
	}
	w, err := Open(t.Context(), h)
	if err == nil {
		err = w.InsertVolume(t.Context(), testVolume("b"))
		w.Close()
	}
	var e *errdefs.Error
	if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
		t.Errorf("write on a read-only home: %v", err)
	}
}

// TestFullDisk fills the file system to the last byte: reading and removing go
// on until nothing is left to remove, inserting fails cleanly at last.
func TestFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	dir := storetest.Tmpfs(t, "8m")
	h := home.Dir(filepath.Join(dir, "home"))
	d := mustOpen(t, h)
	var have []*Volume
	for i := range 400 {
		v := testVolume(fmt.Sprintf("a-rather-long-name-of-a-volume-%04d", i))
		if err := d.InsertVolume(t.Context(), v); err != nil {
			t.Fatal(err)
		}
		have = append(have, v)
	}
	storetest.Fill(t, dir)
	for i := 0; ; i++ {
		v := testVolume(fmt.Sprintf("another-long-name-of-a-volume-%04d", i))
		err := d.InsertVolume(t.Context(), v)
		if err == nil {
			have = append(have, v)
			continue
		}
		var e *errdefs.Error
		if !errors.As(err, &e) || e.Kind != errdefs.IO || e.Hint == "" {
			t.Fatalf("insert on a full disk: %v", err)
		}
		t.Logf("%d inserts at 0 bytes free, then: %v", i, err)
		break
	}
	if got := len(names(t, mustRead(t, h))); got != len(have) {
		t.Errorf("%d volumes listed, %d stored", got, len(have))
	}
	for _, v := range have {
		if err := d.DeleteVolume(t.Context(), v); err != nil {
			t.Fatalf("delete on a full disk: %v", err)
		}
	}
}

// TestKilledWhileMakingTheHome kills a process at each point of this package
// and demands that the next one works as if nothing had happened.
func TestKilledWhileMakingTheHome(t *testing.T) {
	reached := 0
	for _, point := range failpoint.Names() {
		if point == "records.migrated" { // a new home is not migrated
			continue
		}
		t.Run(point, func(t *testing.T) {
			h := home.Dir(filepath.Join(t.TempDir(), "home"))
			if err := childCommand(h, point+"=kill").Run(); err == nil || err.Error() != "signal: killed" {
				t.Fatalf("child: %v", err)
			}
			reached++
			if got := names(t, mustRead(t, h)); len(got) != 0 {
				t.Errorf("volumes after the kill: %v", got)
			}
			if out, err := childCommand(h, "").CombinedOutput(); err != nil {
				t.Fatalf("next command: %v\n%s", err, out)
			}
			if got := names(t, mustRead(t, h)); len(got) != 1 {
				t.Errorf("volumes: %v", got)
			}
			if _, err := os.Stat(h.DB() + ".new"); err == nil && point != "records.home.linked" {
				t.Error("temporary database is left")
			}
		})
	}
	if reached < 4 {
		t.Errorf("%d points reached", reached)
	}
}

func TestKilledWhileMigrating(t *testing.T) {
	h := home.Dir(t.TempDir())
	if err := h.Ensure(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.DB(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := childCommand(h, "records.migrated=kill").Run(); err == nil || err.Error() != "signal: killed" {
		t.Fatalf("child: %v", err)
	}
	if out, err := childCommand(h, "").CombinedOutput(); err != nil {
		t.Fatalf("next command: %v\n%s", err, out)
	}
}

// TestColdHomeRace starts several processes on a home that does not exist.
func TestColdHomeRace(t *testing.T) {
	h := home.Dir(filepath.Join(t.TempDir(), "home"))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if out, err := childCommand(h, "").CombinedOutput(); err != nil {
				t.Errorf("child: %v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	if got := names(t, mustRead(t, h)); len(got) != 8 {
		t.Errorf("volumes: %v", got)
	}
}

func TestJournalOfADeletedDatabase(t *testing.T) {
	h := hotHome(t, t.TempDir())
	if err := os.Remove(h.DB()); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, h)
	if err := d.InsertVolume(t.Context(), testVolume("a")); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a"}, names(t, d)); diff != "" {
		t.Error(diff)
	}
}

func TestCancelled(t *testing.T) {
	h := home.Dir(t.TempDir())
	d := mustOpen(t, h)
	other := openPlain(t, h.DB())
	other.SetMaxOpenConns(1)
	if _, err := other.Exec("BEGIN EXCLUSIVE"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := d.InsertVolume(ctx, testVolume("a"))
	if !errdefs.Is(err, errdefs.Cancelled) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("insert while locked: %v", err)
	}
	if _, err := other.Exec("ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if err := d.InsertVolume(t.Context(), testVolume("a")); err != nil {
		t.Errorf("insert afterwards: %v", err)
	}
}

// TestRootLeavesTheHomesOfOthersAlone: what root writes there, its owner could
// not use.
func TestRootLeavesTheHomesOfOthersAlone(t *testing.T) {
	prereq.Root(t, "give a directory away")
	h := home.Dir(t.TempDir())
	if err := os.Chown(string(h), 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), h); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("Open = %v, want a refusal", err)
	}
	if left, err := os.ReadDir(string(h)); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
