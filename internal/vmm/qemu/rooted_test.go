package qemu_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// mkfs makes an ext4 image of so many MiB, filled from dir if that is not "".
func mkfs(t *testing.T, path, dir string, mib int) {
	t.Helper()
	tool, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		tool, err = exec.LookPath("/usr/sbin/mkfs.ext4")
	}
	need(t, "e2fsprogs", err)
	args := []string{"-q", "-F"}
	if dir != "" {
		args = append(args, "-d", dir)
	}
	if out, err := exec.Command(tool, append(args, path, fmt.Sprintf("%dM", mib))...).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
}

// rootImage makes a root file system with the test program and accounts.
func rootImage(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	for _, d := range []string{"bin", "etc", "home/ann", "work", "ro-parent"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(tree, "bin/prog"), "./testdata/prog")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build prog: %v\n%s", err, out)
	}
	for name, f := range map[string]struct {
		text string
		mode os.FileMode
	}{
		"etc/passwd":  {"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n", 0o644},
		"etc/group":   {"root:x:0:\nann:x:1000:\nteam:x:2000:ann\n", 0o644},
		"etc/hosts":   {"127.0.0.1 localhost # the image's own\n", 0o644},
		"bin/plain":   {"no program", 0o644},
		"bin/garbage": {"no program either", 0o755},
		"bin/orphan":  {"#!/no/such/interpreter\n", 0o755},
	} {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(f.text), f.mode); err != nil {
			t.Fatal(err)
		}
	}
	img := filepath.Join(t.TempDir(), "root.ext4")
	mkfs(t, img, tree, 64)
	return img
}

func openDisk(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// bootRooted boots a guest on a root image.
func bootRooted(t *testing.T, root, upper string, b agentproto.Boot, more ...vmm.Disk) *guest {
	t.Helper()
	var disks []vmm.Disk
	// QEMU's image locks are on the open description that we share with it.
	defer func() {
		for _, d := range disks {
			d.File.Close()
		}
	}()
	g := boot(t, func(c *vmm.Config) {
		defer func() { disks = c.Disks }()
		c.Disks = append(c.Disks, vmm.Disk{Serial: "root", File: openDisk(t, root, os.O_RDONLY), Readonly: true, Format: "raw"})
		if upper != "" {
			c.Disks = append(c.Disks, vmm.Disk{Serial: "upper", File: openDisk(t, upper, os.O_RDWR), Format: "raw"})
		}
		c.Disks = append(c.Disks, more...)
	})
	b.Root = agentproto.Root{Lower: "root", Fstype: "ext4"}
	if upper != "" {
		b.Root.Upper = "upper"
	}
	g.ready(b)
	return g
}

func (g *guest) prog(args ...string) execResult {
	g.t.Helper()
	return g.exec(agentproto.Exec{Cmd: "prog", Args: args}, "")
}

func TestRootedGuest(t *testing.T) {
	g := bootRooted(t, rootImage(t), "", agentproto.Boot{Hostname: "box", Env: []string{"FROM=boot", "OVER=boot"}, Workdir: "/work"})
	t.Run("identity", func(t *testing.T) { g.with(t).identity() })
	t.Run("users", func(t *testing.T) { g.with(t).users() })
	t.Run("failures", func(t *testing.T) { g.with(t).failures() })
	t.Run("rlimits", func(t *testing.T) { g.with(t).rlimits() })
	t.Run("stdin", func(t *testing.T) { g.with(t).stdin() })
	t.Run("credit", func(t *testing.T) { g.with(t).credit() })
	t.Run("signals", func(t *testing.T) { g.with(t).signals() })
	t.Run("left behind", func(t *testing.T) { g.with(t).leftBehind() })
	t.Run("client gone", func(t *testing.T) { g.with(t).clientGone() })
	t.Run("namespaces", func(t *testing.T) {
		if r := g.with(t).prog("userns"); r.code != 0 {
			t.Errorf("user namespace: %+v", r)
		}
	})
	t.Run("long listing", func(t *testing.T) { g.with(t).longListing() })
	g.t = t
	if e := g.stop(); e.Reason != "guest-shutdown" {
		t.Errorf("exit %+v", e)
	}
}

// with makes failures those of a subtest.
func (g *guest) with(t *testing.T) *guest { g.t = t; return g }

type about struct {
	Args   []string
	Env    []string
	Cwd    string
	UID    int
	GID    int
	Groups []int
	Fsize  uint64
	Pgrp   bool
}

func (g *guest) about(x agentproto.Exec) about {
	g.t.Helper()
	x.Cmd, x.Args = "prog", append([]string{"about"}, x.Args...)
	r := g.exec(x, "")
	var a about
	if r.failed != nil || json.Unmarshal([]byte(r.out), &a) != nil {
		g.t.Fatalf("about: %+v %+v", r, r.failed)
	}
	return a
}

func (g *guest) identity() {
	t := g.t
	a := g.about(agentproto.Exec{Args: []string{"two words", ""}, Env: []string{"OVER=call", "EMPTY="}})
	if fmt.Sprintf("%q", a.Args) != `["two words" ""]` || a.Cwd != "/work" || a.UID != 0 || !a.Pgrp {
		t.Errorf("%+v", a)
	}
	env := strings.Join(a.Env, "\n")
	for _, want := range []string{"FROM=boot", "OVER=call", "EMPTY=", "HOME=/root", "PATH=/usr/local/sbin:"} {
		if !strings.Contains(env, want) {
			t.Errorf("environment lacks %s: %q", want, a.Env)
		}
	}
	for path, want := range map[string]string{
		"/etc/hosts": "127.0.0.1 localhost # the image's own\n", "/etc/hostname": "box\n", "/proc/sys/kernel/hostname": "box\n",
	} {
		if got := g.readFile(path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if !strings.Contains(g.readFile("/etc/resolv.conf"), "no network") {
		t.Error("no resolv.conf")
	}
	for path, mode := range map[string]uint32{"/tmp": 0o1777, "/var/tmp": 0o1777, "/dev/shm": 0o1777, "/run": 0o755} {
		if r, _ := g.fs(agentproto.FSOp{Stat: &agentproto.FSStat{Path: path}}, nil); !r.OK || r.Data.Stat.Mode != mode {
			t.Errorf("%s: %+v, want mode %o", path, r.Data, mode)
		}
	}
}

// readFile reads a guest file as a client does.
func (g *guest) readFile(path string) string {
	g.t.Helper()
	r, _ := g.fs(agentproto.FSOp{OpenFile: &agentproto.FSOpenFile{Path: path, Options: agentproto.FSOpenOptions{Read: true}}}, nil)
	if !r.OK {
		g.t.Errorf("open %s: %s", path, *r.Error)
		return ""
	}
	h := *r.Data.Handle
	r, b := g.fs(agentproto.FSOp{Read: &agentproto.FSTransfer{Handle: h}}, nil)
	if !r.OK {
		g.t.Errorf("read %s: %s", path, *r.Error)
	}
	g.fs(agentproto.FSOp{CloseHandle: &agentproto.FSHandle{Handle: h}}, nil)
	return string(b)
}

func (g *guest) users() {
	t := g.t
	tests := map[string]struct {
		uid, gid int
		groups   string
		home     string
	}{
		"ann":      {1000, 1000, "[2000]", "/home/ann"},
		"1000":     {1000, 1000, "[2000]", "/home/ann"},
		"ann:team": {1000, 2000, "[]", "/home/ann"},
		"77:88":    {77, 88, "[]", "/"},
		"77":       {77, 0, "[]", "/"},
		"0":        {0, 0, "[]", "/root"},
	}
	for spec, want := range tests {
		a := g.about(agentproto.Exec{User: &spec})
		home := ""
		for _, e := range a.Env {
			if v, ok := strings.CutPrefix(e, "HOME="); ok {
				home = v
			}
		}
		if a.UID != want.uid || a.GID != want.gid || fmt.Sprint(a.Groups) != want.groups || home != want.home {
			t.Errorf("user %q: uid %d gid %d groups %v home %q, want %+v", spec, a.UID, a.GID, a.Groups, home, want)
		}
	}
}

func (g *guest) failures() {
	str := func(s string) *string { return &s }
	tests := map[string]struct {
		x    agentproto.Exec
		kind string
	}{
		"no such name":        {agentproto.Exec{Cmd: "nothing"}, "not_found"},
		"no such path":        {agentproto.Exec{Cmd: "/bin/nothing"}, "not_found"},
		"not executable":      {agentproto.Exec{Cmd: "/bin/plain"}, "permission_denied"},
		"in PATH, not exec":   {agentproto.Exec{Cmd: "plain"}, "permission_denied"},
		"no format":           {agentproto.Exec{Cmd: "/bin/garbage"}, "not_executable"},
		"no interpreter":      {agentproto.Exec{Cmd: "/bin/orphan"}, "not_found"},
		"a directory":         {agentproto.Exec{Cmd: "/bin"}, "permission_denied"},
		"no cwd":              {agentproto.Exec{Cmd: "prog", Cwd: str("/none")}, "bad_cwd"},
		"cwd is a file":       {agentproto.Exec{Cmd: "prog", Cwd: str("/bin/prog")}, "bad_cwd"},
		"no such user":        {agentproto.Exec{Cmd: "prog", User: str("bob")}, "user_setup_failed"},
		"no such group":       {agentproto.Exec{Cmd: "prog", User: str("ann:none")}, "user_setup_failed"},
		"NUL":                 {agentproto.Exec{Cmd: "prog", Args: []string{"a\x00b"}}, "bad_args"},
		"unknown limit":       {agentproto.Exec{Cmd: "prog", Rlimits: []agentproto.Rlimit{{Resource: "luck"}}}, "resource_limit"},
		"soft above hard":     {agentproto.Exec{Cmd: "prog", Rlimits: []agentproto.Rlimit{{Resource: "nofile", Soft: 2, Hard: 1}}}, "resource_limit"},
		"limits, no format":   {agentproto.Exec{Cmd: "/bin/garbage", Rlimits: []agentproto.Rlimit{{Resource: "nofile", Soft: 9, Hard: 9}}}, "not_executable"},
		"terminal":            {agentproto.Exec{Cmd: "prog", TTY: true}, "pty_setup_failed"},
		"arguments too large": {agentproto.Exec{Cmd: "prog", Args: []string{strings.Repeat("x", 200_000)}}, "bad_args"},
	}
	for name, tt := range tests {
		if r := g.exec(tt.x, ""); r.failed == nil || r.failed.Kind != tt.kind || r.failed.Message == "" {
			g.t.Errorf("%s: %+v %+v, want %s", name, r, r.failed, tt.kind)
		}
	}
}

func (g *guest) rlimits() {
	user := "ann"
	a := g.about(agentproto.Exec{User: &user, Rlimits: []agentproto.Rlimit{{Resource: "fsize", Soft: 12345, Hard: 23456}, {Resource: "nofile", Soft: 64, Hard: 64}}})
	if a.Fsize != 12345 || a.UID != 1000 || a.Cwd != "/work" || !a.Pgrp || fmt.Sprint(a.Groups) != "[2000]" {
		g.t.Errorf("%+v", a)
	}
}

func (g *guest) stdin() {
	if r := g.prog("cat"); r.code != 0 || r.out != "" {
		g.t.Errorf("without input: %+v", r)
	}
	in := strings.Repeat("line of input\n", 3000)
	if r := g.exec(agentproto.Exec{Cmd: "prog", Args: []string{"cat"}}, in); r.out != in || r.code != 0 {
		g.t.Errorf("%d of %d bytes back, %+v", len(r.out), len(in), r.err)
	}
}

// credit: output that nobody reads stops its program after a window and nobody
// else; later all of it arrives, then the exit.
func (g *guest) credit() {
	t := g.t
	g.next++
	id := g.next
	no := false
	g.send(id, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"spew", "4"}, Stdin: &no})
	var held []agentproto.Frame
	got, bodies := 0, 0
	for bodies < agentproto.Window-agentproto.MaxLinkFrame {
		f, typ, p := g.frame(id)
		if typ == agentproto.MsgStdout {
			d, err := agentproto.DecodeData(p)
			g.must(err)
			got, bodies = got+len(d), bodies+len(f.Body)
			held = append(held, f)
		}
	}
	for range 5 {
		if r := g.prog("exit", "3"); r.code != 3 {
			t.Fatalf("%+v", r)
		}
	}
	for _, f := range g.frames[id] {
		bodies += len(f.Body)
	}
	if bodies > agentproto.Window {
		t.Errorf("%d bytes without credit", bodies)
	}
	for _, f := range held {
		g.send(id, 0, agentproto.MsgCredit, agentproto.Credit{N: uint32(len(f.Body))})
	}
	r := g.collect(id)
	if got+len(r.out) != 4<<20 || r.err != "all written" || r.code != 0 {
		t.Errorf("%d bytes in all, %q, code %d", got+len(r.out), r.err, r.code)
	}
}

// waitOutput reads until the program has printed its first line.
func (g *guest) waitOutput(id uint32) {
	g.t.Helper()
	for {
		if _, typ, _ := g.frame(id); typ == agentproto.MsgStdout {
			return
		}
	}
}

func (g *guest) signals() {
	for sig, code := range map[unix.Signal]int32{unix.SIGTERM: 143, unix.SIGKILL: 137} {
		g.next++
		id := g.next
		g.send(id, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"sleep"}})
		g.waitOutput(id)
		g.send(id, 0, agentproto.MsgSignal, agentproto.Signal{Signal: int32(sig)})
		if r := g.collect(id); r.code != code {
			g.t.Errorf("%v: code %d, want %d", sig, r.code, code)
		}
	}
	// A signal that comes before the program runs is not lost.
	g.next++
	g.send(g.next, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"sleep"}})
	g.send(g.next, 0, agentproto.MsgSignal, agentproto.Signal{Signal: int32(unix.SIGKILL)})
	if r := g.collect(g.next); r.code != 137 {
		g.t.Errorf("early signal: %+v", r)
	}
}

// leftBehind: the exit of a program is reported although another process still
// holds its output, and that one lives on.
func (g *guest) leftBehind() {
	if r := g.prog("leave"); r.code != 0 || !strings.HasPrefix(r.out, "left\n") && !strings.Contains(r.out, "left\n") {
		g.t.Fatalf("%+v", r)
	}
	first := g.counter("")
	g.counter(first)
	if r, _ := g.fs(agentproto.FSOp{Stat: &agentproto.FSStat{Path: "/tmp/chatter-died"}}, nil); r.OK {
		g.t.Error("the process left behind died of its output")
	}
}

// counter waits until the process left behind has counted on.
func (g *guest) counter(from string) string {
	g.t.Helper()
	for began := time.Now(); time.Since(began) < time.Minute; {
		r, _ := g.fs(agentproto.FSOp{Stat: &agentproto.FSStat{Path: "/tmp/chatter"}}, nil)
		if r.OK {
			if now := g.readFile("/tmp/chatter"); now != "" && now != from {
				return now
			}
		}
	}
	g.t.Fatal("no sign of the process left behind")
	return ""
}

// clientGone: programs, handles and transfers of a client end with it.
func (g *guest) clientGone() {
	t := g.t
	const start = 1 << 20
	g.send(start, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"sleep"}})
	g.waitOutput(start)
	g.send(start+1, agentproto.FlagSessionStart, agentproto.MsgFSRequest, agentproto.FSRequest{Op: agentproto.FSOp{
		OpenFile: &agentproto.FSOpenFile{Path: "/etc/passwd", Options: agentproto.FSOpenOptions{Read: true}},
	}})
	_, _, p := g.frame(start + 1)
	var r agentproto.FSResponse
	g.must(agentproto.Unmarshal(p, &r))
	h := *r.Data.Handle
	g.send(0, 0, agentproto.MsgClientGone, agentproto.ClientGone{IDStart: start, IDEndExclusive: start + 100})
	if r, _ := g.fs(agentproto.FSOp{FStat: &agentproto.FSHandle{Handle: h}}, nil); r.OK || *r.Errno != int32(unix.EBADF) {
		t.Errorf("handle of a client that is gone: %+v", r)
	}
	// The ids are free for the next client.
	g.send(start, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"exit", "5"}})
	if r := g.collect(start); r.code != 5 {
		t.Errorf("next client: %+v", r)
	}
}

// longListing: an answer beyond 64 KiB comes in parts and does not need credit.
func (g *guest) longListing() {
	name := strings.Repeat("n", 100)
	for i := range 500 {
		r, _ := g.fs(agentproto.FSOp{Mkdir: &agentproto.FSMkdir{Path: fmt.Sprintf("/tmp/many/%s%d", name, i)}}, nil)
		if !r.OK {
			g.t.Fatal(*r.Error)
		}
	}
	r, _ := g.fs(agentproto.FSOp{List: &agentproto.FSPath{Path: "/tmp/many"}}, nil)
	if !r.OK || len(*r.Data.List) != 500 {
		g.t.Errorf("listing: %v", r.Error)
	}
	if r, _ := g.fs(agentproto.FSOp{RemoveDir: &agentproto.FSRemoveDir{Path: "/tmp/many", Recursive: true}}, nil); !r.OK {
		g.t.Errorf("remove: %s", *r.Error)
	}
}

// TestMountsAndUpperDisk: every kind of mount with its flags, the upper disk
// over two boots, and file systems that are clean after a stop.
func TestMountsAndUpperDisk(t *testing.T) {
	dir := t.TempDir()
	root, upper, vol := rootImage(t), filepath.Join(dir, "upper"), filepath.Join(dir, "vol")
	mkfs(t, upper, "", 64)
	mkfs(t, vol, "", 16)
	boot := agentproto.Boot{Hostname: "box", Mounts: []agentproto.Mount{
		{Kind: "tmpfs", Guest: "/data/inner", Size: 1 << 20, Noexec: true, Nosuid: true, Nodev: true},
		{Kind: "disk", Guest: "/data", Source: "vol1"}, // a parent, given second
		{Kind: "tmpfs", Guest: "/fixed", Readonly: true},
	}}
	disk := func(flags int, ro bool) vmm.Disk {
		return vmm.Disk{Serial: "vol1", File: openDisk(t, vol, flags), Readonly: ro, Format: "raw"}
	}
	g := bootRooted(t, root, upper, boot, disk(os.O_RDWR, false))
	mounts := g.readFile("/proc/mounts")
	for _, want := range []string{"overlay / overlay rw", " /data ext4 rw,relatime", "tmpfs /data/inner tmpfs rw,nosuid,nodev,noexec,relatime,size=1024k", "tmpfs /fixed tmpfs ro,relatime"} {
		if !strings.Contains(mounts, want) {
			t.Errorf("no %q in\n%s", want, mounts)
		}
	}
	for path, ok := range map[string]bool{"/data/file": true, "/data/inner/file": true, "/home/ann/file": true, "/fixed/file": false} {
		if r := g.write(path, "kept"); r.OK != ok {
			t.Errorf("write %s: %+v", path, r)
		}
	}
	// Neither a program that does not end nor one that works on the volume may
	// keep the file systems from being unmounted.
	cwd := "/data"
	g.send(900, agentproto.FlagSessionStart, agentproto.MsgExec, agentproto.Exec{Cmd: "prog", Args: []string{"stubborn"}, Cwd: &cwd})
	g.waitOutput(900)
	if e := g.stop(); e.Reason != "guest-shutdown" {
		t.Fatalf("exit %+v", e)
	}
	for _, img := range []string{upper, vol} {
		clean(t, img)
	}

	boot.Mounts = []agentproto.Mount{{Kind: "disk", Guest: "/data", Source: "vol1", Readonly: true, Fstype: ""}}
	g = bootRooted(t, root, upper, boot, disk(os.O_RDONLY, true))
	if got := g.readFile("/data/file") + g.readFile("/home/ann/file"); got != "keptkept" {
		t.Errorf("after the second boot: %q", got)
	}
	if r := g.write("/data/more", "x"); r.OK || *r.Errno != int32(unix.EROFS) {
		t.Errorf("write to a read-only disk: %+v", r)
	}
	g.stop()
}

// write writes a small file and closes it.
func (g *guest) write(path, text string) agentproto.FSResponse {
	g.t.Helper()
	r, _ := g.fs(agentproto.FSOp{OpenFile: &agentproto.FSOpenFile{Path: path, Options: agentproto.FSOpenOptions{Write: true, Create: true, Truncate: true}}}, nil)
	if !r.OK {
		return r
	}
	h := *r.Data.Handle
	r, _ = g.fs(agentproto.FSOp{Write: &agentproto.FSTransfer{Handle: h}}, []byte(text))
	g.fs(agentproto.FSOp{CloseHandle: &agentproto.FSHandle{Handle: h}}, nil)
	return r
}

// clean demands that an image needs no repair and no journal replay.
func clean(t *testing.T, img string) {
	t.Helper()
	out, err := exec.Command("/usr/sbin/dumpe2fs", "-h", img).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("needs_recovery")) {
		t.Errorf("%s after a clean stop: %v\n%s", filepath.Base(img), err, out)
	}
	if out, err := exec.Command("/usr/sbin/e2fsck", "-fn", img).CombinedOutput(); err != nil {
		t.Errorf("e2fsck %s: %v\n%s", filepath.Base(img), err, out)
	}
}

// TestDirtyJournalReadOnly: a volume whose guest was killed mounts read-only.
func TestDirtyJournalReadOnly(t *testing.T) {
	root, vol := rootImage(t), filepath.Join(t.TempDir(), "vol")
	mkfs(t, vol, "", 16)
	mount := agentproto.Boot{Mounts: []agentproto.Mount{{Kind: "disk", Guest: "/data", Source: "vol1"}}}
	g := bootRooted(t, root, "", mount, vmm.Disk{Serial: "vol1", File: openDisk(t, vol, os.O_RDWR), Format: "raw"})
	if r := g.write("/data/file", "x"); !r.OK {
		t.Fatal(*r.Error)
	}
	g.m.Kill()
	<-g.m.Done()
	if out, _ := exec.Command("/usr/sbin/dumpe2fs", "-h", vol).Output(); !bytes.Contains(out, []byte("needs_recovery")) {
		t.Fatal("the journal is not dirty: the test proves nothing")
	}
	mount.Mounts[0].Readonly = true
	g = bootRooted(t, root, "", mount, vmm.Disk{Serial: "vol1", File: openDisk(t, vol, os.O_RDONLY), Readonly: true, Format: "raw"})
	if m := g.readFile("/proc/mounts"); !strings.Contains(m, " /data ext4 ro") {
		t.Errorf("mounts:\n%s", m)
	}
	g.stop()
}

// TestBootFailedNamesTheStep: the machine powers off after saying what it could
// not do.
func TestBootFailedNamesTheStep(t *testing.T) {
	g := boot(t, nil)
	g.send(0, 0, agentproto.MsgBoot, agentproto.Boot{Mounts: []agentproto.Mount{{Kind: "disk", Guest: "/data", Source: "missing"}}})
	var f agentproto.BootFailed
	g.expect(0, agentproto.MsgBootFailed, &f)
	if f.Step != "mount /data" || !strings.Contains(f.Message, `no disk with serial "missing"`) {
		t.Errorf("%+v", f)
	}
	<-g.m.Done()
	if e := g.m.Exit(); e.Reason != "guest-shutdown" {
		t.Errorf("exit %+v", e)
	}
}

// TestImageLock: two machines cannot write one image, and the error says so
// before anything has booted.
func TestImageLock(t *testing.T) {
	vol := filepath.Join(t.TempDir(), "vol")
	mkfs(t, vol, "", 16)
	disk := func(c *vmm.Config) {
		c.Disks = []vmm.Disk{{Serial: "vol1", File: openDisk(t, vol, os.O_RDWR), Format: "raw"}}
	}
	boot(t, disk)
	err := start(t, disk)
	if err == nil || !strings.Contains(err.Error(), `Failed to get "write" lock`) {
		t.Errorf("second machine: %v", err)
	}
}
