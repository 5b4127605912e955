package guest

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

const (
	testPasswd = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001:Ann:/home/ann:/bin/sh\nbroken line\nbad:x:abc:1::/:\n4711:x:5:6::/five:\n"
	testGroup  = "root:x:0:\nann:x:1001:\nteam:x:2000:bob,ann\nannex:x:3000:annabel\n"
)

func TestResolveUser(t *testing.T) {
	tests := map[string]struct {
		want account
		ok   bool
	}{
		"":           {account{0, 0, nil, "/root", "root"}, true},
		"0":          {account{0, 0, nil, "/root", "root"}, true},
		"ann":        {account{1000, 1001, []uint32{2000}, "/home/ann", "ann"}, true},
		"1000":       {account{1000, 1001, []uint32{2000}, "/home/ann", "ann"}, true},
		"ann:":       {account{1000, 1001, []uint32{2000}, "/home/ann", "ann"}, true},
		"ann:team":   {account{1000, 2000, nil, "/home/ann", "ann"}, true},
		"ann:77":     {account{1000, 77, nil, "/home/ann", "ann"}, true},
		"77":         {account{77, 0, nil, "/", ""}, true},
		"77:88":      {account{77, 88, nil, "/", ""}, true},
		":team":      {account{0, 2000, nil, "/root", "root"}, true},
		"4711":       {account{5, 6, nil, "/five", "4711"}, true}, // a name that is a number
		"bob":        {ok: false},
		"ann:nobody": {ok: false},
		"bad":        {ok: false},
		"-1":         {ok: false},
		"4294967295": {ok: false}, // means "unchanged" to setuid
		"4294967296": {ok: false},
	}
	for spec, tt := range tests {
		got, err := resolveUser(spec, testPasswd, testGroup)
		if (err == nil) != tt.ok || err == nil && !reflect.DeepEqual(got, tt.want) {
			t.Errorf("resolveUser(%q) = %+v, %v; want %+v", spec, got, err, tt.want)
		}
	}
}

// FuzzResolveUser: programs in the sandbox own both files.
func FuzzResolveUser(f *testing.F) {
	f.Add("ann:team", testPasswd, testGroup)
	f.Fuzz(func(t *testing.T, spec, passwd, group string) {
		if a, err := resolveUser(spec, passwd, group); err == nil && (a.uid == 1<<32-1 || a.gid == 1<<32-1) {
			t.Fatalf("%q resolves to -1", spec)
		}
	})
}

func TestMergeEnv(t *testing.T) {
	ann := account{uid: 1000, name: "ann", home: "/home/ann"}
	env := mergeEnv([]string{"A=1", "HOME=/image", "PATH=/p", "junk", "=x"}, []string{"A=2", "B="}, ann, false)
	want := []string{"PATH=/p", "HOME=/home/ann", "A=2", "B="}
	if !slices.Equal(env, want) {
		t.Errorf("%q, want %q", env, want)
	}
	env = mergeEnv(nil, []string{"HOME=/mine"}, account{}, true)
	if want := []string{"PATH=" + defaultPath, "HOME=/mine", "TERM=xterm"}; !slices.Equal(env, want) {
		t.Errorf("%q, want %q", env, want)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"one/tool": 0o644, "two/tool": 0o755, "one/plain": 0o644, "work/rel": 0o755} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	path, work := dir+"/one:"+dir+"/two", dir+"/work"
	tests := map[string]struct{ cmd, path, want, kind string }{
		"later directory":   {"tool", path, dir + "/two/tool", ""},
		"not executable":    {"plain", path, "", kindPermission},
		"nowhere":           {"none", path, "", kindNotFound},
		"empty PATH":        {"rel", "", work + "/rel", ""},
		"absolute":          {dir + "/two/tool", "", dir + "/two/tool", ""},
		"relative to cwd":   {"./rel", path, work + "/rel", ""},
		"directory":         {dir + "/one", "", "", kindPermission},
		"missing absolute":  {dir + "/none", "", "", kindNotFound},
		"through a file":    {dir + "/one/tool/x", "", "", kindNotFound},
		"name with a slash": {"one/tool", path, "", kindNotFound},
	}
	for name, tt := range tests {
		got, err := lookPath(tt.cmd, work, tt.path)
		var xe *execError
		errors.As(err, &xe)
		if got != tt.want || (tt.kind == "") != (err == nil) || xe != nil && xe.kind != tt.kind {
			t.Errorf("%s: %q, %v; want %q %s", name, got, err, tt.want, tt.kind)
		}
	}
}

func TestExecFailedNamesTheErrno(t *testing.T) {
	f := (&execError{kindPermission, "no", &os.PathError{Op: "exec", Path: "/x", Err: unix.EACCES}}).failed()
	if f.Errno == nil || *f.Errno != int32(unix.EACCES) || *f.ErrnoName != "EACCES" {
		t.Errorf("%+v", f)
	}
	if f := (&execError{kindPty, "no", nil}).failed(); f.Errno != nil {
		t.Errorf("%+v", f)
	}
}

// superblock returns the beginning of a disk with bytes at an offset.
func superblock(parts map[int]string) []byte {
	b := make([]byte, probeSize)
	for off, s := range parts {
		copy(b[off:], s)
	}
	return b
}

func ext(compat, incompat, ro uint32) []byte {
	b := superblock(map[int]string{1024 + 56: "\x53\xef"})
	for i, v := range []uint32{compat, incompat, ro} {
		binary.LittleEndian.PutUint32(b[1024+0x5c+4*i:], v)
	}
	return b
}

func TestSuperblockType(t *testing.T) {
	fat := superblock(map[int]string{11: "\x00\x02\x04", 82: "FAT32   ", 510: "\x55\xaa"})
	tests := map[string]struct {
		b    []byte
		want string
	}{
		"ext4":          {ext(0x3c, 0x2c2, 0x46b), "ext4"},
		"ext3":          {ext(0x4, 0x2, 0x1), "ext3"},
		"ext2":          {ext(0, 0x2, 0x1), "ext2"},
		"xfs":           {superblock(map[int]string{0: "XFSB"}), "xfs"},
		"btrfs":         {superblock(map[int]string{0x10040: "_BHRfS_M"}), "btrfs"},
		"squashfs":      {superblock(map[int]string{0: "hsqs"}), "squashfs"},
		"erofs":         {superblock(map[int]string{1024: "\xe2\xe1\xf5\xe0"}), "erofs"},
		"iso9660":       {superblock(map[int]string{0x8001: "CD001"}), "iso9660"},
		"vfat":          {fat, "vfat"},
		"boot sector":   {superblock(map[int]string{510: "\x55\xaa"}), ""},
		"zeros":         {make([]byte, probeSize), ""},
		"short":         {fat[:100], ""},
		"cut at the sb": {ext(0, 0, 0)[:1024+58], ""},
		"empty":         {nil, ""},
	}
	for name, tt := range tests {
		if got := superblockType(tt.b); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// FuzzSuperblockType: a disk may hold anything.
func FuzzSuperblockType(f *testing.F) {
	f.Add(ext(0x3c, 0x2c2, 0x46b))
	f.Add([]byte("XFSB"))
	f.Fuzz(func(_ *testing.T, b []byte) { superblockType(b) })
}

func TestBlockTypes(t *testing.T) {
	got := blockTypes("nodev\tsysfs\n\text4\n\tvfat\nnodev\tproc\n")
	if !slices.Equal(got, []string{"ext4", "vfat"}) {
		t.Errorf("%q", got)
	}
}

func TestReadSmallNeverBlocks(t *testing.T) {
	dir := t.TempDir()
	fifo, big := filepath.Join(dir, "fifo"), filepath.Join(dir, "big")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big, make([]byte, 1<<20+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{fifo, big, dir, "/dev/zero"} {
		if _, err := readSmall(p); err == nil {
			t.Errorf("%s was read", p)
		}
	}
}

func TestOpenFileRefusesWhatCouldBlock(t *testing.T) {
	dir := t.TempDir()
	fifo, link := filepath.Join(dir, "fifo"), filepath.Join(dir, "link")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fifo, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{fifo, link, "/dev/zero", dir} {
		for _, o := range []agentproto.FSOpenOptions{{Read: true}, {Write: true, Create: true}, {Read: true, Write: true}} {
			if f, err := openFile(p, o); err == nil {
				f.Close()
				t.Errorf("%s opened with %+v", p, o)
			}
		}
	}
	if _, err := openFile(filepath.Join(dir, "x"), agentproto.FSOpenOptions{Create: true}); err != unix.EINVAL {
		t.Errorf("neither read nor write: %v", err)
	}
	f, err := openFile(filepath.Join(dir, "x"), agentproto.FSOpenOptions{Write: true, CreateNew: true})
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := openFile(filepath.Join(dir, "x"), agentproto.FSOpenOptions{Write: true, CreateNew: true}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("create_new of an existing file: %v", err)
	}
}

func TestFileOperations(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := os.WriteFile(a, []byte("text"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := copyFile(a, b); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(b); string(got) != "text" {
		t.Errorf("copy has %q", got)
	}
	if err := os.Link(a, filepath.Join(dir, "same")); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{a, filepath.Join(dir, "same")} {
		if err := copyFile(a, dst); !errors.Is(err, unix.EINVAL) {
			t.Errorf("copy onto itself: %v", err)
		}
	}
	if got, _ := os.ReadFile(a); string(got) != "text" {
		t.Errorf("after copying onto itself: %q", got)
	}
	mode, mtime := uint32(0o4755), int64(1_000_000_000)
	if err := setStat(a, true, agentproto.FSAttrs{Mode: &mode, Mtime: &mtime}); err != nil {
		t.Fatal(err)
	}
	d, err := statPath(a, true)
	if err != nil || d.Stat.Mode != mode || *d.Stat.Mtime != mtime || d.Stat.Kind != agentproto.KindFile {
		t.Errorf("%+v, %v", d, err)
	}
	if err := removeDir(a, true); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("removeDir of a file: %v", err)
	}
	if err := mkdir(filepath.Join(dir, "x/y/z"), nil); err != nil {
		t.Error(err)
	}
	if err := mkdir(filepath.Join(dir, "x"), &mode); !errors.Is(err, unix.EEXIST) {
		t.Errorf("mkdir with a mode: %v", err)
	}
}

// TestMustAttend: the states of threads as the kernel tells them.
func TestMustAttend(t *testing.T) {
	status := func(state, own, shared, blocked string) string {
		return "Name:\tx\nState:\t" + state + "\nSigPnd:\t" + own + "\nShdPnd:\t" + shared + "\nSigBlk:\t" + blocked + "\nSigIgn:\t0000000000000000\n"
	}
	const none, kill, term = "0000000000000000", "0000000000000100", "0000000000004000"
	tests := map[string]struct {
		status string
		first  bool
		want   bool
	}{
		"killed":                          {status("D (disk sleep)", kill, none, none), false, true},
		"told to end":                     {status("D (disk sleep)", none, term, none), true, true},
		"told to end, another thread":     {status("D (disk sleep)", none, term, none), false, false},
		"blocked":                         {status("D (disk sleep)", term, term, term), true, false},
		"nothing pending":                 {status("D (disk sleep)", none, none, none), true, false},
		"sleeps as others do":             {status("S (sleeping)", kill, none, none), true, false},
		"a name that looks like a state":  {"Name:\tState: D\n", true, false},
		"nothing":                         {"", true, false},
		"numbers too large to be signals": {status("D (disk sleep)", "fffffffffffffffff0", none, none), true, true},
	}
	for name, tt := range tests {
		if got := mustAttend(tt.status, tt.first); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if got := signalled("/proc"); slices.Contains(got, "1") {
		t.Errorf("threads that must attend to a signal: %v", got)
	}
}
