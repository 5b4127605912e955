package fuseserver

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
	"github.com/microsandbox-go/microsandbox/internal/prereq"
)

// TestReadonlyTable: every opcode that is not said to be harmless is refused,
// and what is refused changes nothing. The list is written out, so that a new
// opcode must be put into it by hand.
func TestReadonlyTable(t *testing.T) {
	allowed := map[w.Opcode]bool{
		w.OpInit: true, w.OpDestroy: true, w.OpLookup: true, w.OpForget: true, w.OpBatchForget: true,
		w.OpInterrupt: true, w.OpGetattr: true, w.OpStatx: true, w.OpAccess: true, w.OpStatfs: true,
		w.OpReadlink: true, w.OpOpen: true, w.OpRead: true, w.OpFlush: true, w.OpFsync: true,
		w.OpRelease: true, w.OpLseek: true, w.OpOpendir: true, w.OpReaddir: true, w.OpReaddirplus: true,
		w.OpReleasedir: true, w.OpFsyncdir: true, w.OpSyncfs: true, w.OpGetxattr: true, w.OpListxattr: true,
	}
	for op := range ops {
		if ops[op].run != nil && ops[op].onReadonly != allowed[w.Opcode(op)] {
			t.Errorf("opcode %d: onReadonly is %v", op, ops[op].onReadonly)
		}
	}
}

func TestReadonlyShare(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/f", []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dir+"/d", 0o755); err != nil {
			t.Fatal(err)
		}
		s := serveDir(t, dir, func(c *Config) { c.StatVirt, c.Readonly = virt, true })
		before := treeDigest(t, dir)
		e := s.mustLookup(rootID, "f")
		fh, err := s.open(e.NodeID, unix.O_RDONLY)
		s.must(err)
		if got, err := s.read(e.NodeID, fh, 0, 100); err != 0 || got != "content" {
			t.Errorf("read %q, %v", got, err)
		}
		if got := names(s.list(rootID, 4096, true)); len(got) != 2 {
			t.Errorf("list %v", got)
		}
		for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_RDONLY | unix.O_TRUNC, unix.O_RDONLY | unix.O_CREAT, unix.O_ACCMODE} {
			_, err := s.open(e.NodeID, flags)
			s.want(err, unix.EROFS, "open with %#x", flags)
		}
		_, err = s.do(w.OpAccess, e.NodeID, 0, pack(w.AccessIn{Mask: unix.W_OK}, w.Append))
		s.want(err, unix.EROFS, "access for writing")
		_, err = s.setattr(e.NodeID, w.SetattrIn{Valid: w.FattrAtime | w.FattrAtimeNow})
		s.want(err, unix.EROFS, "touch")
		_, err = s.setattr(e.NodeID, w.SetattrIn{})
		s.want(err, unix.EROFS, "a setattr of nothing")
		_, err = s.writeWith(e.NodeID, w.WriteIn{Fh: fh}, "x")
		s.want(err, unix.EROFS, "write")
		_, _, err = s.create(rootID, "f", unix.O_RDONLY, 0o600)
		s.want(err, unix.EROFS, "create over a file")
		s.want(s.unlink(rootID, "f"), unix.EROFS, "unlink")
		s.want(s.rename(rootID, "f", rootID, "g", 0), unix.EROFS, "rename")
		s.want(s.setxattr(e.NodeID, "user.x", "1", 0), unix.EROFS, "setxattr")
		_, err = s.do(w.OpFsync, e.NodeID, 0, pack(w.FsyncIn{Fh: fh}, w.Append))
		s.must(err)
		if after := treeDigest(t, dir); after != before {
			t.Errorf("the tree changed:\n%s\n%s", before, after)
		}
	})
}

// treeDigest says all about a tree but its access times.
func treeDigest(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %o %d:%d %d %d %v %v", path, st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Mtim, st.Ctim)
		if fi.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", data)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestBudget: out of descriptors the guest gets ENFILE, listings still show
// every name, open files work on, and FORGET makes room.
func TestBudget(t *testing.T) {
	const budget = 40
	s := newShare(t, func(c *Config) { c.FDBudget = budget })
	fill(t, s.dir, 200)
	plus := s.list(rootID, 4096, true)
	if len(plus) != 200 {
		t.Fatalf("%d names listed", len(plus))
	}
	var nodes []uint64
	for _, d := range plus {
		if d.node != 0 {
			nodes = append(nodes, d.node)
		}
	}
	if len(nodes) == 0 || len(nodes) >= budget {
		t.Errorf("%d nodes for a budget of %d", len(nodes), budget)
	}
	// The listing's own handle has made room for one more.
	var spare string
	var err errno
	for _, d := range plus {
		if d.node == 0 && err == 0 {
			spare = d.name
			_, err = s.lookup(rootID, spare)
		}
	}
	s.want(err, unix.ENFILE, "lookup")
	_, err = s.mkdir(rootID, "d", 0o700)
	s.want(err, unix.ENFILE, "mkdir")
	_, err = s.symlink(rootID, "l", "x")
	s.want(err, unix.ENFILE, "symlink")
	_, _, err = s.create(rootID, "new", unix.O_RDWR, 0o600)
	s.want(err, unix.ENFILE, "create")
	for _, name := range []string{"d", "l", "new"} {
		if _, err := os.Lstat(s.host(name)); err == nil {
			t.Errorf("%s was made all the same", name)
		}
	}
	var fhs []uint64
	for {
		fh, err := s.open(nodes[0], unix.O_RDONLY)
		if err == unix.ENFILE {
			break
		}
		s.must(err)
		fhs = append(fhs, fh)
	}
	if len(fhs) == 0 {
		t.Error("no descriptor was left for a handle")
	}
	if n := s.srv.fds.Load(); n > budget {
		t.Errorf("%d descriptors for a budget of %d", n, budget)
	}
	for _, n := range nodes[1:] {
		s.forget(n, 1)
	}
	s.mustLookup(rootID, spare)
}

// TestManyGuests hammers one share from several queues that look up, open,
// forget and remove the same names; run it with -race.
func TestManyGuests(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		var queues sync.WaitGroup
		for q := range 4 {
			queues.Go(func() {
				c := newClient(t, s.srv)
				for i := range 300 {
					name := fmt.Sprint((i + q) % 5)
					e, fh, err := c.create(rootID, name, unix.O_RDWR, 0o600)
					if err == 0 {
						c.write(e.NodeID, fh, 0, name)
						c.chmod(e.NodeID, 0o640)
						if a, err := c.getattr(e.NodeID); err == 0 && a.Mode&unix.S_IFMT != unix.S_IFREG {
							t.Errorf("mode %o", a.Mode)
						}
						c.release(e.NodeID, fh)
						c.forget(e.NodeID, 1)
					}
					if e, err := c.lookup(rootID, name); err == 0 {
						c.getattr(e.NodeID)
						c.forget(e.NodeID, 1)
						c.getattr(e.NodeID)   // perhaps forgotten
						c.forget(e.NodeID, 1) // too much
					}
					c.unlink(rootID, name)
				}
			})
		}
		queues.Wait()
		for _, d := range s.list(rootID, 4096, false) {
			t.Errorf("%s is left", d.name)
		}
	})
}

// TestReconnect: INIT in the midst of everything starts afresh and loses no
// descriptor.
func TestReconnect(t *testing.T) {
	s := newShare(t, nil)
	fill(t, s.dir, 50)
	var queues sync.WaitGroup
	for range 3 {
		queues.Go(func() {
			c := newClient(t, s.srv)
			for range 100 {
				fh, err := c.opendir(rootID)
				if err == 0 {
					c.page(rootID, fh, 0, 4096, true)
				}
				if e, err := c.lookup(rootID, "entry-000001"); err == 0 {
					c.open(e.NodeID, unix.O_RDONLY)
				}
			}
		})
	}
	for range 30 {
		s.init()
	}
	queues.Wait()
	s.init()
	if n := s.srv.fds.Load(); n != 1 {
		t.Errorf("%d descriptors after a new session, want the root's", n)
	}
}

// TestSubmounts: another mount in the share has inodes of its own, even where
// it shows the same directory, and is announced.
func TestSubmounts(t *testing.T) {
	prereq.Root(t, "mount")
	s := newShare(t, nil)
	for _, d := range []string{"a", "b"} {
		if err := os.Mkdir(s.host(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(s.host("a"), s.host("b"), "", unix.MS_BIND, ""); err != nil {
		prereq.Missing(t, "a bind mount: %v", err)
	}
	defer unix.Unmount(s.host("b"), unix.MNT_DETACH)
	a, b := s.mustLookup(rootID, "a"), s.mustLookup(rootID, "b")
	if a.NodeID == b.NodeID || a.Attr.Ino != b.Attr.Ino {
		t.Errorf("nodes %d and %d, inodes %d and %d", a.NodeID, b.NodeID, a.Attr.Ino, b.Attr.Ino)
	}
	if a.Attr.Flags != 0 || b.Attr.Flags != w.AttrSubmount {
		t.Errorf("flags %d and %d", a.Attr.Flags, b.Attr.Flags)
	}
	for _, d := range s.list(rootID, 4096, true) {
		if want := map[string]uint64{"a": a.NodeID, "b": b.NodeID}[d.name]; d.node != want {
			t.Errorf("%s listed as node %d, want %d", d.name, d.node, want)
		}
	}
}

func TestStatx(t *testing.T) {
	s := newShare(t, nil)
	e, _ := s.mustCreate(rootID, "f", 0o640)
	s.must(s.chown(e.NodeID, 3, 4))
	b, err := s.do(w.OpStatx, e.NodeID, w.StatxOutSize, pack(w.StatxIn{SxMask: unix.STATX_BTIME}, w.Append))
	s.must(err)
	var out w.StatxOut
	w.Decode(b, &out)
	st := out.Stat
	if st.UID != 3 || st.GID != 4 || st.Mode != unix.S_IFREG|0o640 || st.Ino != e.Attr.Ino || st.Mask&unix.STATX_BASIC_STATS != unix.STATX_BASIC_STATS {
		t.Errorf("statx: %+v", st)
	}
	if st.Mask&unix.STATX_BTIME != 0 && st.Btime.Sec == 0 {
		t.Errorf("no time of birth: %+v", st.Btime)
	}
}

func TestStatfs(t *testing.T) {
	s := newShare(t, nil)
	b, err := s.do(w.OpStatfs, rootID, w.Size[w.StatfsOut]())
	s.must(err)
	var out w.StatfsOut
	w.Decode(b, &out)
	if out.Blocks == 0 || out.Bsize == 0 || out.Namelen != 255 {
		t.Errorf("statfs: %+v", out)
	}
}

func TestConfigIsJudged(t *testing.T) {
	for what, change := range map[string]func(*Config){
		"stat virtualization": func(c *Config) { c.StatVirt = "Strict" },
		"host permissions":    func(c *Config) { c.HostPerms = "public" },
		"cache":               func(c *Config) { c.Cache = "never" },
		"budget":              func(c *Config) { c.FDBudget = 3 },
	} {
		cfg := Config{Root: openDir(t, t.TempDir()), ProcSelfFd: openDir(t, "/proc/self/fd")}
		change(&cfg)
		if _, err := New(cfg); !errdefs.Is(err, errdefs.InvalidConfig) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := New(Config{Root: -1, ProcSelfFd: -1}); err == nil {
		t.Error("no descriptors were accepted")
	}
	f, err := os.Create(t.TempDir() + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := New(Config{Root: int(f.Fd()), ProcSelfFd: openDir(t, "/proc/self/fd")}); err == nil {
		t.Error("a file was accepted as a share")
	}
}

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	root := openDir(t, dir)
	for _, virt := range []string{"", "strict", "relaxed", "off"} {
		if err := Probe(root, virt, false); err != nil {
			t.Errorf("%q: %v", virt, err)
		}
	}
	if err := Probe(root, "x", false); !errdefs.Is(err, errdefs.InvalidConfig) {
		t.Errorf("unknown: %v", err)
	}
	before := treeDigest(t, dir)
	if err := Probe(root, "strict", true); err != nil {
		t.Errorf("read-only: %v", err)
	}
	if after := treeDigest(t, dir); after != before {
		t.Error("probing a read-only share wrote")
	}
	proc := openDir(t, "/proc/self") // a file system without user attributes
	for _, readonly := range []bool{false, true} {
		err := Probe(proc, "strict", readonly)
		var e *errdefs.Error
		if err == nil || !asError(err, &e) || e.Hint == "" {
			t.Errorf("proc, readonly=%v: %v", readonly, err)
		}
	}
}

func asError(err error, e **errdefs.Error) bool {
	*e, _ = err.(*errdefs.Error)
	return *e != nil
}

// TestAsOrdinaryUser runs the package's tests in a process of uid 65534.
func TestAsOrdinaryUser(t *testing.T) {
	prereq.Root(t, "become an ordinary user")
	dir, err := os.MkdirTemp("/tmp", "fuseserver-user")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/test", exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/test", "-test.short", "-test.count=1")
	cmd.Dir = dir
	cmd.Env = []string{"TMPDIR=" + dir, "HOME=" + dir, "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
