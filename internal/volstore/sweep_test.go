package volstore

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// stop is what happens to an operation before one of its system calls: it is
// killed there, or goes on, and somebody may put directories at its names.
type stop struct {
	intrusion
	goesOn bool
}

// stops: both kinds of kill and one of the others are tried at every call;
// TestKilledAtEveryPoint kills with replaced directories too.
var stops = []stop{
	{intrusion: intrusions[0]},
	{intrusion: intrusions[1]},
	{intrusion: intrusions[1], goesOn: true},
	{intrusion: intrusions[2], goesOn: true},
}

// before runs the scenario's operation on a fresh home to its n-th mutating
// system call, stops it there and checks what is left.
func (st stop) before(t testing.TB, sc scenario, n int, f first) (reached bool) {
	t.Helper()
	h := sc.prepared(t)
	defer discard(h)
	if sc.stranger && st.goesOn && st.replace {
		st.intrusion = intrusions[0] // the operation is to adopt whatever it finds
	}
	var strangers map[string]string
	reached = storetest.StopAt(t, child(h, sc.op, ""), n, func() (kill bool) {
		strangers = st.place(t, h)
		return !st.goesOn
	})
	if reached {
		how := "killed"
		if st.goesOn {
			how = "disturbed"
		}
		aftermath{st.intrusion, f, strangers}.check(t, sc, h, fmt.Sprintf("%s %s before system call %d", sc.op, how, n))
	}
	return reached
}

// TestKilledBeforeEverySystemCall kills each operation before its 1st, 2nd, ...
// mutating system call, counted over all threads and children (mkfs.ext4), until
// it ends by itself, each time on a fresh home: with nobody else there and with a
// stranger's directory at each free name. It also lets them go on when strangers
// have come to the free names or, in turn, replaced the others.
func TestKilledBeforeEverySystemCall(t *testing.T) {
	if testing.Short() {
		t.Skip("missing: time for thousands of kills, with -short")
	}
	var kills, disturbed atomic.Int64
	t.Run("all", func(t *testing.T) {
		for _, sc := range scenarios() {
			t.Run(sc.name, func(t *testing.T) {
				t.Parallel()
				if sc.disk {
					needMkfs(t)
				}
				n := 0
				for goOn := true; goOn && !t.Failed(); {
					n++
					for i, st := range []stop{stops[0], stops[1], stops[2+n%2]} {
						if goOn = st.before(t, sc, n, firsts[(n+i)%len(firsts)]); !goOn {
							break
						}
						if st.goesOn {
							disturbed.Add(1)
						} else {
							kills.Add(1)
						}
					}
				}
				if n <= 3 { // attaching makes three
					t.Errorf("only %d calls were seen", n-1)
				}
				t.Logf("%d calls", n-1)
			})
		}
	})
	t.Logf("%d kills and %d disturbances in all", kills.Load(), disturbed.Load())
}

// removeRenameFirst is Remove with a planted bug: the data is moved before the
// record is a tombstone.
func removeRenameFirst(ctx context.Context, s *Store, name string) error {
	db, done, err := s.records(ctx, true)
	if err != nil {
		return err
	}
	defer done()
	r, err := db.VolumeByName(ctx, name)
	if err != nil {
		return err
	}
	if _, err := s.clearName(r.ID, r.Name, r.Identity); err != nil {
		return err
	}
	return db.DeleteVolume(ctx, r)
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
	sc := scenario{op: "remove-rename-first a", setup: func(t testing.TB, s *Store, _ home.Dir) {
		mustCreate(t, s, Spec{Name: "a"})
	}}
	for n := 1; stops[0].before(r, sc, n, firsts[n%len(firsts)]); n++ {
	}
	if r.problems == 0 {
		t.Error("nothing was found")
	}
	t.Logf("%d problems found", r.problems)
}
