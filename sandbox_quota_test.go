package microsandbox_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	msb "github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// quotaScript tries to use more than there is: WAY DIR. It prints the error that
// stops it, and takes back what it made.
const quotaScript = `import errno, os, shutil, sys
way, top = sys.argv[1:3]
d = top + "/" + way
os.mkdir(d)
def fill(n):
    f = os.open(d + "/f", os.O_RDWR | os.O_CREAT, 0o600)
    for i in range(n):
        os.write(f, bytes(65536))
def each(n, do):
    for i in range(n):
        do(d + "/%05d" % i)
def xattr(p):
    open(p, "w").close()
    os.setxattr(p, "user.x", bytes(3000))
def link(p):
    if not os.path.exists(d + "/f"): open(d + "/f", "w").close()
    os.link(d + "/f", p)
def open_unlinked(p):
    f = os.open(p, os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(p)
    os.write(f, bytes(65536))
ways = {
    "bytes": lambda: fill(1000),
    "sparse": lambda: os.truncate(os.open(d + "/f", os.O_RDWR | os.O_CREAT), 1 << 30),
    "hole": lambda: os.pwrite(os.open(d + "/f", os.O_RDWR | os.O_CREAT), b"x", 1 << 30),
    "fallocate": lambda: os.posix_fallocate(os.open(d + "/f", os.O_RDWR | os.O_CREAT), 0, 1 << 30),
    "empty": lambda: each(3000, lambda p: open(p, "w").close()),
    "links": lambda: each(3000, link),
    "symlinks": lambda: each(3000, lambda p: os.symlink("x" * 100, p)),
    "longnames": lambda: each(3000, lambda p: os.mkdir(p + "n" * 200)),
    "xattrs": lambda: each(3000, xattr),
    "unlinked": lambda: each(3000, open_unlinked),
}
try:
    ways[way]()
    print("never stopped")
except OSError as e:
    print(errno.errorcode[e.errno])
shutil.rmtree(d)
`

// quotaBench is a volume of 4 MiB and 1024 files, twice in one sandbox and once
// in another.
type quotaBench struct {
	a, b *msb.Sandbox
	vol  *msb.Volume
	l    *ledger.Ledger
	dir  string // of the host, at /b of the first sandbox, with a quota of 1 MiB
}

const quotaMiB = 4

// TestQuotaInGuests: no way leads beyond the limit of a volume.
func TestQuotaInGuests(t *testing.T) {
	h := vmtest.Home(t)
	ctx := testContext(t)
	b := &quotaBench{vol: must(msb.CreateVolume(ctx, "q", msb.WithVolumeQuota(quotaMiB)))(t)}
	ok(t, b.vol.FS().WriteString(ctx, "/quota.py", quotaScript))
	b.l = openLedger(t, h)
	q := msb.Mount.Named("q", msb.MountOptions{})
	b.dir = t.TempDir()
	ok(t, os.WriteFile(filepath.Join(b.dir, "old"), make([]byte, 3<<20), 0o666))
	b.a = boot(ctx, t, "quota-a", msb.WithMounts(map[string]msb.MountConfig{"/v": q, "/w": q,
		"/b": msb.Mount.Bind(b.dir, msb.MountOptions{QuotaMiB: 1})}))
	b.b = boot(ctx, t, "quota-b", msb.WithMounts(map[string]msb.MountConfig{"/v": q}))
	for _, test := range []struct {
		name string
		run  func(context.Context, *testing.T)
	}{
		{"df", b.testDF}, {"ways", b.testWays}, {"others", b.testOthers}, {"open", b.testOpen},
		{"bind", b.testBind}, {"restart", b.testRestart},
	} {
		if !t.Run(test.name, func(t *testing.T) { test.run(ctx, t) }) {
			break
		}
	}
}

// openLedger opens the ledger of the one directory volume in the home.
func openLedger(t *testing.T, h home.Dir) *ledger.Ledger {
	t.Helper()
	found := must(filepath.Glob(filepath.Join(h.Volumes(), ".state", "*", "ledger")))(t)
	if len(found) != 1 {
		t.Fatalf("ledgers: %v", found)
	}
	f := must(os.Open(found[0]))(t)
	t.Cleanup(func() { f.Close() })
	return must(ledger.Open(f))(t)
}

func (b *quotaBench) used(t *testing.T) ledger.Delta {
	t.Helper()
	s := must(b.l.State())(t)
	if s.Used.Bytes > quotaMiB<<20 || s.Used.Inodes > 1024 {
		t.Errorf("used %v, more than the limit", s.Used)
	}
	return s.Used
}

// exact wants the ledger to become what a walk finds, soon after everything is
// quiet.
func (b *quotaBench) exact(t *testing.T, when string) {
	t.Helper()
	dir := must(os.Open(b.vol.Path()))(t)
	defer dir.Close()
	found := must(ledger.Walk(context.Background(), dir, 0))(t).Charges
	var s ledger.State
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if s = must(b.l.State())(t); s.Used == found {
			return
		}
	}
	t.Errorf("%s: the ledger says %+v, a walk finds %v", when, s, found)
}

// testDF: guests see the limit and what is used of it.
func (b *quotaBench) testDF(ctx context.Context, t *testing.T) {
	out := strings.Fields(sh(t, b.a, "stat -f -c '%b %f %S %c' /v"))
	unit := must(strconv.ParseInt(out[2], 10, 64))(t)
	blocks, free := must(strconv.ParseInt(out[0], 10, 64))(t), must(strconv.ParseInt(out[1], 10, 64))(t)
	if blocks*unit != quotaMiB<<20 || (blocks-free)*unit != b.used(t).Bytes || out[3] != "1024" {
		t.Errorf("statfs %v, used %v", out, b.used(t))
	}
}

func (b *quotaBench) testWays(ctx context.Context, t *testing.T) {
	for _, way := range []string{"bytes", "sparse", "hole", "fallocate", "empty", "links", "symlinks", "longnames", "xattrs", "unlinked"} {
		if got := sh(t, b.a, "python3 /v/quota.py "+way+" /v"); got != "ENOSPC" {
			t.Errorf("%s: %s", way, got)
		}
		b.exact(t, way)
	}
	refuses(t, b.a, "touch /v/k; fallocate -n -l 1M /v/k", "unsupported")
	sh(t, b.a, "rm /v/k")
}

// testOthers: what one sandbox took is not there for its other mount, another
// sandbox and the host.
func (b *quotaBench) testOthers(ctx context.Context, t *testing.T) {
	refuses(t, b.a, "dd if=/dev/zero of=/v/big bs=4k", "No space left")
	refuses(t, b.a, "head -c 100000 /dev/zero >/w/more", "No space left")
	refuses(t, b.b, "head -c 100000 /dev/zero >/v/more", "No space left")
	err := b.vol.FS().Write(ctx, "/host", make([]byte, 100_000))
	wantKind(t, err, msb.ErrFilesystem)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("host write: %v does not match ENOSPC", err)
	}
	sh(t, b.a, "dd if=/dev/zero of=/v/big bs=64k count=16 conv=notrunc 2>&1") // inside: never refused
	sh(t, b.a, "rm /v/big /v/more")
	sh(t, b.b, "head -c 3000000 /dev/zero >/v/there && rm /v/there") // at once
	b.exact(t, "others")
}

// testOpen: what is deleted counts as long as a guest has it open.
func (b *quotaBench) testOpen(ctx context.Context, t *testing.T) {
	for _, holder := range []*msb.Sandbox{b.a, b.b} {
		sh(t, b.a, "head -c 3000000 /dev/zero >/v/big")
		sh(t, holder, "exec 9</v/big; (sleep 1000 >/dev/null 2>&1 &)")
		sh(t, b.a, "rm /v/big")
		refuses(t, b.a, "head -c 3000000 /dev/zero >/v/again", "No space left")
		sh(t, holder, "pkill sleep")
		sh(t, b.a, "rm /v/again")
		vmtest.Eventually(t, 10*time.Second, "the space of a closed file", func() bool { return b.used(t).Bytes < 1<<20 })
		sh(t, b.a, "head -c 3000000 /dev/zero >/v/again && rm /v/again")
		b.exact(t, "open")
	}
}

// testBind: a bound directory may grow by its quota beyond what it had.
func (b *quotaBench) testBind(ctx context.Context, t *testing.T) {
	refuses(t, b.a, "dd if=/dev/zero of=/b/new bs=64k count=20", "No space left")
	sh(t, b.a, "dd if=/dev/zero of=/b/old bs=64k count=48 conv=notrunc 2>&1")
	refuses(t, b.a, "head -c 100000 /dev/zero >>/b/old", "No space left")
	if st := must(os.Stat(filepath.Join(b.dir, "new")))(t); st.Size() > 1<<20 {
		t.Errorf("the guest added %d bytes", st.Size())
	}
	sh(t, b.a, "rm /b/new; head -c 900000 /dev/zero >/b/new")
}

// testRestart: a restarted sandbox finds the same limit.
func (b *quotaBench) testRestart(ctx context.Context, t *testing.T) {
	sh(t, b.a, "head -c 3000000 /dev/zero >/v/big; sync")
	ok(t, b.a.Stop(ctx))
	ok(t, b.b.Stop(ctx))
	b.exact(t, "stopped")
	again := must(msb.StartSandbox(ctx, "quota-a"))(t)
	refuses(t, again, "head -c 3000000 /dev/zero >/v/more", "No space left")
	refuses(t, again, "head -c 300000 /dev/zero >/b/more", "No space left")
	sh(t, again, "rm /v/more; head -c 500000 /dev/zero >/v/more")
	b.exact(t, "restarted")
}
