package fusewire

// Protocol version spoken, and the oldest minor version accepted: virtio-fs
// appeared with 7.31.
const (
	Major    = 7
	Minor    = 38
	MinMinor = 31
)

// RootID is the node id of the root directory.
const RootID = 1

// Opcode is the kind of a request.
type Opcode uint32

// The opcodes.
const (
	OpLookup        Opcode = 1
	OpForget        Opcode = 2 // no reply
	OpGetattr       Opcode = 3
	OpSetattr       Opcode = 4
	OpReadlink      Opcode = 5
	OpSymlink       Opcode = 6
	OpMknod         Opcode = 8
	OpMkdir         Opcode = 9
	OpUnlink        Opcode = 10
	OpRmdir         Opcode = 11
	OpRename        Opcode = 12
	OpLink          Opcode = 13
	OpOpen          Opcode = 14
	OpRead          Opcode = 15
	OpWrite         Opcode = 16
	OpStatfs        Opcode = 17
	OpRelease       Opcode = 18
	OpFsync         Opcode = 20
	OpSetxattr      Opcode = 21
	OpGetxattr      Opcode = 22
	OpListxattr     Opcode = 23
	OpRemovexattr   Opcode = 24
	OpFlush         Opcode = 25
	OpInit          Opcode = 26
	OpOpendir       Opcode = 27
	OpReaddir       Opcode = 28
	OpReleasedir    Opcode = 29
	OpFsyncdir      Opcode = 30
	OpGetlk         Opcode = 31
	OpSetlk         Opcode = 32
	OpSetlkw        Opcode = 33
	OpAccess        Opcode = 34
	OpCreate        Opcode = 35
	OpInterrupt     Opcode = 36
	OpBmap          Opcode = 37
	OpDestroy       Opcode = 38
	OpIoctl         Opcode = 39
	OpPoll          Opcode = 40
	OpNotifyReply   Opcode = 41
	OpBatchForget   Opcode = 42 // no reply
	OpFallocate     Opcode = 43
	OpReaddirplus   Opcode = 44
	OpRename2       Opcode = 45
	OpLseek         Opcode = 46
	OpCopyFileRange Opcode = 47
	OpSetupmapping  Opcode = 48
	OpRemovemapping Opcode = 49
	OpSyncfs        Opcode = 50
	OpTmpfile       Opcode = 51
	OpStatx         Opcode = 52

	// OpCount is one more than the largest opcode of this version.
	OpCount = 53
)

// InitFlags are the features of INIT: the low half travels in flags, the high
// half in flags2.
type InitFlags uint64

// The features.
const (
	InitAsyncRead        InitFlags = 1 << 0
	InitPosixLocks       InitFlags = 1 << 1
	InitFileOps          InitFlags = 1 << 2
	InitAtomicOTrunc     InitFlags = 1 << 3
	InitExportSupport    InitFlags = 1 << 4
	InitBigWrites        InitFlags = 1 << 5
	InitDontMask         InitFlags = 1 << 6
	InitSpliceWrite      InitFlags = 1 << 7
	InitSpliceMove       InitFlags = 1 << 8
	InitSpliceRead       InitFlags = 1 << 9
	InitFlockLocks       InitFlags = 1 << 10
	InitIoctlDir         InitFlags = 1 << 11
	InitAutoInvalData    InitFlags = 1 << 12
	InitReaddirplus      InitFlags = 1 << 13
	InitReaddirplusAuto  InitFlags = 1 << 14
	InitAsyncDIO         InitFlags = 1 << 15
	InitWritebackCache   InitFlags = 1 << 16
	InitNoOpenSupport    InitFlags = 1 << 17
	InitParallelDirops   InitFlags = 1 << 18
	InitHandleKillpriv   InitFlags = 1 << 19
	InitPosixACL         InitFlags = 1 << 20
	InitAbortError       InitFlags = 1 << 21
	InitMaxPages         InitFlags = 1 << 22
	InitCacheSymlinks    InitFlags = 1 << 23
	InitNoOpendirSupport InitFlags = 1 << 24
	InitExplicitInval    InitFlags = 1 << 25
	InitMapAlignment     InitFlags = 1 << 26
	InitSubmounts        InitFlags = 1 << 27
	InitHandleKillprivV2 InitFlags = 1 << 28
	InitSetxattrExt      InitFlags = 1 << 29
	InitExt              InitFlags = 1 << 30
	InitReserved         InitFlags = 1 << 31
	InitSecurityCtx      InitFlags = 1 << 32
	InitHasInodeDAX      InitFlags = 1 << 33
	InitCreateSuppGroup  InitFlags = 1 << 34
	InitHasExpireOnly    InitFlags = 1 << 35
	InitDirectIOMmap     InitFlags = 1 << 36
)

// Bits of SetattrIn.Valid.
const (
	FattrMode        = 1 << 0
	FattrUID         = 1 << 1
	FattrGID         = 1 << 2
	FattrSize        = 1 << 3
	FattrAtime       = 1 << 4
	FattrMtime       = 1 << 5
	FattrFh          = 1 << 6
	FattrAtimeNow    = 1 << 7
	FattrMtimeNow    = 1 << 8
	FattrLockOwner   = 1 << 9
	FattrCtime       = 1 << 10
	FattrKillSuidgid = 1 << 11
)

// Bits of OpenOut.OpenFlags.
const (
	FopenDirectIO  = 1 << 0
	FopenKeepCache = 1 << 1
	FopenCacheDir  = 1 << 3
)

// Bits of the flag fields of single requests and replies.
const (
	GetattrFh        = 1 << 0 // GetattrIn.Flags: Fh is set
	OpenKillSuidgid  = 1 << 0 // OpenIn.OpenFlags, CreateIn.OpenFlags
	WriteCache       = 1 << 0 // WriteIn.WriteFlags: from the guest's page cache
	WriteKillSuidgid = 1 << 2 // WriteIn.WriteFlags
	FsyncDatasync    = 1 << 0 // FsyncIn.Flags
	AttrSubmount     = 1 << 0 // Attr.Flags: the directory is another mount
	LkFlock          = 1 << 0 // LkIn.Flags: flock(2), not fcntl(2)
	ReleaseFlock     = 1 << 1 // ReleaseIn.ReleaseFlags: the file had a flock
)

// Limits of the protocol and of Linux.
const (
	NameMax      = 255   // bytes of one name
	SymlinkMax   = 4095  // bytes of a link's target
	XattrSizeMax = 65536 // bytes of a value, or of a list of names
)
