package volstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

func mustUsed(t *testing.T, s *Store, v *Volume) ledger.State {
	t.Helper()
	state, ok, err := s.Used(v)
	if err != nil || !ok {
		t.Fatalf("used: %+v, %v, %v", state, ok, err)
	}
	return state
}

// grow lets a writer of the volume charge and make a file.
func growVolume(t *testing.T, s *Store, v *Volume, name string, size int) {
	t.Helper()
	w, err := s.NewWriter(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	op := w.Lock()
	d := ledger.Delta{Bytes: ledger.Rules{}.File(int64(size)), Inodes: 1}
	err = op.Grow(d)
	if err == nil {
		err = os.WriteFile(filepath.Join(v.Path, name), make([]byte, size), 0o600)
	}
	if err := errors.Join(err, op.Done(d), w.Close()); err != nil {
		t.Fatal(err)
	}
}

// damages are things that may lie where a ledger was.
var damages = map[string]func(path string) error{
	"empty":         func(path string) error { return os.WriteFile(path, nil, 0o600) },
	"zeros":         func(path string) error { return os.WriteFile(path, make([]byte, 8192), 0o600) },
	"other version": func(path string) error { return os.WriteFile(path, []byte("msbledg\x02"), 0o600) },
	"huge":          func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<43)) },
	"link":          func(path string) error { return os.Symlink("/etc/hostname", path) },
	"loop":          func(path string) error { return os.Symlink(path, path) },
	"directory":     func(path string) error { return os.Mkdir(path, 0o700) },
	"pipe":          func(path string) error { return unix.Mkfifo(path, 0o600) },
	"socket":        func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
	"device":        func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
}

// TestDamagedLedger: a ledger that makes no sense, or is no file, hides what is
// known and nothing else: what is there is found by a walk, whoever asks is told
// what helps, and it helps.
func TestDamagedLedger(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			s, _ := newStore(t)
			v := mustCreate(t, s, Spec{Name: "v", QuotaMiB: 1, Inodes: 9})
			growVolume(t, s, v, "f", 5000)
			if err := errors.Join(os.Remove(s.ledgerPath(v.ID)), damage(s.ledgerPath(v.ID))); err != nil {
				prereq.Root(t, "make a device node")
				t.Fatal(err)
			}
			found := ledger.Delta{Bytes: 8192, Inodes: 1}
			limits := ledger.Limits{Bytes: 1 << 20, Inodes: 9}
			_, ok, err := s.Used(v)
			wantDamage(t, err, "msb volume usage v --rescan")
			if n, err := s.UsedBytes(t.Context(), v); err != nil || n != 8192 || ok {
				t.Errorf("used %d, %v, %v", n, ok, err)
			}
			for what, measure := range map[string]func(context.Context, *Volume) (Counted, error){"verify": s.Verify, "survey": s.Survey} {
				c, err := measure(t.Context(), v)
				if err != nil || !c.Damaged || !c.State.Uncounted || c.Found != found || c.State.Limits != limits {
					t.Errorf("%s: %+v, %v", what, c, err)
				}
			}
			if c, err := s.Recount(t.Context(), v.ID); err != nil || !c.Exact || c.Found != found {
				t.Errorf("recount: %+v, %v", c, err)
			}
			if got := mustUsed(t, s, v); got != (ledger.State{Limits: limits, Used: found}) {
				t.Errorf("state %+v", got)
			}
		})
	}
}

// TestDamagedLedgerInUse: a ledger is not made anew under somebody who has it.
func TestDamagedLedgerInUse(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	growVolume(t, s, v, "f", 5000)
	path := s.ledgerPath(v.ID)
	refused := func(what string, err error) {
		t.Helper()
		wantDamage(t, err, "stop what uses it first")
		if !errors.Is(err, errdefs.ErrVolumeInUse) {
			t.Errorf("%s: %v", what, err)
		}
	}
	w, err := s.NewWriter(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.Recount(t.Context(), v.ID)
	refused("recount", err)
	_, err = s.OpenLedger(t.Context(), v.ID)
	refused("open", err)
	_ = w.Close()

	a, err := s.Attach(t.Context(), "v", Shared, Holder{Sandbox: "box", PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.Symlink("/dev/null", path)); err != nil { // who has it cannot be seen
		t.Fatal(err)
	}
	_, err = s.Recount(t.Context(), v.ID)
	refused("recount of an attached volume", err)

	// A sandbox that starts after a power cut has the volume attached itself.
	if err := errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := s.OpenLedger(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	if got := mustUsed(t, s, v); got != (ledger.State{Used: ledger.Delta{Bytes: 8192, Inodes: 1}}) {
		t.Errorf("state %+v", got)
	}
}

// TestAllPlacesTaken: who finds 64 writers is told what helps.
func TestAllPlacesTaken(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	for range ledger.MaxWriters {
		w, err := s.NewWriter(t.Context(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
	}
	_, err := s.NewWriter(t.Context(), v.ID)
	var e *errdefs.Error
	if !errors.Is(err, unix.EBUSY) || !errors.As(err, &e) || !strings.Contains(e.Hint, "msb volume inspect v") {
		t.Errorf("%v, %+v", err, e)
	}
}

func wantDamage(t *testing.T, err error, hint string) {
	t.Helper()
	var e *errdefs.Error
	if !errors.Is(err, ledger.ErrDamaged) || !errors.As(err, &e) || !strings.Contains(e.Hint, hint) {
		t.Errorf("error %v, %+v", err, e)
	}
}

// TestDamagedLimits: a volume whose limit of files cannot be read can be used when
// it is set again, and no sooner.
func TestDamagedLimits(t *testing.T) {
	for name, damage := range damages {
		if name == "directory" {
			continue // which is for a person to remove
		}
		t.Run(name, func(t *testing.T) {
			s, h := newStore(t)
			v := mustCreate(t, s, Spec{Name: "v", Inodes: 9})
			path := filepath.Join(h.State(v.ID), limitsName)
			if err := errors.Join(os.Remove(path), damage(path)); err != nil {
				prereq.Root(t, "make a device node")
				t.Fatal(err)
			}
			_, err := s.OpenLedger(t.Context(), v.ID)
			var e *errdefs.Error
			if !errors.As(err, &e) || !strings.Contains(e.Hint, "msb volume set-quota v --inodes N") {
				t.Errorf("open: %v, %+v", err, e)
			}
			seven := int64(7)
			if _, err := s.SetQuota(t.Context(), v.ID, Quota{Inodes: &seven}); err != nil {
				t.Fatal(err)
			}
			if got := mustUsed(t, s, v); got.Limits.Inodes != 7 {
				t.Errorf("limits %+v", got.Limits)
			}
		})
	}
}

// age makes a ledger one of an earlier boot.
func age(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, base := range [][]byte{b[256:384], b[384:512]} {
		if binary.LittleEndian.Uint64(base[8:]) != 0 {
			base[32]++
			binary.LittleEndian.PutUint32(base, crc32.ChecksumIEEE(base[4:]))
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestUseAfterABoot: a ledger of an earlier boot bounds what is used; whoever looks
// at one volume finds out what it is, at once if it is small, and after the walk
// that msb volume usage makes anyway if it is large.
func TestUseAfterABoot(t *testing.T) {
	s, _ := newStore(t)
	small, large := mustCreate(t, s, Spec{Name: "small"}), mustCreate(t, s, Spec{Name: "large"})
	for i := range countAtOnce + 1 {
		if err := os.WriteFile(filepath.Join(large.Path, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.SetCounter(func(home.Dir, string) error { return nil })
	for _, v := range []*Volume{small, large} {
		if _, err := s.Recount(t.Context(), v.ID); err != nil {
			t.Fatal(err)
		}
		growVolume(t, s, v, "f", 5000)
		age(t, s.ledgerPath(v.ID))
		if got := mustUsed(t, s, v); !got.Foreign || got.Used.Bytes <= 8192 {
			t.Errorf("%s: a list says %+v", v.Name, got)
		}
	}
	if n, err := s.UsedBytes(t.Context(), small); err != nil || n != 8192 {
		t.Errorf("small: %d, %v", n, err)
	}
	if got := mustUsed(t, s, small); got.Used != (ledger.Delta{Bytes: 8192, Inodes: 1}) || got.Unsettled {
		t.Errorf("small: %+v", got)
	}
	if n, err := s.UsedBytes(t.Context(), large); err != nil || n <= 1<<20 {
		t.Errorf("large: %d, %v", n, err)
	}
	c, err := s.Survey(t.Context(), large)
	if err != nil || c.State.Unsettled || c.State.Used != c.Found || c.Found.Inodes != countAtOnce+2 {
		t.Errorf("survey: %+v, %v", c, err)
	}
	if got := mustUsed(t, s, large); got.Used != c.Found || got.Unsettled {
		t.Errorf("large: %+v", got)
	}
}

// TestUsageWhileWriting: who asks while somebody writes is told that there may be a
// reserve in the number.
func TestUsageWhileWriting(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	w, _ := serveLedger(t, s, v)
	defer w.Close()
	op := w.Lock()
	if err := errors.Join(op.Grow(ledger.Delta{Bytes: 4096}), op.Done(ledger.Delta{Bytes: 4096})); err != nil {
		t.Fatal(err)
	}
	if got := mustUsed(t, s, v); !got.Busy || got.Used.Bytes != 4096+ledger.Chunk {
		t.Errorf("while it writes: %+v", got)
	}
	if err := errors.Join(w.Poll(), w.Poll()); err != nil {
		t.Fatal(err)
	}
	if got := mustUsed(t, s, v); got.Busy || got.Used.Bytes != 4096 {
		t.Errorf("when it is idle: %+v", got)
	}
}

// TestSurveyLeavesWritersAlone: what is found is counted only where nobody writes.
func TestSurveyLeavesWritersAlone(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	w, f := serveLedger(t, s, v)
	op := w.Lock()
	if err := errors.Join(op.Grow(ledger.Delta{Bytes: 1 << 19}), w.Doubt()); err != nil {
		t.Fatal(err)
	}
	if c, err := s.Survey(t.Context(), v); err != nil || !c.State.Unsettled || c.State.Used.Bytes < 1<<19 || c.State.Writers != 1 {
		t.Errorf("with a writer: %+v, %v", c, err)
	}
	if err := f.Close(); err != nil { // as a kill does
		t.Fatal(err)
	}
	if c, err := s.Survey(t.Context(), v); err != nil || c.State != (ledger.State{}) {
		t.Errorf("after it was killed: %+v, %v", c, err)
	}
}

// TestNewVolumeHasALedger: it is there, empty and with the limits, before anybody
// opens the volume.
func TestNewVolumeHasALedger(t *testing.T) {
	s, _ := newStore(t)
	tests := map[string]struct {
		spec Spec
		want ledger.Limits
	}{
		"none":   {Spec{Name: "none"}, ledger.Limits{}},
		"quota":  {Spec{Name: "quota", QuotaMiB: 100}, ledger.Limits{Bytes: 100 << 20, Inodes: 25600}},
		"small":  {Spec{Name: "small", QuotaMiB: 1}, ledger.Limits{Bytes: 1 << 20, Inodes: 1024}},
		"inodes": {Spec{Name: "inodes", Inodes: 7}, ledger.Limits{Inodes: 7}},
		"both":   {Spec{Name: "both", QuotaMiB: 1, Inodes: 7}, ledger.Limits{Bytes: 1 << 20, Inodes: 7}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := mustUsed(t, s, mustCreate(t, s, tt.spec))
			if want := (ledger.State{Limits: tt.want}); got != want {
				t.Errorf("state %+v, want %+v", got, want)
			}
		})
	}
	if _, err := s.Create(t.Context(), Spec{Name: "bad", Inodes: -1}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("negative inodes: %v", err)
	}
	if _, err := s.Create(t.Context(), Spec{Name: "bad", Kind: KindDisk, SizeMiB: 4, Inodes: 1}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("inodes of a disk: %v", err)
	} else if !strings.Contains(err.Error(), "inodes") || strings.Contains(err.Error(), "quota") {
		t.Errorf("inodes of a disk, in the wrong words: %v", err)
	}
}

// TestLedgerOfAVolumeOfBefore: a volume without a ledger is measured by a walk
// until somebody writes; then it has one, which knows what was there.
func TestLedgerOfAVolumeOfBefore(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a", QuotaMiB: 1})
	if err := os.WriteFile(filepath.Join(v.Path, "old"), make([]byte, 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, damage := range []func() error{
		func() error { return os.Remove(s.ledgerPath(v.ID)) },
		func() error { return os.Truncate(s.ledgerPath(v.ID), 0) },
		func() error { return os.WriteFile(s.ledgerPath(v.ID), make([]byte, 8192), 0o600) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if _, ok, _ := s.Used(v); ok {
			t.Error("an unknown use is told")
		}
		if n, err := s.UsedBytes(t.Context(), v); err != nil || n != 8192 {
			t.Errorf("measured %d, %v", n, err)
		}
		w, err := s.NewWriter(t.Context(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		want := ledger.State{Limits: ledger.Limits{Bytes: 1 << 20, Inodes: 1024}, Used: ledger.Delta{Bytes: 8192, Inodes: 1}}
		if got := mustUsed(t, s, v); got != want {
			t.Errorf("state %+v, want %+v", got, want)
		}
	}
}

// TestLargeVolumeIsCountedInTheBackground: nobody waits for a walk of many files.
func TestLargeVolumeIsCountedInTheBackground(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	for i := range countAtOnce + 1 {
		if err := os.WriteFile(filepath.Join(v.Path, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(s.ledgerPath(v.ID)); err != nil {
		t.Fatal(err)
	}
	var asked string
	s.SetCounter(func(_ home.Dir, id string) error { asked = id; return nil })
	growVolume(t, s, v, "new", 1)
	if asked != v.ID {
		t.Errorf("asked to count %q", asked)
	}
	if state, ok, err := s.Used(v); ok || err != nil || !state.Uncounted {
		t.Errorf("before the walk: %+v, %v, %v", state, ok, err)
	}
	c, err := s.Recount(t.Context(), v.ID)
	if err != nil || !c.Exact || c.Found.Inodes != countAtOnce+2 || c.Found.Bytes < ledger.Block {
		t.Errorf("recount: %+v, %v", c, err)
	}
	if got := mustUsed(t, s, v); got.Used != c.Found || got.Unsettled {
		t.Errorf("after the walk: %+v", got)
	}
}

// TestKilledWriterIsCountedAtDetach: what a killed file server had in reserve is
// found to be unused when its sandbox gives the volume up.
func TestKilledWriterIsCountedAtDetach(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a"})
	a, err := s.Attach(t.Context(), "a", Shared, Holder{Sandbox: "box", PID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	w, f := serveLedger(t, s, v)
	op := w.Lock()
	if err := errors.Join(op.Grow(ledger.Delta{Bytes: 1}), op.Done(ledger.Delta{}), f.Close()); err != nil { // as a kill does
		t.Fatal(err)
	}
	if got := mustUsed(t, s, v); got.Used.Bytes == 0 || !got.Unsettled {
		t.Errorf("after the kill: %+v", got)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if got := mustUsed(t, s, v); got != (ledger.State{}) {
		t.Errorf("after the attachment: %+v", got)
	}
}

// TestSetQuota: limits change with and without writers, survive everything that
// makes a ledger anew, and are refused for disks.
func TestSetQuota(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a", QuotaMiB: 1})
	growVolume(t, s, v, "f", 600<<10)
	w, err := s.NewWriter(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	set := func(q Quota) *Volume {
		t.Helper()
		v, err := s.SetQuota(t.Context(), v.ID, q)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	grow := func(n int64) error {
		op := w.Lock()
		return errors.Join(op.Grow(ledger.Delta{Bytes: n}), op.Done(ledger.Delta{}))
	}
	mib2, zero, seven := uint32(2), uint32(0), int64(7)
	var full *errdefs.QuotaError
	if err := grow(800 << 10); !errors.As(err, &full) {
		t.Errorf("beyond 1 MiB: %v", err)
	}
	if v := set(Quota{MiB: &mib2, Inodes: &seven}); v.QuotaMiB != 2 {
		t.Errorf("record %+v", v)
	}
	if err := grow(800 << 10); err != nil {
		t.Errorf("within 2 MiB: %v", err)
	}
	want := ledger.Limits{Bytes: 2 << 20, Inodes: 7}
	if got := mustUsed(t, s, v); got.Limits != want {
		t.Errorf("limits %+v", got.Limits)
	}
	if err := errors.Join(w.Close(), os.Remove(s.ledgerPath(v.ID))); err != nil {
		t.Fatal(err)
	}
	growVolume(t, s, v, "g", 1)
	if got := mustUsed(t, s, v); got.Limits != want {
		t.Errorf("limits of a ledger made anew: %+v", got.Limits)
	}
	set(Quota{MiB: &zero})
	none := int64(0)
	set(Quota{Inodes: &none})
	if got := mustUsed(t, s, v); got.Limits != (ledger.Limits{}) {
		t.Errorf("limits taken away: %+v", got.Limits)
	}
	bad := int64(-1)
	if _, err := s.SetQuota(t.Context(), v.ID, Quota{Inodes: &bad}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("negative: %v", err)
	}
}

func TestSetQuotaOfADisk(t *testing.T) {
	needMkfs(t)
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "d", Kind: KindDisk, SizeMiB: 4})
	mib := uint32(1)
	if _, err := s.SetQuota(context.Background(), v.ID, Quota{MiB: &mib}); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("quota of a disk: %v", err)
	}
	if _, err := s.Recount(t.Context(), v.ID); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("count of a disk: %v", err)
	}
}

// TestRescan: a ledger does not know what host programs do; Verify says so and
// Recount adopts it.
func TestRescan(t *testing.T) {
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "a", QuotaMiB: 1})
	if err := os.WriteFile(filepath.Join(v.Path, "behind"), make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := s.Verify(t.Context(), v)
	if err != nil || c.State.Used != (ledger.Delta{}) || c.Found != (ledger.Delta{Bytes: 2 << 20, Inodes: 1}) || !c.Exact || c.Allocated < 2<<20 {
		t.Errorf("verify: %+v, %v", c, err)
	}
	if got := mustUsed(t, s, v); got.Used != (ledger.Delta{}) {
		t.Errorf("verify changed the ledger: %+v", got)
	}
	if c, err = s.Recount(t.Context(), v.ID); err != nil || !c.Exact {
		t.Errorf("recount: %+v, %v", c, err)
	}
	if got := mustUsed(t, s, v); got.Used != c.Found {
		t.Errorf("after recount: %+v", got)
	}
}

// TestAdoptedDirectoryIsCounted: a volume that takes the directory that was put in
// the place of its own does not go on with what the old one held.
func TestAdoptedDirectoryIsCounted(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v", QuotaMiB: 1})
	growVolume(t, s, v, "f", 5000)
	if err := errors.Join(os.Rename(v.Path, filepath.Join(h.Volumes(), "aside")), os.Mkdir(v.Path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.Path, "restored"), make([]byte, 50_000), 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := s.Adopt(t.Context(), "v", AdoptOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := s.UsedBytes(t.Context(), v); err != nil || n != 53248 {
		t.Errorf("used %d, %v", n, err)
	}
	growVolume(t, s, v, "g", 1)
	want := ledger.State{Limits: ledger.Limits{Bytes: 1 << 20, Inodes: 1024}, Used: ledger.Delta{Bytes: 53248 + 4096, Inodes: 2}}
	if got := mustUsed(t, s, v); got != want {
		t.Errorf("state %+v, want %+v", got, want)
	}
}

// TestCountNamesWhatItCannotSee: a directory that cannot be listed is named, and
// the home is not blamed for it.
func TestCountNamesWhatItCannotSee(t *testing.T) {
	if !storetest.AsSomebody(t) {
		return
	}
	s, _ := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	closed := filepath.Join(v.Path, "closed")
	if err := os.Mkdir(closed, 0); err != nil {
		t.Fatal(err)
	}
	_, recount := s.Recount(t.Context(), v.ID)
	_, verify := s.Verify(t.Context(), v)
	for what, err := range map[string]error{"recount": recount, "verify": verify} {
		var e *errdefs.Error
		if !errdefs.Is(err, errdefs.Filesystem) || !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), closed) ||
			!errors.As(err, &e) || strings.Contains(e.Hint, "MSB_HOME") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestUnfinishedLedgersAreSwept: what a killed process was writing does not stay,
// and what one writes now does.
func TestUnfinishedLedgersAreSwept(t *testing.T) {
	s, h := newStore(t)
	v := mustCreate(t, s, Spec{Name: "v"})
	d := newBoundDir(t, s)
	if err := errors.Join(os.Remove(s.ledgerPath(v.ID)), os.MkdirAll(h.Binds(), 0o700)); err != nil {
		t.Fatal(err)
	}
	for prefix, make := range map[string]func(){
		s.ledgerPath(v.ID) + ".new-":     func() { growVolume(t, s, v, "f", 1) },
		filepath.Join(h.Binds(), "new-"): func() { d.mount(1) },
	} {
		long := time.Now().Add(-2 * time.Hour)
		if err := errors.Join(os.WriteFile(prefix+"old", nil, 0o600), os.WriteFile(prefix+"now", nil, 0o600), os.Chtimes(prefix+"old", long, long)); err != nil {
			t.Fatal(err)
		}
		make()
		if exists(prefix+"old") || !exists(prefix+"now") {
			t.Errorf("%s: old is there: %v, now: %v", prefix, exists(prefix+"old"), exists(prefix+"now"))
		}
	}
}

// serveLedger is a file server of a volume, as far as its ledger sees one. Closing
// the file is what a kill does to it.
func serveLedger(t *testing.T, s *Store, v *Volume) (*ledger.Writer, *os.File) {
	t.Helper()
	f, err := s.OpenLedger(t.Context(), v.ID)
	return serve(t, f, err)
}

// serve is a file server with an open ledger.
func serve(t *testing.T, f *os.File, err error) (*ledger.Writer, *os.File) {
	t.Helper()
	var w *ledger.Writer
	if err == nil {
		w, err = ledger.NewWriter(f, ledger.Options{Server: true})
	}
	if err != nil {
		t.Fatal(err)
	}
	return w, f
}
