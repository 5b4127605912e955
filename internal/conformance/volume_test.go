package conformance_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/conformance"
	"github.com/microsandbox-go/microsandbox/internal/conformance/guesttest"
	"github.com/microsandbox-go/microsandbox/internal/vmtest"
)

const (
	strict = microsandbox.StatVirtualizationStrict
	off    = microsandbox.StatVirtualizationOff
)

// A part is something that programs do to a volume.
type part struct {
	name string
	run  func(*testing.T, *kit, *place)
}

// TestVolume runs everything on four volumes, kept under strict and off and
// used by root and by an ordinary user of the guest.
func TestVolume(t *testing.T) {
	vmtest.Home(t)
	k := makeKit(t)
	k.baseline(t)
	parts := []part{{"posix", posix}, {"tar", archive}, {"git", repository}, {"both sides", bothSides}, {"tree", bigTree}}
	for _, policy := range []microsandbox.StatVirtualization{strict, off} {
		name := string(policy)
		inGuest(t, k, name, parts, &place{volume: name + "-root", policy: policy}, &place{volume: name + "-user", policy: policy, uid: 1000})
	}
}

// inGuest runs parts at the places of one sandbox, beside other sandboxes.
func inGuest(t *testing.T, k *kit, name string, parts []part, places ...*place) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		boot(t, k, name, places...)
		for _, p := range places {
			for _, part := range parts {
				t.Run(fmt.Sprintf("uid %d/%s", p.uid, part.name), func(t *testing.T) {
					began := time.Now()
					part.run(t, k, p.on(t))
					took(t, part.name, began)
				})
			}
		}
	})
}

// results are what a run of the guest's binary reported: PASS, FAIL or SKIP by
// name, and what each test printed.
type results struct{ verdict, printed map[string]string }

func parseResults(out string) results {
	r := results{map[string]string{}, map[string]string{}}
	running := ""
	for _, line := range lines(out) {
		if name, ok := strings.CutPrefix(line, "=== RUN "); ok {
			running = strings.TrimSpace(name)
			continue
		}
		if words := strings.Fields(line); len(words) == 4 && words[0] == "---" {
			r.verdict[words[2]] = strings.TrimSuffix(words[1], ":")
			continue
		}
		r.printed[running] += line + "\n"
	}
	return r
}

// baseline runs the guest's tests on a plain directory of the host: what skips
// there may skip in the guest, what fails there says nothing about volumes.
func (k *kit) baseline(t *testing.T) {
	t.Helper()
	uids := []int{0, 1000}
	if me := os.Geteuid(); me != 0 {
		uids = []int{me}
	}
	for _, uid := range uids {
		out := onHost(t, k, uid, "$KIT/guest.test -test.v")
		verdicts := parseResults(out).verdict
		if k.plainBaseline != nil && !maps.Equal(verdicts, k.plainBaseline) {
			t.Fatalf("an ordinary user of the host gets other results:\n%s", out)
		}
		k.plainBaseline = verdicts
		tar, want := "devices.tar", k.strict
		if uid != 0 {
			tar, want = "plain.tar", owned(k.root, uint32(uid))
		}
		out = onHost(t, k, uid, "tar --xattrs -xpf $KIT/"+tar+"; $KIT/guest.test digest .")
		sameLines(t, lines(out), conformance.Digest(want))
	}
}

// onHost runs a script in an empty directory of a user of the host.
func onHost(t *testing.T, k *kit, uid int, script string) string {
	t.Helper()
	dir := openDir(t)
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-euc", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), guesttest.DirEnv+"="+dir, "KIT="+k.dir, "LC_ALL=C.UTF-8")
	if uid != os.Geteuid() {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	var talk strings.Builder
	cmd.Stderr = &talk
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("on a plain directory, uid %d: %v\n%s%s", uid, err, tail(string(out)), tail(talk.String()))
	}
	return string(out)
}

// owned returns what an ordinary user gets, who cannot give files away.
func owned(entries []*conformance.Entry, uid uint32) []*conformance.Entry {
	out := make([]*conformance.Entry, len(entries))
	for i, e := range entries {
		c := *e
		c.UID, c.GID = uid, uid
		out[i] = &c
	}
	return out
}

// posix runs the checks of go-fuse's suite and random operations on one file.
func posix(t *testing.T, k *kit, p *place) {
	out, talk, code := p.tries("/kit/guest.test -test.v -test.timeout 200s")
	r := parseResults(out)
	if len(r.verdict) != len(k.plainBaseline) {
		t.Errorf("%d tests ran, %d on a plain directory; exit code %d\n%s%s", len(r.verdict), len(k.plainBaseline), code, tail(out), tail(talk))
	}
	for name, verdict := range r.verdict {
		t.Run(strings.TrimPrefix(name, "Test"), func(t *testing.T) {
			switch {
			case verdict == "FAIL":
				t.Errorf("%s", r.printed[name])
			case verdict == "SKIP" && k.plainBaseline[name] != "SKIP":
				t.Errorf("skipped, but not on a plain directory:\n%s", r.printed[name])
			case verdict == "SKIP":
				t.Skip(r.printed[name])
			}
		})
	}
}

// archive extracts a tar archive in the guest and compares what is there.
func archive(t *testing.T, k *kit, p *place) {
	name, want, options := "plain.tar", k.root, ""
	switch {
	case p.fixedOwner():
		want = onlyPermissions(owned(want, uint32(os.Geteuid())))
		options = "--no-same-owner"
		if out, talk, _ := p.tries(`touch given; chown 1:1 given || :`); !strings.Contains(talk, "Operation not permitted") {
			t.Errorf("chown says %s%s", out, talk)
		}
	case p.uid != 0:
		want = owned(want, uint32(p.uid))
	case p.policy == strict:
		name, want = "devices.tar", k.strict
	}
	if p.policy == off {
		want = withoutSetID(want)
	}
	got := p.runs(`mkdir tar; tar --xattrs ` + options + ` -C tar -xpf /kit/` + name + `; /kit/guest.test digest tar`)
	sameLines(t, lines(got), conformance.Digest(want))
	fromHost(t, p, want)
	p.runs(`rm -r tar; ! ls tar 2>/dev/null`)
}

// onlyPermissions returns what is left of modes where the host's user keeps the
// right to read and write, and no set-id or sticky bit: stat-virt=off as an
// ordinary user of the host.
func onlyPermissions(entries []*conformance.Entry) []*conformance.Entry {
	for _, e := range entries {
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			e.Mode = e.Mode&^0o7000 | 0o600
		case unix.S_IFDIR:
			e.Mode = e.Mode&^0o7000 | 0o700
		}
	}
	return entries
}

// withoutSetID returns what is left of modes under stat-virt=off: a file's
// set-id bits never reach the host.
func withoutSetID(entries []*conformance.Entry) []*conformance.Entry {
	out := make([]*conformance.Entry, 0, len(entries))
	for _, e := range entries {
		c := *e
		if c.Mode&unix.S_IFMT == unix.S_IFREG {
			c.Mode &^= unix.S_ISUID | unix.S_ISGID
		}
		out = append(out, &c)
	}
	return out
}

// fromHost compares what the volume shows on the host.
func fromHost(t *testing.T, p *place, want []*conformance.Entry) {
	ctx := context.Background()
	h, err := microsandbox.GetVolume(ctx, p.volume)
	if err != nil {
		t.Fatal(err)
	}
	if p.policy == off { // nothing is kept elsewhere
		got, err := conformance.Scan(filepath.Join(h.Path(), "tar"))
		if err != nil {
			t.Fatal(err)
		}
		sameLines(t, conformance.Digest(got), conformance.Digest(want))
	}
	kinds := map[string]microsandbox.FsEntryKind{}
	targets := map[string]*conformance.Entry{}
	for _, e := range want {
		name := "/tar/" + e.Path
		targets[name] = e
		if e.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		list, err := h.FS().List(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range list {
			kinds[l.Path] = l.Kind
		}
	}
	followed := 0
	for name, e := range targets {
		if strings.Count(e.Path, "/") == 0 {
			continue // listed with the volume's root
		}
		isLink := e.Mode&unix.S_IFMT == unix.S_IFLNK
		if isLink != (kinds[name] == microsandbox.FsEntryKindSymlink) {
			t.Errorf("%s: mode %o is listed as %q", name, e.Mode, kinds[name])
		}
		to := targets[path.Join(path.Dir(name), e.Target)]
		if !isLink || to == nil || path.IsAbs(e.Target) {
			continue
		}
		followed++
		st, err := h.FS().Stat(ctx, name)
		if err != nil {
			t.Errorf("stat of %s, a link to %s: %v", name, e.Target, err)
		} else if st.Kind != microsandbox.FsEntryKindFile || st.Size != to.Size {
			t.Errorf("stat of %s gives %s of %d bytes, want a file of %d", name, st.Kind, st.Size, to.Size)
		}
	}
	if followed < 100 {
		t.Errorf("only %d links followed", followed)
	}
}

// repository clones a repository from one place on the volume to another.
func repository(t *testing.T, k *kit, p *place) {
	// Without the variables the program gives memory back, and asks for it
	// again, for each object: 90 % of its time in a guest without KVM.
	p.runs(`git init -q --bare src; git -C src symbolic-ref HEAD refs/heads/main
		export MALLOC_TOP_PAD_=67108864 MALLOC_TRIM_THRESHOLD_=1000000000
		git -C src -c core.compression=1 fast-import --quiet --depth=5 </kit/repository`)
	p.runs(`git clone -q src copy`)
	out := p.runs(`cd copy; git fsck --full --strict --no-progress 2>&1; git status --porcelain
		git rev-list --count HEAD; git ls-files | wc -l; git describe`)
	if want := fmt.Sprintf("%d\n%d\nv1\n", conformance.RepositoryCommits, conformance.RepositoryFiles); out != want {
		t.Errorf("fsck, status, commits, files: %q, want %q", out, want)
	}
	h, err := microsandbox.GetVolume(context.Background(), p.volume)
	if err != nil {
		t.Fatal(err)
	}
	if list, err := h.FS().List(context.Background(), "/copy"); err != nil || len(list) != 41 {
		t.Errorf("seen from the host the clone has %d entries, %v", len(list), err)
	}
	p.runs(`rm -r src copy`)
}

// bothSides lets guest and host replace and read files at the same time.
func bothSides(t *testing.T, _ *kit, p *place) {
	const last = 100
	h, err := microsandbox.GetVolume(context.Background(), p.volume)
	if err != nil {
		t.Fatal(err)
	}
	p.runs(`mkdir swap`)
	ctx := context.Background()
	if err := h.FS().Write(ctx, "/swap/host", conformance.Numbered(0)); err != nil {
		t.Fatal(err)
	}
	done := make(chan string, 1)
	go func() {
		_, talk, code := p.tries("/kit/guest.test swap swap " + strconv.Itoa(last))
		if code != 0 {
			talk = fmt.Sprintf("exit code %d: %s", code, talk)
		}
		done <- talk
	}()
	seen := 0
	for i := 1; ; i++ {
		if i <= last {
			if err := h.FS().Write(ctx, "/swap/host", conformance.Numbered(i)); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case talk := <-done:
			if talk != "" {
				t.Error(talk)
			}
			if b, err := h.FS().Read(ctx, "/swap/guest"); err != nil || string(b) != string(conformance.Numbered(last)) {
				t.Errorf("at the end the host reads %d bytes, %v", len(b), err)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
		b, err := h.FS().Read(ctx, "/swap/guest")
		if err != nil {
			continue // not there yet
		}
		n, err := conformance.CheckNumbered(b)
		if err != nil || n < seen {
			t.Errorf("after %d the host reads %d, %v", seen, n, err)
		}
		seen = n
	}
}

// bigTree finds and removes many files; root's are made by the host. The guest's
// kernel knows them all at once, and the file server holds a descriptor for each.
func bigTree(t *testing.T, _ *kit, p *place) {
	dirs, files := 20, 200
	if p.uid == 0 {
		h, err := microsandbox.GetVolume(context.Background(), p.volume)
		if err != nil {
			t.Fatal(err)
		}
		plant(t, filepath.Join(h.Path(), "tree"), dirs, files)
	} else {
		files = 50 // making them in the guest is slow
		p.runs(fmt.Sprintf(`for d in $(seq %d); do mkdir -p tree/$d; for f in $(seq %d); do printf x >tree/$d/$f; done; done`, dirs, files))
	}
	if out := p.runs(`find tree -type f -size 1c | wc -l`); out != fmt.Sprintln(dirs*files) {
		t.Errorf("find counts %s of %d files", out, dirs*files)
	}
	p.runs(`rm -r tree; ! ls tree 2>/dev/null`)
}

func plant(t *testing.T, tree string, dirs, files int) {
	t.Helper()
	for d := range dirs {
		dir := filepath.Join(tree, strconv.Itoa(d))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f := range files {
			if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(f)), []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}
