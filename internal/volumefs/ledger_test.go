package volumefs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// writerPoints are the fail points of the ledger that a host program reaches.
var writerPoints = []string{
	"ledger.joined", "ledger.ceiling", "ledger.raised", "ledger.announced", "ledger.charged", "ledger.done", "ledger.settled",
}

// book is the ledger of base/vol, in base/ledger.
type book struct {
	base string
	l    *ledger.Ledger
}

// newBook makes a ledger for what is there, without limits.
func newBook(t testing.TB, base string) *book {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(base, "ledger"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	noErr(t, err)
	t.Cleanup(func() { f.Close() })
	noErr(t, ledger.Format(f, ledger.Limits{}, false))
	l, err := ledger.Open(f)
	noErr(t, err)
	b := &book{base: base, l: l}
	b.settle(t)
	return b
}

func (b *book) walk(t testing.TB) ledger.Delta {
	t.Helper()
	d, err := b.walkTree()
	noErr(t, err)
	return d
}

func (b *book) walkTree() (ledger.Delta, error) {
	dir, err := os.Open(filepath.Join(b.base, "vol"))
	if err != nil {
		return ledger.Delta{}, err
	}
	defer dir.Close()
	found, err := ledger.Walk(ctx, dir, 0)
	return found.Charges, err
}

func (b *book) state(t testing.TB) ledger.State {
	t.Helper()
	s, err := b.l.State()
	noErr(t, err)
	return s
}

// settle walks, after which the ledger is right.
func (b *book) settle(t testing.TB) {
	t.Helper()
	w, err := b.l.Settle(ctx, func(context.Context) (ledger.Delta, error) { return b.walkTree() })
	if err != nil || !w.Exact {
		t.Fatalf("settle: %+v, %v", w, err)
	}
	b.check(t)
}

// check demands that the ledger says what is there.
func (b *book) check(t testing.TB) {
	t.Helper()
	s := b.state(t)
	if found := b.walk(t); s.Used != found || s.Unsettled {
		t.Errorf("the ledger says %+v, the walk %+v", s, found)
	}
}

// checkAfterKill demands that the ledger says no less than there is, and at most
// what the killed operation charged more; and that it asks for a walk if it does.
func (b *book) checkAfterKill(t testing.TB) {
	t.Helper()
	s, found := b.state(t), b.walk(t)
	over := s.Used.Minus(found)
	if over.Bytes < 0 || over.Inodes < 0 || over.Bytes > crashSize+64<<10 || over.Inodes > 2 {
		t.Errorf("the ledger says %+v, the walk %+v", s, found)
	}
	if over != (ledger.Delta{}) && !s.Unsettled {
		t.Errorf("over by %+v, and no walk is asked for", over)
	}
}

// limitedVolume is a volume with limits, whose ledger is checked at the end.
func limitedVolume(t *testing.T, limits ledger.Limits) (*FS, *book) {
	t.Helper()
	base := t.TempDir()
	for _, name := range []string{"vol", "scratch"} {
		noErr(t, os.Mkdir(filepath.Join(base, name), 0o755))
	}
	b := newBook(t, base)
	noErr(t, b.l.SetLimits(limits))
	f, done, err := openPair(base, Options{Volume: "v"})
	noErr(t, err)
	t.Cleanup(func() { b.check(t); done() })
	return f, b
}

func wantQuota(t *testing.T, err error, limit int64) {
	t.Helper()
	var full *errdefs.QuotaError
	if !errors.As(err, &full) || !errors.Is(err, unix.ENOSPC) || !errdefs.Is(err, errdefs.Filesystem) {
		t.Fatalf("error %v, want a QuotaError", err)
	}
	if full.Limit != limit {
		t.Errorf("limit %d in %v, want %d", full.Limit, err, limit)
	}
}

// TestQuota: what is written through the host API stays within the limit, and
// what is deleted can be written again.
func TestQuota(t *testing.T) {
	const mib = 1 << 20
	f, b := limitedVolume(t, ledger.Limits{Bytes: 4 * mib, Inodes: 1024})
	big := make([]byte, 4*mib)
	noErr(t, f.Write(ctx, "all", big, WriteOptions{})) // to the last byte
	b.check(t)
	wantQuota(t, f.Write(ctx, "more", []byte("x"), WriteOptions{}), 4*mib)
	wantQuota(t, f.Mkdir(ctx, "dir"), 4*mib)
	wantQuota(t, f.Copy(ctx, "all", "again", WriteOptions{}), 4*mib)
	noErr(t, f.Write(ctx, "empty", nil, WriteOptions{}))
	noErr(t, f.Rename(ctx, "all", "renamed", WriteOptions{}))
	noErr(t, f.Remove(ctx, "renamed"))
	if s := b.state(t); s.Used != (ledger.Delta{Inodes: 1}) {
		t.Errorf("after deleting %+v is used", s)
	}
	w, err := f.OpenWrite(ctx, "stream", WriteOptions{})
	noErr(t, err)
	for range 4 {
		_, err = w.Write(big[:mib])
		noErr(t, err)
	}
	_, err = w.Write([]byte("x"))
	wantQuota(t, err, 4*mib)
	wantQuota(t, w.Close(), 4*mib)
	b.check(t)
	w, err = f.OpenWrite(ctx, "copied", WriteOptions{})
	noErr(t, err)
	_, err = w.ReadFrom(strings.NewReader(string(big) + "x"))
	wantQuota(t, err, 4*mib)
	w.Abort()
	w, err = f.OpenWrite(ctx, "copied", WriteOptions{})
	noErr(t, err)
	_, err = w.ReadFrom(strings.NewReader(string(big)))
	noErr(t, err)
	noErr(t, w.Close())
	noErr(t, f.RemoveAll(ctx, "copied"))
}

// TestInodeQuota: names are limited too, and each link is one.
func TestInodeQuota(t *testing.T) {
	f, b := limitedVolume(t, ledger.Limits{Inodes: 3})
	noErr(t, f.Mkdir(ctx, "a/b"))
	noErr(t, f.Write(ctx, "f", nil, WriteOptions{}))
	wantQuota(t, f.Write(ctx, "g", nil, WriteOptions{}), 3)
	wantQuota(t, f.Mkdir(ctx, "c/d/e"), 3)
	noErr(t, f.RemoveDir(ctx, "a"))
	noErr(t, f.Write(ctx, "x/f", []byte("f"), WriteOptions{}))
	if s := b.state(t); s.Used.Inodes != 3 {
		t.Errorf("used %+v", s)
	}
	noErr(t, f.RemoveDir(ctx, "x"))
}

// TestNoRoomForALedger: on a full disk files can be deleted though there is no
// ledger and none can be made; nothing else goes.
func TestNoRoomForALedger(t *testing.T) {
	v := newVolume(t, Options{Ledger: func() (*ledger.Writer, error) { return nil, unix.ENOSPC }})
	v.put("f", "x")
	v.put("d/sub/f", "x")
	if err := v.Write(ctx, "g", []byte("x"), WriteOptions{}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	noErr(t, v.Remove(ctx, "f"))
	noErr(t, v.RemoveDir(ctx, "d"))
}

// TestLoweredLimit: below the present use only growth is refused.
func TestLoweredLimit(t *testing.T) {
	f, b := limitedVolume(t, ledger.Limits{})
	noErr(t, f.Write(ctx, "big", make([]byte, 1<<20), WriteOptions{}))
	noErr(t, f.Write(ctx, "small", make([]byte, 4096), WriteOptions{}))
	noErr(t, b.l.SetLimits(ledger.Limits{Bytes: 64 << 10}))
	wantQuota(t, f.Write(ctx, "new", []byte("x"), WriteOptions{}), 64<<10)
	noErr(t, f.Rename(ctx, "small", "moved", WriteOptions{}))
	noErr(t, f.Remove(ctx, "big"))
	noErr(t, f.Write(ctx, "new", []byte("x"), WriteOptions{}))
}
