package confine

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/confine/confinetest"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// qemuBinary finds a QEMU or skips.
func qemuBinary(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	confinetest.Need(t, err == nil, "qemu-system-x86_64")
	return path
}

// qmp is a client of a QEMU on one end of a socket pair.
type qmp struct {
	t *testing.T
	c net.Conn
	r *bufio.Scanner
}

// call executes one command and returns its error class and text, "" for none.
func (q *qmp) call(command string, args any) string {
	q.t.Helper()
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	if err != nil {
		q.t.Fatal(err)
	}
	if _, err := q.c.Write(b); err != nil {
		q.t.Fatal(err)
	}
	for q.r.Scan() {
		var reply struct {
			Return *json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := json.Unmarshal(q.r.Bytes(), &reply); err != nil {
			q.t.Fatal(err)
		}
		switch {
		case reply.Error != nil:
			return reply.Error.Desc
		case reply.Return != nil:
			return ""
		}
	}
	q.t.Fatalf("QMP ended: %v", q.r.Err())
	return ""
}

// confinedQEMU is a stopped microvm under a VMM's confinement.
type confinedQEMU struct {
	*qmp
	pid  int
	disk *os.File
	v    *VMM
}

func startQEMU(t *testing.T, without ...Measure) *confinedQEMU {
	t.Helper()
	binary := qemuBinary(t)
	v, err := NewVMM(testMSB(t), without...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, its := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	defer ours.Close()
	defer its.Close()
	disk := emptyDisk(t)
	kernel := filepath.Join(readableDir(t), "kernel")
	if err := os.WriteFile(kernel, []byte("not looked at before the guest runs"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd, err := v.Launch([]string{binary, "-no-user-config", "-nodefaults", "-display", "none", "-S",
		"-M", "microvm,memory-backend=mem", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "64",
		"-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-global", "virtio-mmio.force-legacy=false",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		"-add-fd", "fd=4,set=1", "-blockdev", "driver=raw,node-name=d,file.driver=file,file.filename=/dev/fdset/1,file.locking=on",
		"-device", "virtio-blk-device,drive=d",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}, []*os.File{its, disk}, []string{kernel})
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := confinetest.KeptThread(t)(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	its.Close() // so that the end of QEMU ends the connection
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	q := &qmp{t: t, c: conn, r: bufio.NewScanner(conn)}
	if !q.r.Scan() {
		_, why := v.Outcome()
		t.Fatalf("no QMP greeting: %v; %v", q.r.Err(), why)
	}
	if e := q.call("qmp_capabilities", struct{}{}); e != "" {
		t.Fatal(e)
	}
	return &confinedQEMU{q, cmd.Process.Pid, disk, v}
}

// readableDir is a temporary directory below which any uid can read.
func readableDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func emptyDisk(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "disk.raw"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	return f
}

// addFile makes QEMU open a host path.
func (q *confinedQEMU) addFile(path string) string {
	return q.call("blockdev-add", map[string]any{"driver": "file", "node-name": "x" + strconv.Itoa(len(path)), "filename": path, "read-only": true})
}

func TestQEMU(t *testing.T) {
	requireNamespaces(t)
	q := startQEMU(t)
	findings, err := q.v.Outcome()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		t.Logf("finding: %s", f)
		if os.Geteuid() == 0 {
			t.Errorf("as root everything can be applied: %s", f)
		}
	}
	secret := filepath.Join(readableDir(t), "secret")
	if err := os.WriteFile(secret, make([]byte, 512), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/etc/passwd", secret, "/proc/self/exe", "/proc/1/root/etc/passwd"} {
		if e := q.addFile(path); e == "" {
			t.Errorf("QEMU opened %s", path)
		}
	}
	if e := q.addFile("/usr/share/seabios/bios-microvm.bin"); e != "" {
		t.Errorf("QEMU cannot open its firmware: %s", e)
	}
	if e := q.call("query-status", struct{}{}); e != "" {
		t.Errorf("QEMU does not answer any more: %s", e)
	}
	confinetest.Threads(t, q.pid, nil)
	confinetest.Namespaces(t, q.pid)
	checkUser(t, q.pid)
	confinetest.Files(t, q.pid, "/dev/null", "socket:", "anon_inode:[signalfd]", "/memfd:memory-backend-memfd",
		"/usr/share/seabios/", q.disk.Name(), uidLockDir+"/uids.lock")
}

// checkUser wants a uid that owns nothing, or our own if we are not root.
func checkUser(t *testing.T, pid int) {
	t.Helper()
	uid := confinetest.UID(t, pid)
	if os.Geteuid() != 0 {
		if uid != os.Geteuid() {
			t.Errorf("uid is %d, ours is %d", uid, os.Geteuid())
		}
		return
	}
	groups := confinetest.Status(t, fmt.Sprintf("/proc/%d/status", pid))["Groups"]
	if uid < int(defaultRanges[1].Base) || groups != "" {
		t.Errorf("uid %d, groups %q", uid, groups)
	}
}

// TestQEMUWithoutRoot forces what a host without namespaces gets.
func TestQEMUWithoutRoot(t *testing.T) {
	requireLandlock(t)
	q := startQEMU(t, Namespaces, PIDNamespace, PrivateRoot)
	for _, path := range []string{"/etc/passwd", "/proc/self/environ"} {
		if e := q.addFile(path); e == "" {
			t.Errorf("QEMU opened %s", path)
		}
	}
}

// TestQEMUUnreadableKernel: a file that QEMU's uid cannot read is named, and
// does not end in a message of QEMU's.
func TestQEMUUnreadableKernel(t *testing.T) {
	prereq.Root(t, "give QEMU a uid of its own")
	kernel := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(kernel, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := NewVMM(testMSB(t))
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	cmd, err := v.Launch([]string{qemuBinary(t), "-version"}, nil, []string{kernel})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Run(); err == nil {
		t.Error("QEMU was started")
	}
	if _, err := v.Outcome(); err == nil || !strings.Contains(err.Error(), "cannot read "+kernel) {
		t.Errorf("Outcome = %v", err)
	}
}

func TestAcquireUID(t *testing.T) {
	dir, r := t.TempDir(), IDRange{Base: 1000, Count: 3}
	held := map[uint32]*os.File{}
	for range r.Count {
		uid, f, err := AcquireUID(dir, r)
		if err != nil {
			t.Fatal(err)
		}
		if held[uid] != nil || uid < r.Base || uid >= r.Base+r.Count {
			t.Fatalf("got %d; held are %v", uid, held)
		}
		held[uid] = f
	}
	if _, _, err := AcquireUID(dir, r); err == nil {
		t.Fatal("a fourth uid of three")
	}
	held[1001].Close()
	uid, f, err := AcquireUID(dir, r)
	if err != nil || uid != 1001 {
		t.Errorf("after freeing 1001: %d, %v", uid, err)
	}
	f.Close()
	for _, f := range held {
		f.Close()
	}
}

func TestParseIDRange(t *testing.T) {
	tests := map[string]struct {
		text string
		want IDRange
		ok   bool
	}{
		"plain":        {"1000:5", IDRange{1000, 5}, true},
		"root":         {"0:5", IDRange{}, false},
		"empty":        {"1000:0", IDRange{}, false},
		"no count":     {"1000", IDRange{}, false},
		"past the end": {"4294967290:100", IDRange{}, false},
		"negative":     {"-1:5", IDRange{}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := ParseIDRange(tt.text)
			if got != tt.want || (err == nil) != tt.ok {
				t.Errorf("ParseIDRange(%q) = %v, %v", tt.text, got, err)
			}
		})
	}
}

// TestProgramNearRoot: the libraries of a program in a directory of the root
// are those of the system, shown once.
func TestProgramNearRoot(t *testing.T) {
	f, err := os.CreateTemp("/tmp", "msb-test-")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	defer os.Remove(f.Name())
	p, err := QEMU(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range p.Links {
		if slices.ContainsFunc(p.Binds, func(b Bind) bool { return b.target() == l.Path }) {
			t.Errorf("%s is both a link and a bind", l.Path)
		}
	}
}
