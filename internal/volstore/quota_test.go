package volstore

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/storetest"
)

// TestQuotaOnAFullDisk: where nothing can be written any more, use is told and
// counted in place, and what needs room says so and changes nothing.
func TestQuotaOnAFullDisk(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	disk := storetest.Tmpfs(t, "8m")
	s := New(home.Dir(filepath.Join(disk, "home")))
	defer s.Close()
	v, damaged, missing := mustCreate(t, s, Spec{Name: "v", QuotaMiB: 1}), mustCreate(t, s, Spec{Name: "damaged"}), mustCreate(t, s, Spec{Name: "missing"})
	for _, v := range []*Volume{v, damaged, missing} {
		growVolume(t, s, v, "f", 5000)
	}
	if err := errors.Join(os.WriteFile(s.ledgerPath(damaged.ID), make([]byte, 4096), 0o600), os.Remove(s.ledgerPath(missing.ID))); err != nil {
		t.Fatal(err)
	}
	free := storetest.Fill(t, disk)

	seven := int64(7)
	var e *errdefs.Error
	if _, err := s.SetQuota(t.Context(), v.ID, Quota{Inodes: &seven}); !errors.Is(err, unix.ENOSPC) || !errors.As(err, &e) || e.Hint != hintNoRoom {
		t.Errorf("set a limit of files: %v, %+v", err, e)
	}
	found := ledger.Delta{Bytes: 8192, Inodes: 1}
	if got := mustUsed(t, s, v); got != (ledger.State{Limits: ledger.Limits{Bytes: 1 << 20, Inodes: 1024}, Used: found}) {
		t.Errorf("state %+v", got)
	}
	if c, err := s.Recount(t.Context(), v.ID); err != nil || c.Found != found || !c.Exact {
		t.Errorf("recount: %+v, %v", c, err)
	}
	for _, v := range []*Volume{damaged, missing} {
		if n, err := s.UsedBytes(t.Context(), v); err != nil || n != 8192 {
			t.Errorf("%s: used %d, %v", v.Name, n, err)
		}
		if _, err := s.Recount(t.Context(), v.ID); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s: recount: %v", v.Name, err)
		}
	}
	free()
	for _, v := range []*Volume{v, damaged, missing} {
		if c, err := s.Recount(t.Context(), v.ID); err != nil || c.State.Used != found {
			t.Errorf("%s: %+v, %v", v.Name, c, err)
		}
		if left, _ := filepath.Glob(filepath.Join(s.home.State(v.ID), "*.new*")); len(left) > 0 {
			t.Errorf("%s: left: %q", v.Name, left)
		}
	}
}

// TestUsageOfAReadonlyHome: use is told where nothing may be written, also after a
// boot, and what changes something says why it cannot.
func TestUsageOfAReadonlyHome(t *testing.T) {
	if !storetest.Isolated(t) {
		return
	}
	s, h := newStore(t)
	v, old, missing := mustCreate(t, s, Spec{Name: "v"}), mustCreate(t, s, Spec{Name: "old"}), mustCreate(t, s, Spec{Name: "missing"})
	for _, v := range []*Volume{v, old, missing} {
		growVolume(t, s, v, "f", 5000)
	}
	age(t, s.ledgerPath(old.ID))
	if err := os.Remove(s.ledgerPath(missing.ID)); err != nil {
		t.Fatal(err)
	}
	storetest.MakeReadonly(t, string(h))
	one := uint32(1)
	for _, v := range []*Volume{v, old, missing} {
		if n, err := s.UsedBytes(t.Context(), v); err != nil || n < 8192 || n > 8192 && v != old {
			t.Errorf("%s: used %d, %v", v.Name, n, err)
		}
		if c, err := s.Survey(t.Context(), v); err != nil || c.Found.Bytes != 8192 {
			t.Errorf("%s: survey: %+v, %v", v.Name, c, err)
		}
		if _, err := s.Recount(t.Context(), v.ID); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: recount: %v", v.Name, err)
		}
		if _, err := s.SetQuota(t.Context(), v.ID, Quota{MiB: &one}); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: set quota: %v", v.Name, err)
		}
	}
}

// TestRandomDamage: bytes of a ledger that were changed by anybody make nothing
// fail but what asks for what they said, nothing wait, and nothing stay wrong after
// a count.
func TestRandomDamage(t *testing.T) {
	s, _ := newStore(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	v := mustCreate(t, s, Spec{Name: "v", QuotaMiB: 1})
	growVolume(t, s, v, "f", 5000)
	limits, found := ledger.Limits{Bytes: 1 << 20, Inodes: 1024}, ledger.Delta{Bytes: 8192, Inodes: 1}
	for range 300 {
		spoil(t, r, s.ledgerPath(v.ID))
		if _, _, err := s.Used(v); err != nil && !errors.Is(err, ledger.ErrDamaged) && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("used: %v", err)
		}
		if _, err := s.UsedBytes(t.Context(), v); err != nil {
			t.Errorf("used bytes: %v", err)
		}
		if c, err := s.Verify(t.Context(), v); err != nil || c.Found != found {
			t.Errorf("verify: %+v, %v", c, err)
		}
		f, err := s.OpenLedger(t.Context(), v.ID)
		if err != nil {
			t.Errorf("open: %v", err)
			continue
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if c, err := s.Recount(t.Context(), v.ID); err != nil || c.State != (ledger.State{Limits: limits, Used: found}) {
			t.Errorf("recount: %+v, %v", c, err)
		}
	}
}

// spoil changes some bytes of a file, or its length.
func spoil(t *testing.T, r *rand.Rand, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for range r.IntN(8) {
		if len(b) > 0 {
			b[r.IntN(min(len(b), 1<<r.IntN(13)))] = byte(r.Uint32())
		}
	}
	if r.IntN(7) == 0 {
		b = append(b, make([]byte, r.IntN(64<<10))...)[:r.IntN(64<<10)%(len(b)+1)]
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
