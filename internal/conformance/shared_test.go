package conformance_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/conformance"
	"github.com/microsandbox-go/microsandbox/internal/conformance/guesttest"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

// sharing is one volume in two sandboxes, at /auto and again, without a cache,
// at /none.
type sharing struct {
	dir    string // the volume on the host
	guests []*microsandbox.Sandbox
}

const hostParty = 2 // the guests are 0 and 1

// roundsEnv sets how many rounds guests and host exchange, at most
// conformance.MaxRounds.
const roundsEnv = "MSB_SHARED_ROUNDS"

// TestSharedVolume shows what two sandboxes and the host see of each other's
// changes to one directory volume.
func TestSharedVolume(t *testing.T) {
	vmtest.Home(t)
	k := makeKit(t)
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	for _, name := range []string{"shared", "alone"} {
		if _, err := microsandbox.CreateVolume(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	h, err := microsandbox.GetVolume(ctx, "shared")
	if err != nil {
		t.Fatal(err)
	}
	s := &sharing{dir: h.Path()}
	views := map[string]microsandbox.MountConfig{
		"/kit":  microsandbox.Mount.Bind(k.dir, microsandbox.MountOptions{Readonly: true, StatVirtualization: off}),
		"/auto": microsandbox.Mount.Named("shared", microsandbox.MountOptions{}),
		"/none": microsandbox.Mount.Named("shared", microsandbox.MountOptions{Cache: microsandbox.CacheModeNone}),
	}
	s.start(ctx, t, "one", microsandbox.WithMounts(views),
		microsandbox.WithMounts(map[string]microsandbox.MountConfig{"/alone": always("alone")}))
	t.Run("one with always is alone", func(t *testing.T) { refusesSharing(ctx, t, s.guests[0]) })
	s.start(ctx, t, "two", microsandbox.WithMounts(views))
	for _, cache := range []string{"auto", "none"} {
		t.Run("B-36 B-45 "+cache, func(t *testing.T) { s.exchange(t, cache) })
		t.Run("appends "+cache, func(t *testing.T) { s.appends(t, cache) })
		t.Run("mappings "+cache, func(t *testing.T) {
			dir := s.place(t, "mappings-"+cache)
			s.runs(t, 0, "mappings", "/"+cache+"/"+dir, strconv.FormatBool(cache != "none"))
		})
	}
	t.Run("none and always are directories like others", s.posix)
}

func always(volume string) microsandbox.MountConfig {
	return microsandbox.Mount.Named(volume, microsandbox.MountOptions{Cache: microsandbox.CacheModeAlways})
}

func (s *sharing) start(ctx context.Context, t *testing.T, name string, opts ...microsandbox.SandboxOption) {
	t.Helper()
	sb, err := microsandbox.CreateSandbox(ctx, name, append([]microsandbox.SandboxOption{
		microsandbox.WithImage(vmtest.Image), microsandbox.WithUser("0:0"), microsandbox.WithBootTimeout(100 * time.Second)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { remove(t, name) })
	s.guests = append(s.guests, sb)
}

// refusesSharing: a volume that one sandbox keeps for good has no second one, and
// one that a sandbox has is not kept for good by another.
func refusesSharing(ctx context.Context, t *testing.T, one *microsandbox.Sandbox) {
	for name, tt := range map[string]struct {
		mount     microsandbox.MountConfig
		who, hint string
	}{
		"auto beside always":   {microsandbox.Mount.Named("alone", microsandbox.MountOptions{Readonly: true}), `"one" (read-write, cache=always)`, "stop that sandbox"},
		"always beside always": {always("alone"), `"one" (read-write, cache=always)`, "mount it with cache=auto"},
		"always beside auto":   {always("shared"), `"one" (read-write)`, "mount it with cache=auto or cache=none"},
	} {
		_, err := microsandbox.CreateSandbox(ctx, "refused", microsandbox.WithImage(vmtest.Image),
			microsandbox.WithMounts(map[string]microsandbox.MountConfig{"/m": tt.mount}))
		var e *microsandbox.Error
		if !errors.As(err, &e) || !microsandbox.IsKind(err, microsandbox.ErrInvalidConfig) || !errors.Is(err, microsandbox.ErrVolumeInUse) ||
			!strings.Contains(err.Error(), tt.who) || !strings.Contains(e.Hint, tt.hint) {
			t.Errorf("%s: %v, hint %q", name, err, e.Hint)
		}
		if err == nil {
			remove(t, "refused")
		}
	}
	h, err := microsandbox.GetVolume(ctx, "alone")
	if err != nil {
		t.Fatal(err)
	}
	if holders, err := h.Holders(ctx); err != nil || len(holders) != 1 || holders[0].Cache != microsandbox.CacheModeAlways {
		t.Errorf("holders %+v, %v", holders, err)
	}
	sb, err := microsandbox.GetSandbox(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"none", "always"} {
		if !strings.Contains(sb.ConfigJSON(), `"cache":"`+mode+`"`) {
			t.Errorf("cache mode %s is not in the definition %s", mode, sb.ConfigJSON())
		}
	}
	if out, err := one.Shell(ctx, "echo kept >/alone/f && cat /alone/f"); err != nil || out.Stdout() != "kept\n" {
		t.Errorf("the one that is alone: %v", err)
	}
}

// posix runs the guest's tests without a cache in one guest and, in the other, on
// the volume that it has alone.
func (s *sharing) posix(t *testing.T) {
	defer took(t, "posix", time.Now())
	var wg sync.WaitGroup
	for guest, dir := range []string{"/alone", "/none/" + s.place(t, "posix")} {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			env := map[string]string{guesttest.DirEnv: dir}
			if guest == 1 {
				env[guesttest.UnmappedEnv] = "1"
			}
			out, err := s.guests[guest].Exec(ctx, "/kit/guest.test", []string{"-test.v"}, microsandbox.WithExecEnv(env), microsandbox.WithExecTimeout(patience))
			if err != nil {
				t.Errorf("%s: %v", dir, err)
			} else if passed := strings.Count(out.Stdout(), "--- PASS"); out.ExitCode() != 0 || passed < 20 {
				t.Errorf("%s: exit code %d, %d passed\n%s%s", dir, out.ExitCode(), passed, tail(out.Stdout()), tail(out.Stderr()))
			}
		})
	}
	wg.Wait()
}

// place makes an empty directory on the volume.
func (s *sharing) place(t *testing.T, name string) string {
	t.Helper()
	if err := os.Mkdir(filepath.Join(s.dir, name), 0o700); err != nil {
		t.Fatal(err)
	}
	return name
}

// runs runs a command of the guest's binary and returns what it printed.
func (s *sharing) runs(t *testing.T, guest int, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := s.guests[guest].Exec(ctx, "/kit/guest.test", args, microsandbox.WithExecTimeout(patience))
	if err != nil {
		t.Errorf("guest %d: %v: %v", guest, args, err)
		return ""
	}
	if out.ExitCode() != 0 {
		t.Errorf("guest %d: %v: exit code %d\n%s%s", guest, args, out.ExitCode(), out.Stdout(), out.Stderr())
	}
	return out.Stdout()
}

// together runs a command at both guests and its like at the host.
func (s *sharing) together(t *testing.T, cache, dir, command string, n int, host func(*conformance.Party) error) {
	t.Helper()
	bound := map[string]time.Duration{"auto": time.Second}[cache]
	var wg sync.WaitGroup
	for i := range s.guests {
		wg.Go(func() {
			out := s.runs(t, i, command, strconv.Itoa(i), "3", "/"+cache+"/"+dir, "/none/"+dir, bound.String(), strconv.Itoa(hostParty), strconv.Itoa(n))
			if out != "" {
				t.Logf("guest %d, bound %v:\n%s", i, bound, out)
			}
		})
	}
	path := filepath.Join(s.dir, dir)
	if err := host(&conformance.Party{Me: hostParty, Parties: 3, Dir: path, Exact: path, Host: hostParty}); err != nil {
		t.Errorf("host: %v", err)
	}
	wg.Wait()
}

func (s *sharing) exchange(t *testing.T, cache string) {
	defer took(t, "exchange", time.Now())
	dir := s.place(t, "exchange-"+cache)
	if err := conformance.PrepareExchange(filepath.Join(s.dir, dir)); err != nil {
		t.Fatal(err)
	}
	rounds := map[string]int{"auto": 5, "none": 15}[cache]
	if n, err := strconv.Atoi(os.Getenv(roundsEnv)); err == nil {
		rounds = n
	}
	s.together(t, cache, dir, "exchange", rounds, func(p *conformance.Party) error {
		seen, err := p.Exchange(rounds)
		if err == nil {
			t.Logf("the host sees everything at once, %d properties", len(seen))
		}
		return err
	})
}

func (s *sharing) appends(t *testing.T, cache string) {
	defer took(t, "appends", time.Now())
	const records = 60
	dir := s.place(t, "appends-"+cache)
	if err := conformance.PrepareAppends(filepath.Join(s.dir, dir), 3); err != nil {
		t.Fatal(err)
	}
	s.together(t, cache, dir, "appends", records, func(p *conformance.Party) error { return p.Append(records) })
	torn, err := conformance.CheckAppends(filepath.Join(s.dir, dir), 3, records)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d records have others' bytes within", torn, 3*records)
	if cache == "none" && torn > 0 {
		t.Errorf("%d records are torn", torn)
	}
}
