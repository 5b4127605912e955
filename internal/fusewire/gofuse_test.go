package fusewire

import (
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// aliases maps our lower-case field names to go-fuse's where they differ.
var aliases = map[string]map[string]string{
	"InHeader":  {"len": "length"},
	"OutHeader": {"len": "length", "error": "status"},
	"OpenIn":    {"openflags": "mode"},
	"FsyncIn":   {"flags": "fsyncflags"},
	"FileLock":  {"type": "typ"},
	"LkIn":      {"flags": "lkflags", "type": "typ"},
	"LkOut":     {"type": "typ"},
}

type field struct{ off, size uintptr }

// flatten lists the leaf fields of a structure by lower-case name, arrays
// and embedded structures without names of their own included.
func flatten(t reflect.Type, base uintptr, into map[string]field) {
	for i := range t.NumField() {
		f := t.Field(i)
		off := base + f.Offset
		if f.Type.Kind() == reflect.Struct && f.Type.NumField() > 0 {
			if f.Anonymous || f.Name == "Attr" || f.Name == "Stat" || f.Name == "Lk" {
				flatten(f.Type, off, into)
				continue
			}
		}
		name := strings.ToLower(strings.TrimRight(f.Name, "_"))
		if f.Name == "_" {
			continue
		}
		into[name] = field{off, f.Type.Size()}
	}
}

func TestLayoutEqualsGoFuse(t *testing.T) {
	tests := []struct {
		ours, theirs any
		header       bool // theirs starts with the request header
	}{
		{InHeader{}, fuse.InHeader{}, false},
		{OutHeader{}, fuse.OutHeader{}, false},
		{Attr{}, fuse.Attr{}, false},
		{EntryOut{}, fuse.EntryOut{}, false},
		{AttrOut{}, fuse.AttrOut{}, false},
		{InitIn{}, fuse.InitIn{}, true},
		{InitOut{}, fuse.InitOut{}, false},
		{GetattrIn{}, fuse.GetAttrIn{}, true},
		{SetattrIn{}, fuse.SetAttrInCommon{}, true},
		{MknodIn{}, fuse.MknodIn{}, true},
		{MkdirIn{}, fuse.MkdirIn{}, true},
		{Rename2In{}, fuse.RenameIn{}, true},
		{LinkIn{}, fuse.LinkIn{}, true},
		{OpenIn{}, fuse.OpenIn{}, true},
		{OpenOut{}, fuse.OpenOut{}, false},
		{CreateIn{}, fuse.CreateIn{}, true},
		{ReadIn{}, fuse.ReadIn{}, true},
		{WriteIn{}, fuse.WriteIn{}, true},
		{WriteOut{}, fuse.WriteOut{}, false},
		{StatfsOut{}, fuse.StatfsOut{}, false},
		{ReleaseIn{}, fuse.ReleaseIn{}, true},
		{FlushIn{}, fuse.FlushIn{}, true},
		{FsyncIn{}, fuse.FsyncIn{}, true},
		{GetxattrOut{}, fuse.GetXAttrOut{}, false},
		{AccessIn{}, fuse.AccessIn{}, true},
		{ForgetIn{}, fuse.ForgetIn{}, true},
		{FallocateIn{}, fuse.FallocateIn{}, true},
		{LseekIn{}, fuse.LseekIn{}, true},
		{LseekOut{}, fuse.LseekOut{}, false},
		{CopyFileRangeIn{}, fuse.CopyFileRangeIn{}, true},
		{StatxIn{}, fuse.StatxIn{}, true},
		{StatxOut{}, fuse.StatxOut{}, false},
		{InterruptIn{}, fuse.InterruptIn{}, true},
		{FileLock{}, fuse.FileLock{}, false},
		{LkIn{}, fuse.LkIn{}, true},
		{LkOut{}, fuse.LkOut{}, false},
	}
	for _, tt := range tests {
		ot, tt2 := reflect.TypeOf(tt.ours), reflect.TypeOf(tt.theirs)
		t.Run(ot.Name(), func(t *testing.T) {
			var skip uintptr
			if tt.header {
				skip = InHeaderSize
			}
			if got, want := ot.Size(), tt2.Size()-skip; got != want {
				t.Errorf("size %d, go-fuse has %d", got, want)
			}
			ours, theirs := map[string]field{}, map[string]field{}
			flatten(ot, 0, ours)
			flatten(tt2, 0, theirs)
			for name, f := range ours {
				if a := aliases[ot.Name()][name]; a != "" {
					name = a
				}
				g, ok := theirs[name]
				if !ok {
					t.Errorf("field %q: go-fuse has none of that name", name)
				} else if g.off-skip != f.off || g.size != f.size {
					t.Errorf("field %q at %d of size %d, go-fuse has it at %d of size %d", name, f.off, f.size, g.off-skip, g.size)
				}
			}
		})
	}
}

func TestNamedSizes(t *testing.T) {
	for name, tt := range map[string][2]int{
		"InHeader": {InHeaderSize, Size[InHeader]()}, "OutHeader": {OutHeaderSize, Size[OutHeader]()},
		"Attr": {AttrSize, Size[Attr]()}, "EntryOut": {EntryOutSize, Size[EntryOut]()},
		"AttrOut": {AttrOutSize, Size[AttrOut]()}, "OpenOut": {OpenOutSize, Size[OpenOut]()},
		"InitOut": {InitOutSize, Size[InitOut]()}, "WriteIn": {WriteInSize, Size[WriteIn]()},
		"Dirent": {DirentSize, Size[Dirent]()}, "StatxOut": {StatxOutSize, Size[StatxOut]()},
	} {
		if tt[0] != tt[1] {
			t.Errorf("%s: constant %d, structure %d", name, tt[0], tt[1])
		}
	}
}

func TestFlagsEqualGoFuse(t *testing.T) {
	for name, tt := range map[string][2]uint64{
		"ASYNC_READ":          {uint64(InitAsyncRead), fuse.CAP_ASYNC_READ},
		"POSIX_LOCKS":         {uint64(InitPosixLocks), fuse.CAP_POSIX_LOCKS},
		"FILE_OPS":            {uint64(InitFileOps), fuse.CAP_FILE_OPS},
		"ATOMIC_O_TRUNC":      {uint64(InitAtomicOTrunc), fuse.CAP_ATOMIC_O_TRUNC},
		"EXPORT_SUPPORT":      {uint64(InitExportSupport), fuse.CAP_EXPORT_SUPPORT},
		"BIG_WRITES":          {uint64(InitBigWrites), fuse.CAP_BIG_WRITES},
		"DONT_MASK":           {uint64(InitDontMask), fuse.CAP_DONT_MASK},
		"FLOCK_LOCKS":         {uint64(InitFlockLocks), fuse.CAP_FLOCK_LOCKS},
		"IOCTL_DIR":           {uint64(InitIoctlDir), fuse.CAP_IOCTL_DIR},
		"AUTO_INVAL_DATA":     {uint64(InitAutoInvalData), fuse.CAP_AUTO_INVAL_DATA},
		"READDIRPLUS":         {uint64(InitReaddirplus), fuse.CAP_READDIRPLUS},
		"READDIRPLUS_AUTO":    {uint64(InitReaddirplusAuto), fuse.CAP_READDIRPLUS_AUTO},
		"ASYNC_DIO":           {uint64(InitAsyncDIO), fuse.CAP_ASYNC_DIO},
		"WRITEBACK_CACHE":     {uint64(InitWritebackCache), fuse.CAP_WRITEBACK_CACHE},
		"NO_OPEN_SUPPORT":     {uint64(InitNoOpenSupport), fuse.CAP_NO_OPEN_SUPPORT},
		"PARALLEL_DIROPS":     {uint64(InitParallelDirops), fuse.CAP_PARALLEL_DIROPS},
		"HANDLE_KILLPRIV":     {uint64(InitHandleKillpriv), fuse.CAP_HANDLE_KILLPRIV},
		"POSIX_ACL":           {uint64(InitPosixACL), fuse.CAP_POSIX_ACL},
		"ABORT_ERROR":         {uint64(InitAbortError), fuse.CAP_ABORT_ERROR},
		"MAX_PAGES":           {uint64(InitMaxPages), fuse.CAP_MAX_PAGES},
		"CACHE_SYMLINKS":      {uint64(InitCacheSymlinks), fuse.CAP_CACHE_SYMLINKS},
		"NO_OPENDIR_SUPPORT":  {uint64(InitNoOpendirSupport), fuse.CAP_NO_OPENDIR_SUPPORT},
		"EXPLICIT_INVAL_DATA": {uint64(InitExplicitInval), fuse.CAP_EXPLICIT_INVAL_DATA},
		"MAP_ALIGNMENT":       {uint64(InitMapAlignment), fuse.CAP_MAP_ALIGNMENT},
		"SUBMOUNTS":           {uint64(InitSubmounts), fuse.CAP_SUBMOUNTS},
		"HANDLE_KILLPRIV_V2":  {uint64(InitHandleKillprivV2), fuse.CAP_HANDLE_KILLPRIV_V2},
		"SETXATTR_EXT":        {uint64(InitSetxattrExt), fuse.CAP_SETXATTR_EXT},
		"INIT_EXT":            {uint64(InitExt), fuse.CAP_INIT_EXT},
		"SECURITY_CTX":        {uint64(InitSecurityCtx), fuse.CAP_SECURITY_CTX},
		"HAS_INODE_DAX":       {uint64(InitHasInodeDAX), fuse.CAP_HAS_INODE_DAX},
		"CREATE_SUPP_GROUP":   {uint64(InitCreateSuppGroup), fuse.CAP_CREATE_SUPP_GROUP},
		"HAS_EXPIRE_ONLY":     {uint64(InitHasExpireOnly), fuse.CAP_HAS_EXPIRE_ONLY},
		"DIRECT_IO_MMAP":      {uint64(InitDirectIOMmap), fuse.CAP_DIRECT_IO_ALLOW_MMAP},
		"FATTR_MODE":          {FattrMode, fuse.FATTR_MODE},
		"FATTR_UID":           {FattrUID, fuse.FATTR_UID},
		"FATTR_GID":           {FattrGID, fuse.FATTR_GID},
		"FATTR_SIZE":          {FattrSize, fuse.FATTR_SIZE},
		"FATTR_ATIME":         {FattrAtime, fuse.FATTR_ATIME},
		"FATTR_MTIME":         {FattrMtime, fuse.FATTR_MTIME},
		"FATTR_FH":            {FattrFh, fuse.FATTR_FH},
		"FATTR_ATIME_NOW":     {FattrAtimeNow, fuse.FATTR_ATIME_NOW},
		"FATTR_MTIME_NOW":     {FattrMtimeNow, fuse.FATTR_MTIME_NOW},
		"FATTR_LOCKOWNER":     {FattrLockOwner, fuse.FATTR_LOCKOWNER},
		"FATTR_CTIME":         {FattrCtime, fuse.FATTR_CTIME},
		"FATTR_KILL_SUIDGID":  {FattrKillSuidgid, fuse.FATTR_KILL_SUIDGID},
		"FOPEN_DIRECT_IO":     {FopenDirectIO, fuse.FOPEN_DIRECT_IO},
		"FOPEN_KEEP_CACHE":    {FopenKeepCache, fuse.FOPEN_KEEP_CACHE},
		"FOPEN_CACHE_DIR":     {FopenCacheDir, fuse.FOPEN_CACHE_DIR},
		"GETATTR_FH":          {GetattrFh, fuse.FUSE_GETATTR_FH},
		"OPEN_KILL_SUIDGID":   {OpenKillSuidgid, fuse.OPEN_KILL_SUIDGID},
		"WRITE_CACHE":         {WriteCache, fuse.WRITE_CACHE},
		"WRITE_KILL_SUIDGID":  {WriteKillSuidgid, fuse.WRITE_KILL_SUIDGID},
		"ATTR_SUBMOUNT":       {AttrSubmount, fuse.ATTR_SUBMOUNT},
		"LK_FLOCK":            {LkFlock, fuse.FUSE_LK_FLOCK},
		"RELEASE_FLOCK":       {ReleaseFlock, fuse.FUSE_RELEASE_FLOCK_UNLOCK},
		"ROOT_ID":             {RootID, fuse.FUSE_ROOT_ID},
	} {
		if tt[0] != tt[1] {
			t.Errorf("%s = %#x, go-fuse has %#x", name, tt[0], tt[1])
		}
	}
}

// TestOpcodesEqualGoFuse reads the opcodes from both sources, because go-fuse
// does not export its own.
func TestOpcodesEqualGoFuse(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "github.com/hanwen/go-fuse/v2/fuse").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	theirs := opcodes(t, filepath.Join(strings.TrimSpace(string(out)), "opcode.go"), "_OP_")
	ours := opcodes(t, "const.go", "Op")
	delete(ours, "COUNT")
	if len(ours) < 40 {
		t.Fatalf("only %d opcodes found", len(ours))
	}
	for name, v := range ours {
		if theirs[name] != v {
			t.Errorf("%s = %d, go-fuse has %d", name, v, theirs[name])
		}
		if v >= OpCount {
			t.Errorf("%s = %d is not below OpCount", name, v)
		}
	}
}

// opcodes returns the constants of a file whose names start with prefix, by
// upper-case name without underscores.
func opcodes(t *testing.T, file, prefix string) map[string]int64 {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, file, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	conf := types.Config{Importer: importer.Default(), Error: func(error) {}}
	info := types.Info{Defs: map[*ast.Ident]types.Object{}}
	_, _ = conf.Check("p", fset, []*ast.File{f}, &info)
	found := map[string]int64{}
	for id, obj := range info.Defs {
		c, ok := obj.(*types.Const)
		name, has := strings.CutPrefix(id.Name, prefix)
		if !ok || !has || !ast.IsExported(name) { // not OpenKillSuidgid
			continue
		}
		name = strings.ToUpper(strings.ReplaceAll(name, "_", ""))
		found[name], _ = constant.Int64Val(constant.ToInt(c.Val()))
	}
	return found
}
