package fuseserver

import (
	"encoding/binary"
	"math"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// message is a request with a header that may lie.
func message(op w.Opcode, node uint64, body []byte, change func(*w.InHeader)) []byte {
	h := w.InHeader{Opcode: op, Unique: 77, NodeID: node, Len: uint32(headerSize + len(body))}
	if change != nil {
		change(&h)
	}
	return append(w.Append(nil, &h), body...)
}

// replied sends one message and returns the used length and the error told.
func (s *share) replied(msg []byte, room int) (used int, err errno) {
	out := make([]byte, room)
	used = s.raw([][]byte{msg}, [][]byte{out})
	if used >= replySize {
		err = errno(-int32(binary.LittleEndian.Uint32(out[4:])))
	}
	return used, err
}

func TestHeaderIsJudged(t *testing.T) {
	s := newShare(t, nil)
	getattr := pack(w.GetattrIn{}, w.Append)
	tests := map[string]struct {
		msg  []byte
		room int
		used int
		err  errno
	}{
		"well formed":               {message(w.OpGetattr, 1, getattr, nil), 200, replySize + w.AttrOutSize, 0},
		"nothing at all":            {nil, 200, 0, 0},
		"39 bytes":                  {message(w.OpGetattr, 1, nil, nil)[:39], 200, 0, 0},
		"no writable part":          {message(w.OpGetattr, 1, getattr, nil), 0, 0, 0},
		"15 writable bytes":         {message(w.OpGetattr, 1, getattr, nil), 15, 0, 0},
		"room for an error only":    {message(w.OpGetattr, 1, getattr, nil), 16, 16, unix.EINVAL},
		"room short by one":         {message(w.OpGetattr, 1, getattr, nil), 16 + w.AttrOutSize - 1, 16, unix.EINVAL},
		"len beyond the bytes":      {message(w.OpGetattr, 1, getattr, func(h *w.InHeader) { h.Len++ }), 200, 16, unix.EINVAL},
		"len 0xffffffff":            {message(w.OpGetattr, 1, getattr, func(h *w.InHeader) { h.Len = math.MaxUint32 }), 200, 16, unix.EINVAL},
		"len below the header":      {message(w.OpGetattr, 1, getattr, func(h *w.InHeader) { h.Len = 39 }), 200, 16, unix.EINVAL},
		"len cuts the arguments":    {message(w.OpGetattr, 1, getattr, func(h *w.InHeader) { h.Len = 48 }), 200, 16, unix.EINVAL},
		"trailing garbage":          {append(message(w.OpGetattr, 1, getattr, nil), "garbage"...), 200, replySize + w.AttrOutSize, 0},
		"extension":                 {message(w.OpGetattr, 1, getattr, func(h *w.InHeader) { h.TotalExtlen = 1 }), 200, 16, unix.EINVAL},
		"opcode 0":                  {message(0, 1, getattr, nil), 200, 16, unix.ENOSYS},
		"opcode without a row":      {message(w.OpSetupmapping, 1, make([]byte, 64), nil), 200, 16, unix.ENOSYS},
		"ioctl":                     {message(w.OpIoctl, 1, make([]byte, 64), nil), 200, 16, unix.ENOSYS},
		"poll":                      {message(w.OpPoll, 1, make([]byte, 64), nil), 200, 16, unix.ENOSYS},
		"lock, short":               {message(w.OpSetlkw, 1, make([]byte, 47), nil), 200, 16, unix.EINVAL},
		"lock of nothing":           {message(w.OpSetlkw, 1, make([]byte, 48), nil), 200, 16, unix.EBADF},
		"first unknown opcode":      {message(w.OpCount, 1, getattr, nil), 200, 16, unix.ENOSYS},
		"largest opcode":            {message(math.MaxUint32, 1, getattr, nil), 200, 16, unix.ENOSYS},
		"unknown node":              {message(w.OpGetattr, 99, getattr, nil), 200, 16, unix.ESTALE},
		"node 0":                    {message(w.OpGetattr, 0, getattr, nil), 200, 16, unix.ESTALE},
		"largest node":              {message(w.OpGetattr, math.MaxUint64, getattr, nil), 200, 16, unix.ESTALE},
		"forget gets no reply":      {message(w.OpForget, 99, pack(w.ForgetIn{Nlookup: 1}, w.Append), nil), 200, 0, 0},
		"short forget":              {message(w.OpForget, 1, nil, nil), 200, 0, 0},
		"batch forget, lying count": {message(w.OpBatchForget, 1, pack(w.BatchForgetIn{Count: math.MaxUint32}, w.Append), nil), 200, 0, 0},
		"longer than any request":   {message(w.OpLookup, 1, make([]byte, 80<<10), nil), 200, 16, unix.EINVAL},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			used, err := s.replied(tt.msg, tt.room)
			if used != tt.used || err != tt.err {
				t.Errorf("used %d, %v; want %d, %v", used, err, tt.used, tt.err)
			}
		})
	}
}

// TestHeaderInPieces: a header and its arguments may lie in memory in any way.
func TestHeaderInPieces(t *testing.T) {
	s := newShare(t, nil)
	msg := message(w.OpLookup, 1, z("missing"), nil)
	for _, cut := range []int{1, 7, 39, 40, 41, len(msg) - 1} {
		out := [][]byte{make([]byte, 1), nil, make([]byte, 14), make([]byte, 300)}
		if used := s.raw([][]byte{msg[:cut], nil, msg[cut:]}, out); used != replySize {
			t.Errorf("cut at %d: used %d", cut, used)
		}
		if got := errno(-int32(binary.LittleEndian.Uint32(out[2][3:]))); got != unix.ENOENT {
			t.Errorf("cut at %d: %v", cut, got)
		}
	}
}

// TestBeforeInit: nothing is served before INIT and after DESTROY.
func TestBeforeInit(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	if _, err := s.do(w.OpDestroy, 0, 0); err != 0 {
		t.Fatal(err)
	}
	for op := range ops {
		if ops[op].run == nil || op == int(w.OpInit) || op == int(w.OpDestroy) {
			continue
		}
		msg := message(w.Opcode(op), 1, make([]byte, 200), nil)
		if used, err := s.replied(msg, 4096); used != 0 && err != unix.EIO {
			t.Errorf("opcode %d: used %d, %v", op, used, err)
		}
	}
	if n := s.srv.fds.Load(); n != 0 {
		t.Errorf("%d descriptors held without a session", n)
	}
	s.init()
	if _, err := s.getattr(e.NodeID); err != unix.ESTALE {
		t.Errorf("node of the old session: %v", err)
	}
	if _, err := s.read(e.NodeID, fh, 0, 1); err != unix.EBADF {
		t.Errorf("handle of the old session: %v", err)
	}
	if again := s.mustLookup(rootID, "f"); again.NodeID == e.NodeID {
		t.Error("a node id was used twice")
	}
}

func TestInitNegotiation(t *testing.T) {
	s := newShare(t, nil)
	send := func(in w.InitIn, size int) (w.InitOut, errno) {
		b, err := s.do(w.OpInit, 0, w.InitOutSize, pack(in, w.Append)[:size])
		var out w.InitOut
		w.Decode(b, &out)
		return out, err
	}
	all := w.InitIn{Major: 7, Minor: 45, MaxReadahead: 1 << 20, Flags: math.MaxUint32, Flags2: math.MaxUint32}
	out, err := send(all, 64)
	s.must(err)
	got := w.InitFlags(out.Flags) | w.InitFlags(out.Flags2)<<32
	if want := granted | s.srv.cacheFlags() | w.InitPosixLocks | w.InitFlockLocks; got != want || out.Minor != w.Minor {
		t.Errorf("granted %#x, want %#x; minor %d", got, want, out.Minor)
	}
	if got&(w.InitWritebackCache|w.InitPosixACL|w.InitExportSupport) != 0 {
		t.Errorf("granted too much: %#x", got)
	}
	if out.MaxWrite != 1<<20 || out.MaxPages != 256 || out.TimeGran != 1 {
		t.Errorf("limits: %+v", out)
	}
	out, err = send(w.InitIn{Major: 7, Minor: 31}, 16)
	s.must(err)
	if out.Flags != 0 || out.Minor != 31 {
		t.Errorf("a guest that offers nothing got %+v", out)
	}
	if out, err = send(w.InitIn{Major: 8}, 64); err != 0 || out.Major != 7 || out.MaxWrite != 0 {
		t.Errorf("major 8: %+v, %v", out, err)
	}
	for _, old := range []w.InitIn{{Major: 6, Minor: 99}, {Major: 7, Minor: 30}, {}} {
		if _, err := send(old, 64); err != unix.EPROTO {
			t.Errorf("version %d.%d: %v", old.Major, old.Minor, err)
		}
	}
}

// badNames are never taken, by any operation, in any position.
var badNames = map[string]struct {
	bytes string
	err   errno
}{
	"empty":        {"\x00", unix.EINVAL},
	"no NUL":       {"abc", unix.EINVAL},
	"dot":          {".\x00", unix.EINVAL},
	"dot dot":      {"..\x00", unix.EINVAL},
	"parent":       {"../canary\x00", unix.EINVAL},
	"absolute":     {"/etc\x00", unix.EINVAL},
	"two parts":    {"d/f\x00", unix.EINVAL},
	"slash at end": {"d/\x00", unix.EINVAL},
	"256 bytes":    {strings.Repeat("n", 256) + "\x00", unix.ENAMETOOLONG},
	"no bytes":     {"", unix.EINVAL},
}

func TestNamesAreJudged(t *testing.T) {
	outer := t.TempDir()
	if err := os.MkdirAll(outer+"/share/d", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(outer+"/canary", []byte("alive"), 0o666); err != nil {
		t.Fatal(err)
	}
	s := serveDir(t, outer+"/share", nil)
	file, _ := s.mustCreate(rootID, "f", 0o600)
	entry := w.EntryOutSize
	requests := map[string]func(name []byte) (w.Opcode, int, [][]byte){
		"mknod": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpMknod, entry, [][]byte{pack(w.MknodIn{Mode: unix.S_IFREG | 0o600}, w.Append), n}
		},
		"mkdir": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpMkdir, entry, [][]byte{pack(w.MkdirIn{}, w.Append), n}
		},
		"create": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpCreate, entry + 16, [][]byte{pack(w.CreateIn{}, w.Append), n}
		},
		"symlink": func(n []byte) (w.Opcode, int, [][]byte) { return w.OpSymlink, entry, [][]byte{n, z("target")} },
		"link": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpLink, entry, [][]byte{pack(w.LinkIn{OldNodeID: file.NodeID}, w.Append), n}
		},
		"unlink": func(n []byte) (w.Opcode, int, [][]byte) { return w.OpUnlink, 0, [][]byte{n} },
		"rmdir":  func(n []byte) (w.Opcode, int, [][]byte) { return w.OpRmdir, 0, [][]byte{n} },
		"rename": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpRename, 0, [][]byte{pack(w.RenameIn{NewDir: 1}, w.Append), n, z("to")}
		},
		"renameTo": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpRename, 0, [][]byte{pack(w.RenameIn{NewDir: 1}, w.Append), z("f"), n}
		},
		"rename2": func(n []byte) (w.Opcode, int, [][]byte) {
			return w.OpRename2, 0, [][]byte{pack(w.Rename2In{NewDir: 1}, w.Append), z("f"), n}
		},
		"lookup": func(n []byte) (w.Opcode, int, [][]byte) { return w.OpLookup, entry, [][]byte{n} },
	}
	for op, req := range requests {
		for what, bad := range badNames {
			if op == "lookup" && (what == "dot" || what == "dot dot") {
				continue
			}
			code, room, parts := req([]byte(bad.bytes))
			if op == "symlink" && what == "no NUL" || op == "rename" && what == "no NUL" || what == "no bytes" {
				parts = parts[:len(parts)-1]
			}
			_, err := s.do(code, rootID, room, parts...)
			if err != bad.err && err != unix.EINVAL {
				t.Errorf("%s, name %s: %v, want %v", op, what, err, bad.err)
			}
		}
	}
	s.want(s.unlink(rootID, "f"), 0, "the share still works")
	if b, err := os.ReadFile(outer + "/canary"); err != nil || string(b) != "alive" {
		t.Errorf("canary: %q, %v", b, err)
	}
	ents, _ := os.ReadDir(outer)
	if len(ents) != 2 {
		t.Errorf("outside the share: %v", ents)
	}
}

// TestDotNames: LOOKUP alone takes "." and "..", and asks the host for neither.
func TestDotNames(t *testing.T) {
	s := newShare(t, nil)
	d, err := s.mkdir(rootID, "d", 0o755)
	s.must(err)
	if e := s.mustLookup(d.NodeID, "."); e.NodeID != d.NodeID {
		t.Errorf("d/. is node %d", e.NodeID)
	}
	if e := s.mustLookup(rootID, ".."); e.NodeID != rootID {
		t.Errorf("/.. is node %d", e.NodeID)
	}
	if _, err := s.lookup(d.NodeID, ".."); err != unix.EINVAL {
		t.Errorf("d/..: %v", err)
	}
}

func TestTargetsAreJudged(t *testing.T) {
	s := newShare(t, nil)
	for what, tt := range map[string]struct {
		parts [][]byte
		err   errno
	}{
		"no target":     {[][]byte{z("l")}, unix.EINVAL},
		"empty":         {[][]byte{z("l"), z("")}, unix.ENOENT},
		"no NUL":        {[][]byte{z("l"), []byte("t")}, unix.EINVAL},
		"4096 bytes":    {[][]byte{z("l"), z(strings.Repeat("t", 4096))}, unix.ENAMETOOLONG},
		"4095 bytes":    {[][]byte{z("long"), z(strings.Repeat("t", 4095))}, 0},
		"second no NUL": {[][]byte{z("l"), []byte(strings.Repeat("t", 5000))}, unix.EINVAL},
	} {
		_, err := s.do(w.OpSymlink, rootID, w.EntryOutSize, tt.parts...)
		s.want(err, tt.err, "%s", what)
	}
}

func TestRangesAreJudged(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	dir, err := s.opendir(rootID)
	s.must(err)
	const top = math.MaxInt64
	for what, tt := range map[string]struct {
		op   w.Opcode
		node uint64
		room int
		in   []byte
		err  errno
	}{
		"read beyond MaxInt64":      {w.OpRead, e.NodeID, 8, pack(w.ReadIn{Fh: fh, Offset: 1 << 63, Size: 1}, w.Append), unix.EINVAL},
		"read, sum overflows":       {w.OpRead, e.NodeID, 8, pack(w.ReadIn{Fh: fh, Offset: top, Size: 8}, w.Append), unix.EINVAL},
		"read more than the buffer": {w.OpRead, e.NodeID, 8, pack(w.ReadIn{Fh: fh, Size: 9}, w.Append), unix.EINVAL},
		"read 4 GiB":                {w.OpRead, e.NodeID, 8, pack(w.ReadIn{Fh: fh, Size: math.MaxUint32}, w.Append), unix.EINVAL},
		"read a directory handle":   {w.OpRead, rootID, 8, pack(w.ReadIn{Fh: dir, Size: 8}, w.Append), unix.EBADF},
		"read with another node":    {w.OpRead, rootID, 8, pack(w.ReadIn{Fh: fh, Size: 8}, w.Append), unix.EBADF},
		"read with no handle":       {w.OpRead, e.NodeID, 8, pack(w.ReadIn{Fh: 12345, Size: 8}, w.Append), unix.EBADF},
		"list a file handle":        {w.OpReaddir, e.NodeID, 8, pack(w.ReadIn{Fh: fh, Size: 8}, w.Append), unix.EBADF},
		"list beyond MaxInt64":      {w.OpReaddir, rootID, 800, pack(w.ReadIn{Fh: dir, Offset: 1 << 63, Size: 800}, w.Append), unix.EINVAL},
		"list into 10 bytes":        {w.OpReaddir, rootID, 10, pack(w.ReadIn{Fh: dir, Size: 10}, w.Append), unix.EINVAL},
		"write, size too large":     {w.OpWrite, e.NodeID, 8, append(pack(w.WriteIn{Fh: fh, Size: 5}, w.Append), "data"...), unix.EINVAL},
		"write, size too small":     {w.OpWrite, e.NodeID, 8, append(pack(w.WriteIn{Fh: fh, Size: 3}, w.Append), "data"...), unix.EINVAL},
		"write 4 GiB":               {w.OpWrite, e.NodeID, 8, append(pack(w.WriteIn{Fh: fh, Size: math.MaxUint32}, w.Append), "data"...), unix.EINVAL},
		"write beyond MaxInt64":     {w.OpWrite, e.NodeID, 8, append(pack(w.WriteIn{Fh: fh, Offset: 1 << 63, Size: 4}, w.Append), "data"...), unix.EINVAL},
		"write, sum overflows":      {w.OpWrite, e.NodeID, 8, append(pack(w.WriteIn{Fh: fh, Offset: top - 1, Size: 4}, w.Append), "data"...), unix.EINVAL},
		"truncate beyond MaxInt64":  {w.OpSetattr, e.NodeID, w.AttrOutSize, pack(w.SetattrIn{Valid: w.FattrSize, Size: 1 << 63}, w.Append), unix.EFBIG},
		"a second of 1e9 ns":        {w.OpSetattr, e.NodeID, w.AttrOutSize, pack(w.SetattrIn{Valid: w.FattrMtime, MtimeNsec: 1e9}, w.Append), unix.EINVAL},
		"nsec that means now":       {w.OpSetattr, e.NodeID, w.AttrOutSize, pack(w.SetattrIn{Valid: w.FattrAtime, AtimeNsec: unix.UTIME_NOW}, w.Append), unix.EINVAL},
		"truncate a directory":      {w.OpSetattr, rootID, w.AttrOutSize, pack(w.SetattrIn{Valid: w.FattrSize}, w.Append), unix.EISDIR},
		"seek to nowhere":           {w.OpLseek, e.NodeID, 8, pack(w.LseekIn{Fh: fh, Offset: 1 << 63, Whence: unix.SEEK_DATA}, w.Append), unix.EINVAL},
		"seek from the end":         {w.OpLseek, e.NodeID, 8, pack(w.LseekIn{Fh: fh, Whence: 2}, w.Append), unix.EINVAL},
		"allocate, sum overflows":   {w.OpFallocate, e.NodeID, 0, pack(w.FallocateIn{Fh: fh, Offset: top, Length: 1}, w.Append), unix.EFBIG},
		"collapse a range":          {w.OpFallocate, e.NodeID, 0, pack(w.FallocateIn{Fh: fh, Length: 4096, Mode: 8}, w.Append), unix.EOPNOTSUPP},
		"copy, flags":               {w.OpCopyFileRange, e.NodeID, 8, pack(w.CopyFileRangeIn{FhIn: fh, FhOut: fh, NodeIDOut: e.NodeID, Flags: 1}, w.Append), unix.EINVAL},
		"copy, sum overflows":       {w.OpCopyFileRange, e.NodeID, 8, pack(w.CopyFileRangeIn{FhIn: fh, FhOut: fh, NodeIDOut: e.NodeID, OffIn: top, Len: 1}, w.Append), unix.EFBIG},
		"copy to another's handle":  {w.OpCopyFileRange, e.NodeID, 8, pack(w.CopyFileRangeIn{FhIn: fh, FhOut: fh, NodeIDOut: rootID, Len: 1}, w.Append), unix.EBADF},
		"xattr of 64 KiB + 1":       {w.OpSetxattr, e.NodeID, 0, append(append(pack(w.SetxattrIn{Size: 65537}, w.Append), z("user.x")...), "v"...), unix.E2BIG},
		"xattr larger than sent":    {w.OpSetxattr, e.NodeID, 0, append(append(pack(w.SetxattrIn{Size: 2}, w.Append), z("user.x")...), "v"...), unix.EINVAL},
		"xattr with odd flags":      {w.OpSetxattr, e.NodeID, 0, append(append(pack(w.SetxattrIn{Size: 1, Flags: 4}, w.Append), z("user.x")...), "v"...), unix.EINVAL},
		"xattr name without NUL":    {w.OpGetxattr, e.NodeID, 8, append(pack(w.GetxattrIn{}, w.Append), "user.x"...), unix.EINVAL},
		"rename to a whiteout":      {w.OpRename2, rootID, 0, append(append(pack(w.Rename2In{NewDir: 1, Flags: unix.RENAME_WHITEOUT}, w.Append), z("f")...), z("g")...), unix.EINVAL},
		"access with odd bits":      {w.OpAccess, e.NodeID, 0, pack(w.AccessIn{Mask: 8}, w.Append), unix.EINVAL},
		"open with O_PATH":          {w.OpOpen, e.NodeID, 16, pack(w.OpenIn{Flags: unix.O_PATH}, w.Append), unix.EINVAL},
		"open with O_CREAT":         {w.OpOpen, e.NodeID, 16, pack(w.OpenIn{Flags: unix.O_CREAT}, w.Append), unix.EINVAL},
		"open with O_TMPFILE":       {w.OpOpen, e.NodeID, 16, pack(w.OpenIn{Flags: unix.O_TMPFILE | unix.O_RDWR}, w.Append), unix.EINVAL},
		"open with both modes":      {w.OpOpen, e.NodeID, 16, pack(w.OpenIn{Flags: unix.O_ACCMODE}, w.Append), unix.EINVAL},
		"open a directory":          {w.OpOpen, rootID, 16, pack(w.OpenIn{}, w.Append), unix.EISDIR},
		"opendir a file":            {w.OpOpendir, e.NodeID, 16, pack(w.OpenIn{}, w.Append), unix.ENOTDIR},
		"lookup in a file":          {w.OpLookup, e.NodeID, w.EntryOutSize, z("x"), unix.ENOTDIR},
		"release twice":             {w.OpRelease, e.NodeID, 0, pack(w.ReleaseIn{Fh: 999}, w.Append), unix.EBADF},
		"release as the other kind": {w.OpRelease, rootID, 0, pack(w.ReleaseIn{Fh: dir}, w.Append), unix.EBADF},
		"flush a directory":         {w.OpFlush, rootID, 0, pack(w.FlushIn{Fh: dir}, w.Append), unix.EBADF},
		"fsync with no handle":      {w.OpFsync, e.NodeID, 0, pack(w.FsyncIn{Fh: 999}, w.Append), unix.EBADF},
		"mknod of no type":          {w.OpMknod, rootID, w.EntryOutSize, append(pack(w.MknodIn{Mode: 0o170000}, w.Append), z("x")...), unix.EINVAL},
	} {
		_, err := s.do(tt.op, tt.node, tt.room, tt.in)
		s.want(err, tt.err, "%s", what)
	}
}

// TestForgetIsJudged: counts saturate and clamp, the root and open handles
// survive, ids are not reused.
func TestForgetIsJudged(t *testing.T) {
	s := newShare(t, nil)
	e, fh := s.mustCreate(rootID, "f", 0o600)
	s.mustLookup(rootID, "f") // count 2
	s.forget(e.NodeID, 1)
	s.mustAttr(e.NodeID)
	s.forget(e.NodeID, math.MaxUint64)
	if _, err := s.getattr(e.NodeID); err != unix.ESTALE {
		t.Errorf("forgotten node: %v", err)
	}
	if _, err := s.write(e.NodeID, fh, 0, "still open"); err != 0 {
		t.Errorf("the handle did not survive: %v", err)
	}
	s.must(s.release(e.NodeID, fh))
	s.want(s.release(e.NodeID, fh), unix.EBADF, "released twice")
	s.forget(rootID, math.MaxUint64)
	s.mustAttr(rootID)
	again := s.mustLookup(rootID, "f")
	if again.NodeID == e.NodeID {
		t.Error("a node id was used twice")
	}
	batch := append(pack(w.BatchForgetIn{Count: 3}, w.Append), pack(w.ForgetOne{NodeID: again.NodeID, Nlookup: 1}, w.Append)...)
	batch = append(batch, pack(w.ForgetOne{NodeID: 4242, Nlookup: 1}, w.Append)...)
	s.do(w.OpBatchForget, 0, 0, batch)
	if _, err := s.getattr(again.NodeID); err != unix.ESTALE {
		t.Errorf("batch-forgotten node: %v", err)
	}
	if n := s.srv.fds.Load(); n != 1 {
		t.Errorf("%d descriptors held, want the root's", n)
	}
}

// TestNothingButFilesIsOpened: FIFOs, sockets and devices of the host can be
// seen and removed, never opened.
func TestNothingButFilesIsOpened(t *testing.T) {
	eachVirt(t, func(t *testing.T, virt string) {
		s := virtShare(t, virt)
		if err := unix.Mkfifo(s.host("fifo"), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mknod(s.host("sock"), unix.S_IFSOCK|0o666, 0); err != nil {
			t.Fatal(err)
		}
		names := []string{"fifo", "sock"}
		if unix.Mknod(s.host("dev"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) == nil {
			names = append(names, "dev")
		}
		if err := os.Symlink("/etc/passwd", s.host("link")); err != nil {
			t.Fatal(err)
		}
		for _, name := range append(names, "link") {
			e := s.mustLookup(rootID, name)
			for _, flags := range []uint32{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR | unix.O_TRUNC} {
				if _, err := s.open(e.NodeID, flags); err != unix.ENXIO && err != unix.ELOOP {
					t.Errorf("open %s with %#x: %v", name, flags, err)
				}
			}
			if _, err := s.opendir(e.NodeID); err != unix.ENOTDIR {
				t.Errorf("opendir %s: %v", name, err)
			}
			if err := s.truncate(e.NodeID, 0); err != unix.EINVAL {
				t.Errorf("truncate %s: %v", name, err)
			}
			if err := s.setxattr(e.NodeID, "user.x", "1", 0); err != unix.EPERM {
				t.Errorf("setxattr %s: %v", name, err)
			}
			if _, err := s.lookup(e.NodeID, "passwd"); err != unix.ENOTDIR {
				t.Errorf("lookup below %s: %v", name, err)
			}
			s.must(s.unlink(rootID, name))
		}
	})
}
