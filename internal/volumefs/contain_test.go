package volumefs

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// operation is one call with one path; the volume has a file "ok".
type operation struct {
	name string
	do   func(v *volume, path string) error
	// itself: the call acts on a last link and not on where it leads.
	itself bool
}

var operations = []operation{
	{name: "read", do: func(v *volume, p string) error {
		b, err := v.Read(ctx, p)
		return leaked(b, err)
	}},
	{name: "readstream", do: func(v *volume, p string) error {
		r, err := v.OpenRead(ctx, p)
		if err != nil {
			return err
		}
		defer r.Close()
		b, err := r.Recv(ctx)
		return leaked(b, err)
	}},
	{name: "write", do: func(v *volume, p string) error { return v.Write(ctx, p, []byte("escaped"), WriteOptions{}) }},
	{name: "writestream", do: func(v *volume, p string) error {
		w, err := v.OpenWrite(ctx, p, WriteOptions{})
		if err != nil {
			return err
		}
		if _, err := w.Write([]byte("escaped")); err != nil {
			return err
		}
		return w.Close()
	}},
	{name: "list", do: func(v *volume, p string) error {
		l, err := v.List(ctx, p)
		for _, e := range l {
			if strings.HasSuffix(e.Path, "/only-outside") {
				return errLeaked
			}
		}
		return err
	}},
	{name: "stat", do: func(v *volume, p string) error {
		i, err := v.Stat(ctx, p)
		if err == nil && i.Size == secretSize && i.Kind == File {
			return errLeaked
		}
		return err
	}},
	{name: "exists", do: func(v *volume, p string) error { _, err := v.Exists(ctx, p); return err }},
	{name: "mkdir", do: func(v *volume, p string) error { return v.Mkdir(ctx, p) }},
	{name: "copy from", do: func(v *volume, p string) error {
		err := v.Copy(ctx, p, "copied", WriteOptions{})
		b, readErr := os.ReadFile(v.path("copied"))
		if readErr != nil {
			return err
		}
		return leaked(b, err)
	}},
	{name: "copy to", do: func(v *volume, p string) error { return v.Copy(ctx, "ok", p, WriteOptions{}) }},
	{name: "remove", itself: true, do: func(v *volume, p string) error { return v.Remove(ctx, p) }},
	{name: "removedir", itself: true, do: func(v *volume, p string) error { return v.RemoveDir(ctx, p) }},
	{name: "removeall", itself: true, do: func(v *volume, p string) error { return v.RemoveAll(ctx, p) }},
	{name: "rename from", itself: true, do: func(v *volume, p string) error { return v.Rename(ctx, p, "renamed", WriteOptions{}) }},
	{name: "rename to", itself: true, do: func(v *volume, p string) error { return v.Rename(ctx, "ok", p, WriteOptions{}) }},
}

const (
	secretText = "secret"
	secretSize = int64(len(secretText))
)

var errLeaked = fmt.Errorf("content from outside")

func leaked(b []byte, err error) error {
	if strings.Contains(string(b), secretText) {
		return errLeaked
	}
	return err
}

// TestContainment: every operation with every way out that a path or a link
// can name. A last link is fair game only to the calls that act on the link.
func TestContainment(t *testing.T) {
	type way struct {
		path string
		make func(v *volume)
		last bool // the path's last component is the link itself
	}
	link := func(target, name string) func(v *volume) {
		return func(v *volume) { v.link(target, name) }
	}
	standin := func(target, name string) func(v *volume) {
		return func(v *volume) { v.standin(name, unix.S_IFLNK|0o777, target) }
	}
	ways := map[string]way{
		"dotdot":                  {path: "../outside/secret"},
		"dotdot new":              {path: "../escaped"},
		"slash dotdot":            {path: "/../../outside/secret"},
		"through present":         {path: "a/../../outside/secret", make: func(v *volume) { v.mkdir(v.path("a")) }},
		"through absent":          {path: "nope/../../escaped"},
		"deep absent":             {path: "n/o/p/e/../../../../../escaped"},
		"own name":                {path: "../vol/ok"},
		"file link":               {path: "l", make: link("../outside/secret", "l"), last: true},
		"absolute link":           {path: "l", make: func(v *volume) { v.link(v.outside+"/secret", "l") }, last: true},
		"dangling link":           {path: "l", make: link("../escaped", "l"), last: true},
		"absolute dangling link":  {path: "l", make: link("/escaped-from-volume", "l"), last: true},
		"link to root's parent":   {path: "l", make: link("..", "l"), last: true},
		"dir link":                {path: "l/secret", make: link("../outside", "l")},
		"dir link new":            {path: "l/escaped", make: link("../outside", "l")},
		"absolute dir link":       {path: "l/secret", make: func(v *volume) { v.link(v.outside, "l") }},
		"dangling dir link":       {path: "l/x/y", make: link("../escaped", "l")},
		"link in subdir":          {path: "d/l/secret", make: link("../../outside", "d/l")},
		"link by link":            {path: "k/secret", make: func(v *volume) { v.link("../outside", "l"); v.link("l", "k") }},
		"stand-in":                {path: "l", make: standin("../outside/secret", "l"), last: true},
		"absolute stand-in":       {path: "l", make: standin("/etc/hostname", "l"), last: true},
		"dangling stand-in":       {path: "l", make: standin("../escaped", "l"), last: true},
		"stand-in dir":            {path: "l/secret", make: standin("../outside", "l")},
		"stand-in by link":        {path: "k/secret", make: func(v *volume) { standin("../outside", "l")(v); v.link("l", "k") }},
		"link by stand-in":        {path: "k/secret", make: func(v *volume) { v.link("../outside", "l"); standin("l", "k")(v) }},
		"self in proc":            {path: "l/1/root/etc/hostname", make: link("/proc", "l")},
		"up and down":             {path: "l", make: link("../vol/ok", "l"), last: true},
		"stand-in up and down":    {path: "l", make: standin("../vol/ok", "l"), last: true},
		"link with missing parts": {path: "l/x", make: link("nope/../../escaped", "l")},
	}
	for variant, o := range variants {
		for name, w := range ways {
			for _, op := range operations {
				t.Run(variant+"/"+name+"/"+op.name, func(t *testing.T) {
					v := newVolume(t, o)
					v.put("ok", "content")
					if w.make != nil {
						w.make(v)
					}
					err := op.do(v, w.path)
					if w.last && op.itself || name == "link with missing parts" {
						if err == errLeaked {
							t.Error(err)
						}
						return
					}
					wantErr(t, err, errdefs.ErrPathEscape)
				})
			}
		}
	}
}

// raceAttempts is how many calls a resolver is attacked with: more than a
// thousand of every operation with every path. In a soak MSB_SOAK says how long
// it goes on.
const raceAttempts = 200_000

func attemptsOf(t testing.TB) int {
	if testing.Short() {
		return raceAttempts / 10
	}
	return raceAttempts
}

// soak returns how long a soak is to go on, 0 outside of one.
func soak(t testing.TB) time.Duration {
	d, err := time.ParseDuration(cmp.Or(os.Getenv("MSB_SOAK"), "0s"))
	if err != nil {
		t.Fatalf("MSB_SOAK: %v", err)
	}
	return d
}

// racePaths are the path forms of reference B-28. Most go through a name that is
// a directory or a file at one instant and leads outside at the next.
var racePaths = []string{
	"swap/secret", "swap/new", "swap/dir/new", "swap", "nested/swap/secret", "nested/swap/dir/deep/new",
	"through/secret", "standin/secret", "standin/new", "nested/../swap/secret", "absolute/secret",
	"leaf", "standin-leaf", "dangling", "absolute-dangling", "standin-dangling",
	"../outside/secret", "nested/../../outside/secret", "nope/../../escaped", "swap/../../outside/secret",
}

// raceSwap is a name that changes between what is inside and a link, or a
// stand-in, that leads outside.
type raceSwap struct {
	name, target  string
	dir, standsIn bool
}

func (v *volume) raceSwaps() []raceSwap {
	return []raceSwap{
		{name: "swap", target: "../outside", dir: true},
		{name: "nested/swap", target: "../../outside", dir: true},
		{name: "absolute", target: v.outside, dir: true},
		{name: "standin", target: "../outside", dir: true, standsIn: true},
		{name: "leaf", target: "../outside/secret"},
		{name: "dangling", target: "../escaped"},
		{name: "absolute-dangling", target: filepath.Dir(v.outside) + "/escaped"},
		{name: "standin-leaf", target: "../outside/secret", standsIn: true},
		{name: "standin-dangling", target: "../escaped", standsIn: true},
	}
}

// TestSwapRace: the tree changes under every operation, as fast as it can.
// Nothing outside is read, made, changed or removed.
func TestSwapRace(t *testing.T) {
	for name, o := range variants {
		t.Run(name, func(t *testing.T) {
			v := newVolumeIn(t, memoryDir(t), o)
			start := time.Now()
			stop := v.swapper()
			attempts, refused := v.attack(attemptsOf(t), soak(t), func(op operation, p string) error { return op.do(v, p) })
			swaps := stop()
			t.Logf("soak: part=containment resolver=%s attempts=%d cases=%d refused=%d swaps=%d findings=0 seconds=%.0f",
				name, attempts, len(operations)*len(racePaths), refused, swaps, time.Since(start).Seconds())
			if refused == 0 || swaps == 0 {
				t.Errorf("the race was not on: %d refusals, %d swaps", refused, swaps)
			}
		})
	}
}

// attack calls every operation with every path in rotation, at least so often
// and so long, restoring what they remove, and returns how many calls there were
// and how many were refused.
func (v *volume) attack(least int, d time.Duration, call func(op operation, path string) error) (attempts, refused int) {
	for end := time.Now().Add(d); attempts < least || time.Now().Before(end); {
		for _, op := range operations {
			for _, p := range racePaths {
				err := call(op, p)
				attempts++
				if err == errLeaked {
					v.t.Fatalf("%s %s read from outside after %d attempts", op.name, p, attempts)
				}
				if err != nil && strings.Contains(err.Error(), errEscape.text) {
					refused++
				}
			}
			if attempts%16 == 0 {
				v.restore()
			}
		}
		v.restore()
	}
	return attempts, refused
}

// restore makes what the operations may have removed.
func (v *volume) restore() {
	for _, d := range []string{"nested", "dir.a", "dir.b", "dir.c"} {
		_ = os.MkdirAll(v.path(d), 0o755)
	}
	_ = os.WriteFile(v.path("ok"), []byte("ok"), 0o644)
	_ = os.Symlink("swap", v.path("through"))
}

// swapper swaps the names in rotation until the returned function is called.
func (v *volume) swapper() (stop func() int) {
	v.restore()
	swaps := v.raceSwaps()
	for _, w := range swaps {
		v.makeBoth(w)
	}
	done, ended := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-done:
				ended <- n
				return
			default:
			}
			for _, w := range swaps {
				n += v.swap(w)
			}
		}
	}()
	stop = sync.OnceValue(func() int { close(done); return <-ended })
	v.t.Cleanup(func() { stop() })
	return stop
}

func (v *volume) swap(w raceSwap) int {
	a, b := v.path(w.name), v.path(w.name+".link")
	if unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE) == nil {
		return 1
	}
	v.makeBoth(w) // an operation took one of the two
	return 0
}

// makeBoth makes what is missing of a swap's two names.
func (v *volume) makeBoth(w raceSwap) {
	inside, out := v.path(w.name), v.path(w.name+".link")
	if w.dir {
		_ = os.Mkdir(inside, 0o755)
	} else if _, err := os.Lstat(inside); err != nil {
		_ = os.WriteFile(inside, []byte("ours"), 0o644)
	}
	if _, err := os.Lstat(out); err == nil {
		return
	}
	if !w.standsIn {
		_ = os.Symlink(w.target, out)
		return
	}
	ov := overlay{set: true, mode: unix.S_IFLNK | 0o777}
	_ = os.WriteFile(out, []byte(w.target), 0o600)
	_ = unix.Setxattr(out, overlayXattr, ov.encode(), 0)
}

// TestSwapRaceCatchesNaive: the same attack on the obvious implementation,
// which checks the path and then opens it, gets out; so the race above means
// something.
func TestSwapRaceCatchesNaive(t *testing.T) {
	base := t.TempDir()
	v := &volume{t: t, dir: filepath.Join(base, "vol"), outside: filepath.Join(base, "outside")}
	v.mkdir(v.dir)
	v.put(filepath.Join(v.outside, "secret"), secretText)
	v.swapper()
	var escapes atomic.Int64
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && escapes.Load() == 0; {
		for _, p := range racePaths {
			if b, err := naiveRead(v.dir, p); err == nil && string(b) == secretText {
				escapes.Add(1)
			}
		}
	}
	if escapes.Load() == 0 {
		t.Error("no escape found: the race harness proves nothing")
	}
}

// naiveRead resolves, checks the prefix, opens.
func naiveRead(root, path string) ([]byte, error) {
	real, err := filepath.EvalSymlinks(filepath.Join(root, path))
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(real, root+"/") {
		return nil, errEscape
	}
	return os.ReadFile(filepath.Join(root, path))
}

// FuzzOperations: a tree and a list of calls made from bytes. Both resolvers
// must agree on every answer and on the tree that results, and nothing outside
// may be touched (newVolume checks).
func FuzzOperations(f *testing.F) {
	for seed := range 8 {
		b := make([]byte, 96)
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 512 {
			return
		}
		one := runScript(t, Options{}, b)
		two := runScript(t, Options{Resolver: Walk, NoUnnamed: true, NoXattrAt: true}, b)
		if one != two {
			t.Errorf("openat2:\n%s\nwalk:\n%s", one, two)
		}
	})
}

var scriptNames = []string{"a", "b", "c", "..", ".", "", "d\xff", "../outside", "secret", "/", "escaped", "a/b"}

// runScript interprets bytes as tree building and operations and returns a
// transcript.
func runScript(t *testing.T, o Options, b []byte) string {
	v := newVolumeIn(t, memoryDir(t), o)
	_ = os.WriteFile(v.path("ok"), []byte("ok"), 0o644)
	var log strings.Builder
	next := func() int {
		if len(b) == 0 {
			return 0
		}
		c := b[0]
		b = b[1:]
		return int(c)
	}
	path := func() string {
		parts := make([]string, 1+next()%4)
		for i := range parts {
			parts[i] = scriptNames[next()%len(scriptNames)]
		}
		return strings.Join(parts, "/")
	}
	for len(b) > 0 {
		switch c := next(); {
		case c%4 == 0:
			target := path()
			if dir, name := filepath.Split(strings.Trim(path(), "/")); target != "" && name != "" {
				v.buildLink(c/4%2 == 0, target, dir, name)
			}
		default:
			op := operations[next()%len(operations)]
			p := path()
			err := op.do(v, p)
			if err == errLeaked {
				t.Fatalf("%s %q: %v", op.name, p, err)
			}
			fmt.Fprintf(&log, "%s %q: %v\n", op.name, p, err)
		}
	}
	return log.String() + strings.Join(v.tree(), "\n")
}

// buildLink makes a link or a stand-in where that needs no way out itself.
func (v *volume) buildLink(real bool, target, dir, name string) {
	if strings.Contains(dir+name, "..") || name == "." {
		return
	}
	parent, err := filepath.EvalSymlinks(v.path(dir))
	if err != nil || parent != v.dir && !strings.HasPrefix(parent, v.dir+"/") {
		return
	}
	p := filepath.Join(parent, name)
	if real {
		_ = os.Symlink(target, p)
		return
	}
	file, err := os.OpenFile(p, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer file.Close()
	_, _ = file.WriteString(target)
	ov := overlay{set: true, mode: unix.S_IFLNK | 0o777}
	_ = unix.Fsetxattr(int(file.Fd()), overlayXattr, ov.encode(), 0)
}
