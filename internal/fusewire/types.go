package fusewire

// InHeader starts every request.
type InHeader struct {
	Len         uint32 // of the whole request
	Opcode      Opcode
	Unique      uint64
	NodeID      uint64
	UID         uint32
	GID         uint32
	PID         uint32
	TotalExtlen uint16 // in units of 8 bytes
	_           uint16
}

// OutHeader starts every reply.
type OutHeader struct {
	Len    uint32 // of the whole reply
	Error  int32  // 0 or a negative errno
	Unique uint64
}

// Attr is the attributes of a node. Times are seconds since 1970, possibly
// negative, and nanoseconds.
type Attr struct {
	Ino       uint64
	Size      uint64
	Blocks    uint64 // of 512 bytes
	Atime     uint64
	Mtime     uint64
	Ctime     uint64
	AtimeNsec uint32
	MtimeNsec uint32
	CtimeNsec uint32
	Mode      uint32
	Nlink     uint32
	UID       uint32
	GID       uint32
	Rdev      uint32
	Blksize   uint32
	Flags     uint32
}

// EntryOut answers every request that makes or finds a node.
type EntryOut struct {
	NodeID         uint64
	Generation     uint64
	EntryValid     uint64
	AttrValid      uint64
	EntryValidNsec uint32
	AttrValidNsec  uint32
	Attr           Attr
}

// AttrOut answers GETATTR and SETATTR.
type AttrOut struct {
	AttrValid     uint64
	AttrValidNsec uint32
	_             uint32
	Attr          Attr
}

// InitIn is the arguments of INIT. Guests older than 7.36 send 16 bytes.
type InitIn struct {
	Major        uint32
	Minor        uint32
	MaxReadahead uint32
	Flags        uint32
	Flags2       uint32
	_            [11]uint32
}

// InitInOld is the part of InitIn that every guest sends.
type InitInOld struct{ Major, Minor, MaxReadahead, Flags uint32 }

// InitOut answers INIT.
type InitOut struct {
	Major               uint32
	Minor               uint32
	MaxReadahead        uint32
	Flags               uint32
	MaxBackground       uint16
	CongestionThreshold uint16
	MaxWrite            uint32
	TimeGran            uint32
	MaxPages            uint16
	MapAlignment        uint16
	Flags2              uint32
	_                   [7]uint32
}

// GetattrIn is the arguments of GETATTR.
type GetattrIn struct {
	Flags uint32
	_     uint32
	Fh    uint64
}

// SetattrIn is the arguments of SETATTR.
type SetattrIn struct {
	Valid     uint32
	_         uint32
	Fh        uint64
	Size      uint64
	LockOwner uint64
	Atime     uint64
	Mtime     uint64
	Ctime     uint64
	AtimeNsec uint32
	MtimeNsec uint32
	CtimeNsec uint32
	Mode      uint32
	_         uint32
	UID       uint32
	GID       uint32
	_         uint32
}

// MknodIn is followed by the name.
type MknodIn struct {
	Mode  uint32
	Rdev  uint32
	Umask uint32
	_     uint32
}

// MkdirIn is followed by the name.
type MkdirIn struct{ Mode, Umask uint32 }

// RenameIn is followed by the old and the new name.
type RenameIn struct{ NewDir uint64 }

// Rename2In is followed by the old and the new name.
type Rename2In struct {
	NewDir uint64
	Flags  uint32
	_      uint32
}

// LinkIn is followed by the new name.
type LinkIn struct{ OldNodeID uint64 }

// OpenIn is the arguments of OPEN and OPENDIR.
type OpenIn struct{ Flags, OpenFlags uint32 }

// OpenOut answers OPEN and OPENDIR, and ends the answer to CREATE.
type OpenOut struct {
	Fh        uint64
	OpenFlags uint32
	_         uint32
}

// CreateIn is the arguments of CREATE and TMPFILE, followed by a name, which
// TMPFILE does not use.
type CreateIn struct{ Flags, Mode, Umask, OpenFlags uint32 }

// ReadIn is the arguments of READ, READDIR and READDIRPLUS.
type ReadIn struct {
	Fh        uint64
	Offset    uint64
	Size      uint32
	ReadFlags uint32
	LockOwner uint64
	Flags     uint32
	_         uint32
}

// WriteIn is followed by Size bytes of data.
type WriteIn struct {
	Fh         uint64
	Offset     uint64
	Size       uint32
	WriteFlags uint32
	LockOwner  uint64
	Flags      uint32 // of the open file at the time of the write
	_          uint32
}

// WriteOut answers WRITE and COPY_FILE_RANGE.
type WriteOut struct {
	Size uint32
	_    uint32
}

// StatfsOut answers STATFS.
type StatfsOut struct {
	Blocks  uint64
	Bfree   uint64
	Bavail  uint64
	Files   uint64
	Ffree   uint64
	Bsize   uint32
	Namelen uint32
	Frsize  uint32
	_       uint32
	_       [6]uint32
}

// ReleaseIn is the arguments of RELEASE and RELEASEDIR.
type ReleaseIn struct {
	Fh           uint64
	Flags        uint32
	ReleaseFlags uint32
	LockOwner    uint64
}

// FlushIn is the arguments of FLUSH.
type FlushIn struct {
	Fh        uint64
	_         uint32
	_         uint32
	LockOwner uint64
}

// FsyncIn is the arguments of FSYNC and FSYNCDIR.
type FsyncIn struct {
	Fh    uint64
	Flags uint32
	_     uint32
}

// FileLock is a range of bytes, both ends included, and what kind of lock is
// on it: F_RDLCK, F_WRLCK or F_UNLCK.
type FileLock struct {
	Start uint64
	End   uint64 // MaxInt64: up to the end of the file, wherever that will be
	Type  uint32
	PID   uint32
}

// LkIn is the arguments of GETLK, SETLK and SETLKW. Owner is the process for
// POSIX locks, the open file for all others.
type LkIn struct {
	Fh    uint64
	Owner uint64
	Lk    FileLock
	Flags uint32
	_     uint32
}

// LkOut answers GETLK.
type LkOut struct{ Lk FileLock }

// SetxattrIn is followed by the name and Size bytes of value.
type SetxattrIn struct{ Size, Flags uint32 }

// GetxattrIn is the arguments of GETXATTR, followed by the name, and of
// LISTXATTR. Size 0 asks for the size.
type GetxattrIn struct {
	Size uint32
	_    uint32
}

// GetxattrOut answers GETXATTR and LISTXATTR with Size 0.
type GetxattrOut struct {
	Size uint32
	_    uint32
}

// AccessIn is the arguments of ACCESS.
type AccessIn struct {
	Mask uint32
	_    uint32
}

// ForgetIn is the arguments of FORGET.
type ForgetIn struct{ Nlookup uint64 }

// BatchForgetIn is followed by Count times ForgetOne.
type BatchForgetIn struct {
	Count uint32
	_     uint32
}

// ForgetOne is one element of BATCH_FORGET.
type ForgetOne struct{ NodeID, Nlookup uint64 }

// FallocateIn is the arguments of FALLOCATE.
type FallocateIn struct {
	Fh     uint64
	Offset uint64
	Length uint64
	Mode   uint32
	_      uint32
}

// LseekIn is the arguments of LSEEK.
type LseekIn struct {
	Fh     uint64
	Offset uint64
	Whence uint32
	_      uint32
}

// LseekOut answers LSEEK.
type LseekOut struct{ Offset uint64 }

// CopyFileRangeIn is the arguments of COPY_FILE_RANGE.
type CopyFileRangeIn struct {
	FhIn      uint64
	OffIn     uint64
	NodeIDOut uint64
	FhOut     uint64
	OffOut    uint64
	Len       uint64
	Flags     uint64
}

// SyncfsIn is the arguments of SYNCFS.
type SyncfsIn struct{ _ uint64 }

// StatxIn is the arguments of STATX.
type StatxIn struct {
	GetattrFlags uint32
	_            uint32
	Fh           uint64
	SxFlags      uint32
	SxMask       uint32
}

// SxTime is one time of Statx.
type SxTime struct {
	Sec  int64
	Nsec uint32
	_    int32
}

// Statx is the attributes in the answer to STATX.
type Statx struct {
	Mask           uint32
	Blksize        uint32
	Attributes     uint64
	Nlink          uint32
	UID            uint32
	GID            uint32
	Mode           uint16
	_              uint16
	Ino            uint64
	Size           uint64
	Blocks         uint64
	AttributesMask uint64
	Atime          SxTime
	Btime          SxTime
	Ctime          SxTime
	Mtime          SxTime
	RdevMajor      uint32
	RdevMinor      uint32
	DevMajor       uint32
	DevMinor       uint32
	_              [14]uint64
}

// StatxOut answers STATX.
type StatxOut struct {
	AttrValid     uint64
	AttrValidNsec uint32
	Flags         uint32
	_             [2]uint64
	Stat          Statx
}

// InterruptIn is the arguments of INTERRUPT.
type InterruptIn struct{ Unique uint64 }

// Dirent starts one entry of READDIR; Namelen bytes of name and zeros up to a
// multiple of 8 follow. An entry of READDIRPLUS has an EntryOut before it.
type Dirent struct {
	Ino     uint64
	Off     uint64 // where the listing continues after this entry
	Namelen uint32
	Type    uint32 // file type bits of the mode, shifted right by 12
}

// Sizes of the fixed structures that are spoken of by number elsewhere.
const (
	InHeaderSize  = 40
	OutHeaderSize = 16
	AttrSize      = 88
	EntryOutSize  = 128
	AttrOutSize   = 104
	OpenOutSize   = 16
	InitOutSize   = 64
	WriteInSize   = 40
	DirentSize    = 24
	StatxOutSize  = 288
)
