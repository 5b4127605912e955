package volstore

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestKilledBeforeEverySystemCall kills each operation before its 1st, 2nd, ...
// mutating system call, counted over all threads and children (mkfs.ext4), until
// it ends by itself, each time on a fresh home and with the aftermaths in turn.
func TestKilledBeforeEverySystemCall(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	kills := 0
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			if sc.disk {
				needMkfs(t)
			}
			n := 1
			for ; ; n++ {
				h := sc.prepared(t)
				if !storetest.KillAt(t, child(h, sc.op, ""), n) {
					break
				}
				kills++
				after := aftermaths[n%len(aftermaths)]
				after.check(t, sc, h, sc.op+" killed before system call")
				if t.Failed() {
					t.Fatalf("that was call %d", n)
				}
				_ = os.RemoveAll(string(h))
			}
			if n < 10 {
				t.Errorf("only %d calls were seen", n)
			}
			t.Logf("%d kills", n-1)
		})
	}
	t.Logf("%d kills in all", kills)
}

// createRecordFirst is Create with a planted bug: the record is committed
// before the data has its name.
func createRecordFirst(ctx context.Context, s *Store, name string) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	st, err := s.stage(ctx, Spec{Name: name})
	if err != nil {
		return err
	}
	defer st.drop()
	if err := db.InsertVolume(ctx, &st.record); err != nil {
		return err
	}
	st.done = true
	if err := renameNew(filepath.Join(st.path, dataName), s.home.Volume(name)); err != nil {
		return err
	}
	return renameNew(st.path, s.home.State(st.record.ID))
}

// recorder counts what would have failed the test.
type recorder struct {
	testing.TB
	problems int
}

func (r *recorder) Errorf(string, ...any) { r.problems++ }

// TestSweepFindsAPlantedBug shows that the sweep is able to fail.
func TestSweepFindsAPlantedBug(t *testing.T) {
	r := &recorder{TB: t}
	sc := scenario{op: "create-record-first a"}
	for n := 1; ; n++ {
		h := sc.prepared(t)
		if !storetest.KillAt(t, child(h, sc.op, ""), n) {
			break
		}
		aftermaths[n%len(aftermaths)].check(r, sc, h, "planted bug")
	}
	if r.problems == 0 {
		t.Error("nothing was found")
	}
	t.Logf("%d problems found", r.problems)
}
