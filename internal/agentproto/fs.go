package agentproto

import "errors"

// FSRequest is the payload of MsgFSRequest: one file operation in the guest.
type FSRequest struct {
	Op FSOp `cbor:"op"`
}

// FSOp is an externally tagged union: exactly one field is set.
type FSOp struct {
	RealPath    *FSPath       `cbor:"RealPath,omitempty"`
	Stat        *FSStat       `cbor:"Stat,omitempty"`
	SetStat     *FSSetStat    `cbor:"SetStat,omitempty"`
	List        *FSPath       `cbor:"List,omitempty"`
	ReadLink    *FSPath       `cbor:"ReadLink,omitempty"`
	Symlink     *FSSymlink    `cbor:"Symlink,omitempty"`
	Mkdir       *FSMkdir      `cbor:"Mkdir,omitempty"`
	Remove      *FSPath       `cbor:"Remove,omitempty"`
	RemoveDir   *FSRemoveDir  `cbor:"RemoveDir,omitempty"`
	Copy        *FSTwoPaths   `cbor:"Copy,omitempty"`
	Rename      *FSTwoPaths   `cbor:"Rename,omitempty"`
	OpenFile    *FSOpenFile   `cbor:"OpenFile,omitempty"`
	OpenDir     *FSPath       `cbor:"OpenDir,omitempty"`
	CloseHandle *FSHandle     `cbor:"CloseHandle,omitempty"`
	Read        *FSTransfer   `cbor:"Read,omitempty"`
	Write       *FSTransfer   `cbor:"Write,omitempty"`
	ReadDir     *FSReadDir    `cbor:"ReadDir,omitempty"`
	FStat       *FSHandle     `cbor:"FStat,omitempty"`
	FSetStat    *FSetStatByFD `cbor:"FSetStat,omitempty"`
}

// ErrFSOp reports a request that names no operation this generation knows, or
// more than one.
var ErrFSOp = errors.New("agentproto: not exactly one known file operation")

// Check reports ErrFSOp unless exactly one operation is set.
func (o *FSOp) Check() error {
	n := 0
	for _, set := range []bool{
		o.RealPath != nil, o.Stat != nil, o.SetStat != nil, o.List != nil, o.ReadLink != nil,
		o.Symlink != nil, o.Mkdir != nil, o.Remove != nil, o.RemoveDir != nil, o.Copy != nil,
		o.Rename != nil, o.OpenFile != nil, o.OpenDir != nil, o.CloseHandle != nil, o.Read != nil,
		o.Write != nil, o.ReadDir != nil, o.FStat != nil, o.FSetStat != nil,
	} {
		if set {
			n++
		}
	}
	if n != 1 {
		return ErrFSOp
	}
	return nil
}

// FSPath names one path in the guest.
type FSPath struct {
	Path string `cbor:"path"`
}

// FSStat asks for the attributes of a path.
type FSStat struct {
	Path          string `cbor:"path"`
	FollowSymlink bool   `cbor:"follow_symlink"`
}

// FSSetStat changes attributes of a path.
type FSSetStat struct {
	Path          string  `cbor:"path"`
	FollowSymlink bool    `cbor:"follow_symlink"`
	Attrs         FSAttrs `cbor:"attrs"`
}

// FSAttrs are attributes to change; nil leaves one alone. Times are Unix seconds.
type FSAttrs struct {
	Mode  *uint32 `cbor:"mode"`
	UID   *uint32 `cbor:"uid"`
	GID   *uint32 `cbor:"gid"`
	Size  *uint64 `cbor:"size"`
	Atime *int64  `cbor:"atime"`
	Mtime *int64  `cbor:"mtime"`
}

// FSSymlink makes a symbolic link.
type FSSymlink struct {
	Target   string `cbor:"target"`
	LinkPath string `cbor:"link_path"`
}

// FSMkdir makes a directory. A nil mode makes parents too and accepts an
// existing directory.
type FSMkdir struct {
	Path string  `cbor:"path"`
	Mode *uint32 `cbor:"mode"`
}

// FSRemoveDir removes a directory, with all below it if Recursive.
type FSRemoveDir struct {
	Path      string `cbor:"path"`
	Recursive bool   `cbor:"recursive"`
}

// FSTwoPaths names source and destination.
type FSTwoPaths struct {
	Src string `cbor:"src"`
	Dst string `cbor:"dst"`
}

// FSOpenFile opens a file; the answer is a handle.
type FSOpenFile struct {
	Path    string        `cbor:"path"`
	Options FSOpenOptions `cbor:"options"`
}

// FSOpenOptions says how a file is opened; a nil mode is 0644.
type FSOpenOptions struct {
	Read      bool    `cbor:"read"`
	Write     bool    `cbor:"write"`
	Append    bool    `cbor:"append"`
	Create    bool    `cbor:"create"`
	Truncate  bool    `cbor:"truncate"`
	CreateNew bool    `cbor:"create_new"`
	Mode      *uint32 `cbor:"mode"`
}

// FSHandle names an open file or directory.
type FSHandle struct {
	Handle uint64 `cbor:"handle"`
}

// FSTransfer reads or writes Len bytes at Offset; nil Len means to the end of
// the file (read) or until an empty MsgFSData (write).
type FSTransfer struct {
	Handle uint64  `cbor:"handle"`
	Offset uint64  `cbor:"offset"`
	Len    *uint64 `cbor:"len"`
}

// FSReadDir lists up to Limit further entries of an open directory.
type FSReadDir struct {
	Handle uint64  `cbor:"handle"`
	Limit  *uint32 `cbor:"limit"`
}

// FSetStatByFD changes attributes of an open file.
type FSetStatByFD struct {
	Handle uint64  `cbor:"handle"`
	Attrs  FSAttrs `cbor:"attrs"`
}

// FSResponse ends a file operation. Error is set when OK is false.
type FSResponse struct {
	OK    bool    `cbor:"ok"`
	Error *string `cbor:"error"`
	Data  *FSData `cbor:"data"`
	// Errno is ours: the guest's error number where there is one.
	Errno *int32 `cbor:"errno,omitempty"`
}

// FSData is an externally tagged union: at most one field is set. List is a
// pointer so that an empty listing differs from none.
type FSData struct {
	Stat   *FSEntry   `cbor:"Stat,omitempty"`
	List   *[]FSEntry `cbor:"List,omitempty"`
	Handle *uint64    `cbor:"Handle,omitempty"`
	Path   *string    `cbor:"Path,omitempty"`
}

// Kinds of directory entries in the guest.
const (
	KindFile    = "file"
	KindDir     = "dir"
	KindSymlink = "symlink"
	KindOther   = "other"
)

// FSEntry describes one file. Mode holds the permission bits with setuid,
// setgid and sticky; times are Unix seconds.
type FSEntry struct {
	Path     string `cbor:"path"`
	Kind     string `cbor:"kind"`
	Size     uint64 `cbor:"size"`
	Mode     uint32 `cbor:"mode"`
	UID      uint32 `cbor:"uid"`
	GID      uint32 `cbor:"gid"`
	Modified *int64 `cbor:"modified"`
	Atime    *int64 `cbor:"atime"`
	Mtime    *int64 `cbor:"mtime"`
}

// Shutdown is the payload of MsgShutdown: programs get SIGTERM, then SIGKILL
// after the grace time; 0 means two seconds.
type Shutdown struct {
	GraceMS uint32 `cbor:"grace_ms,omitempty"`
}
