package fuseserver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/conformance"
)

// parties are two guests, each the host's kernel with a server of its own, and
// the host, on one directory.
func parties(t *testing.T, virt, cache string, bound time.Duration) (dir string, list []*conformance.Party) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		view := dir
		if i < 2 {
			view = mountDir(t, dir, Config{StatVirt: virt, Cache: cache, AsRoot: true})
		}
		list = append(list, &conformance.Party{Me: i, Parties: 3, Dir: view, Exact: dir, Bound: bound, Host: -1})
		if virt != "off" {
			list[i].Host = 2
		}
	}
	list[2].Bound = 0 // the host sees its files
	return dir, list
}

// atOnce runs f for each party and reports what went wrong.
func atOnce(t *testing.T, list []*conformance.Party, f func(*conformance.Party) error) {
	t.Helper()
	var wg sync.WaitGroup
	for _, p := range list {
		wg.Go(func() {
			if err := f(p); err != nil {
				t.Errorf("party %d: %v", p.Me, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// TestCoherenceThroughKernel: what another guest or the host changed is seen
// within a second under auto and at once under none.
func TestCoherenceThroughKernel(t *testing.T) {
	for _, tt := range []struct {
		virt, cache string
		bound       time.Duration
		rounds      int
	}{
		{"strict", "auto", time.Second, 5}, {"off", "auto", time.Second, 5},
		{"strict", "none", 0, 60}, {"off", "none", 0, 60},
	} {
		t.Run(tt.virt+" "+tt.cache, func(t *testing.T) {
			t.Parallel()
			dir, list := parties(t, tt.virt, tt.cache, tt.bound)
			if err := conformance.PrepareExchange(dir); err != nil {
				t.Fatal(err)
			}
			atOnce(t, list, func(p *conformance.Party) error {
				seen, err := p.Exchange(tt.rounds)
				var text strings.Builder
				for _, s := range seen {
					fmt.Fprintln(&text, s)
				}
				t.Logf("party %d, bound %v:\n%s", p.Me, p.Bound, text.String())
				return err
			})
		})
	}
}

// TestExchangeFindsOldValues: the exchange notices what a cache hides.
func TestExchangeFindsOldValues(t *testing.T) {
	dir, list := parties(t, "off", "always", time.Second)
	if err := conformance.PrepareExchange(dir); err != nil {
		t.Fatal(err)
	}
	guest, host := list[0], list[2]
	guest.Parties, host.Parties, host.Me = 2, 2, 1
	if _, err := guest.Exchange(0); err != nil { // it has looked around
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := host.Exchange(1)
		ended <- err
	}()
	if _, err := guest.Exchange(1); err == nil || !strings.Contains(err.Error(), "after the change gives") {
		t.Errorf("the guest keeps what it knows and reports %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "seen.0"), []byte("00000001"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestAppendsThroughKernel: what guests append at the same time lies one behind
// the other; under none records stay whole too.
func TestAppendsThroughKernel(t *testing.T) {
	const records = 300
	for _, cache := range []string{"auto", "none"} {
		t.Run(cache, func(t *testing.T) {
			bound := map[string]time.Duration{"auto": time.Second}[cache]
			dir, list := parties(t, "strict", cache, bound)
			if err := conformance.PrepareAppends(dir, len(list)); err != nil {
				t.Fatal(err)
			}
			atOnce(t, list, func(p *conformance.Party) error { return p.Append(records) })
			torn, err := conformance.CheckAppends(dir, len(list), records)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d records with others' bytes within", torn)
			if cache == "none" && torn > 0 {
				t.Errorf("%d records are torn", torn)
			}
		})
	}
}

// TestMappingsThroughKernel: without a cache there are no shared mappings, and
// that is all that is missing.
func TestMappingsThroughKernel(t *testing.T) {
	for _, cache := range []string{"auto", "none", "always"} {
		mnt, _ := mountShare(t, Config{Cache: cache, AsRoot: true})
		err := conformance.CheckMappings(mnt, cache != "none", []string{"-test.list=^TestMappingsThroughKernel$"}, "TestMappingsThroughKernel\n")
		if err != nil {
			t.Errorf("%s: %v", cache, err)
		}
	}
}

// TestPosixInCacheModes: one guest sees no difference between the modes.
func TestPosixInCacheModes(t *testing.T) {
	for _, cache := range []string{"none", "always"} {
		t.Run(cache, func(t *testing.T) {
			mnt, _ := mountShare(t, Config{Cache: cache, AsRoot: true})
			for name, check := range posixtest.All {
				t.Run(name, func(t *testing.T) {
					if notOnPlainDirs[name] {
						t.Skip("missing: a plain directory here on which it holds")
					}
					dir := filepath.Join(mnt, strings.ToLower(name))
					if err := os.Mkdir(dir, 0o755); err != nil {
						t.Fatal(err)
					}
					check(t, dir)
				})
			}
		})
	}
}

// TestTimesAndSyncInCacheModes: a write is on the host, with its time, when it
// returns; times that were set stay; fsync and close succeed and change nothing.
func TestTimesAndSyncInCacheModes(t *testing.T) {
	for _, cache := range []string{"auto", "none", "always"} {
		t.Run(cache, func(t *testing.T) {
			mnt, dir := mountShare(t, Config{Cache: cache, AsRoot: true})
			f, err := os.OpenFile(filepath.Join(mnt, "f"), os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			agree := func(when string) (mtime time.Time) {
				t.Helper()
				guest, err := f.Stat()
				if err != nil {
					t.Fatal(err)
				}
				host, err := os.Stat(filepath.Join(dir, "f"))
				if err != nil {
					t.Fatal(err)
				}
				if !guest.ModTime().Equal(host.ModTime()) || guest.Size() != host.Size() {
					t.Errorf("%s: guest %v, %d bytes; host %v, %d bytes", when, guest.ModTime(), guest.Size(), host.ModTime(), host.Size())
				}
				return host.ModTime()
			}
			before := agree("created")
			for i := range 5 {
				if _, err := fmt.Fprintf(f, "line %d\n", i); err != nil {
					t.Fatal(err)
				}
				b, err := os.ReadFile(filepath.Join(dir, "f"))
				if err != nil || len(b) != 7*(i+1) {
					t.Errorf("after write %d the host has %d bytes, %v", i, len(b), err)
				}
			}
			if after := agree("written"); !after.After(before) {
				t.Errorf("mtime %v after the writes, %v before", after, before)
			}
			set := time.Unix(1e9, 123456789)
			if err := os.Chtimes(f.Name(), set, set); err != nil {
				t.Fatal(err)
			}
			for what, op := range map[string]func() error{
				"fsync": f.Sync, "fdatasync": func() error { return unix.Fdatasync(int(f.Fd())) },
				"read": func() error { _, err := f.ReadAt(make([]byte, 8), 0); return err },
			} {
				if err := op(); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				if got := agree(what); !got.Equal(set) {
					t.Errorf("%s changes mtime to %v", what, got)
				}
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if fi, err := os.Stat(f.Name()); err != nil || !fi.ModTime().Equal(set) {
				t.Errorf("after close: %v", err)
			}
		})
	}
}

// TestOpenAfterChange: what a guest has read is dropped when it opens the file
// again, within the second too; under always it is kept.
func TestOpenAfterChange(t *testing.T) {
	for cache, want := range map[string]string{"auto": "new", "none": "new", "always": "old"} {
		mnt, dir := mountShare(t, Config{Cache: cache, AsRoot: true})
		if err := os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		for i, want := range []string{"old", want} {
			got, err := os.ReadFile(filepath.Join(mnt, "f"))
			if err != nil || string(got) != want {
				t.Errorf("%s, read %d: %q, %v, want %q", cache, i, got, err, want)
			}
			if err := os.WriteFile(filepath.Join(dir, "f"), []byte("new"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestMappingHasNoBound: memory that two guests map is not one memory. A page
// stays as it is until the guest looks at the file in another way.
func TestMappingHasNoBound(t *testing.T) {
	dir, list := parties(t, "off", "auto", time.Second)
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	var maps [2][]byte
	for i := range maps {
		f, err := os.OpenFile(filepath.Join(list[i].Dir, "f"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if maps[i], err = unix.Mmap(int(f.Fd()), 0, 3, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(maps[i])
		if string(maps[i]) != "old" {
			t.Fatalf("guest %d maps %q", i, maps[i])
		}
	}
	copy(maps[0], "new")
	if err := unix.Msync(maps[0], unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != "new" {
		t.Fatalf("the host has %q, %v", b, err)
	}
	time.Sleep(list[1].Bound)
	if string(maps[1]) != "old" {
		t.Errorf("the other guest's mapping shows %q by itself", maps[1])
	}
	if b, err := os.ReadFile(filepath.Join(list[1].Dir, "f")); err != nil || string(b) != "new" || string(maps[1]) != "new" {
		t.Errorf("after reading %q, %v, the mapping shows %q", b, err, maps[1])
	}
}
