package fusewire

import (
	"bytes"
	"syscall"
	"unsafe"
)

// fixed is the set of structures that travel as they lie in memory: no
// pointers, no implicit padding (a test checks both).
type fixed interface {
	InHeader | OutHeader | Attr | EntryOut | AttrOut | InitIn | InitInOld | InitOut |
		GetattrIn | SetattrIn | MknodIn | MkdirIn | RenameIn | Rename2In | LinkIn |
		OpenIn | OpenOut | CreateIn | ReadIn | WriteIn | WriteOut | StatfsOut |
		ReleaseIn | FlushIn | FsyncIn | SetxattrIn | GetxattrIn | GetxattrOut |
		AccessIn | ForgetIn | BatchForgetIn | ForgetOne | FallocateIn | LseekIn |
		LseekOut | CopyFileRangeIn | SyncfsIn | StatxIn | StatxOut | InterruptIn |
		FileLock | LkIn | LkOut | Dirent
}

// Size returns the number of bytes of T on the wire.
func Size[T fixed]() int {
	var v T
	return int(unsafe.Sizeof(v))
}

// Decode copies a T from the start of b and returns what follows it. It
// reports false if b is too short.
func Decode[T fixed](b []byte, v *T) (rest []byte, ok bool) {
	n := int(unsafe.Sizeof(*v))
	if len(b) < n {
		return nil, false
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(v)), n), b)
	return b[n:], true
}

// Put copies v to the start of b, which must be long enough, and returns its
// size.
func Put[T fixed](b []byte, v *T) int {
	n := int(unsafe.Sizeof(*v))
	return copy(b[:n], unsafe.Slice((*byte)(unsafe.Pointer(v)), n))
}

// Append appends v to b.
func Append[T fixed](b []byte, v *T) []byte {
	return append(b, unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))...)
}

// Name is one path component that has been judged: 1 to NameMax bytes, no
// slash, neither "." nor "..". Its bytes are followed by a NUL in memory, so
// it can be given to a system call as it is.
type Name struct{ b []byte } // with the NUL

// Ptr returns the address of the NUL-terminated name.
func (n Name) Ptr() *byte { return &n.b[0] }

// Bytes returns the name without its NUL.
func (n Name) Bytes() []byte { return n.b[:len(n.b)-1] }

// String returns a copy of the name.
func (n Name) String() string { return string(n.Bytes()) }

// IsDot and IsDotDot tell the two names that only LOOKUP may carry.
func (n Name) IsDot() bool { return len(n.b) == 2 && n.b[0] == '.' }

// IsDotDot reports whether the name is "..".
func (n Name) IsDotDot() bool { return len(n.b) == 3 && n.b[0] == '.' && n.b[1] == '.' }

// TakeName takes a NUL-terminated name from the start of b and returns what
// follows it. It fails with EINVAL if there is no NUL, the name is empty,
// holds a slash or is "." or "..", and with ENAMETOOLONG above NameMax bytes.
func TakeName(b []byte) (n Name, rest []byte, err syscall.Errno) {
	n, rest, err = TakeLookupName(b)
	if err == 0 && (n.IsDot() || n.IsDotDot()) {
		return Name{}, nil, syscall.EINVAL
	}
	return n, rest, err
}

// TakeLookupName is TakeName for LOOKUP, where "." and ".." have a meaning.
func TakeLookupName(b []byte) (n Name, rest []byte, err syscall.Errno) {
	i := bytes.IndexByte(b, 0)
	switch {
	case i <= 0:
		return Name{}, nil, syscall.EINVAL
	case i > NameMax:
		return Name{}, nil, syscall.ENAMETOOLONG
	case bytes.IndexByte(b[:i], '/') >= 0:
		return Name{}, nil, syscall.EINVAL
	}
	return Name{b[: i+1 : i+1]}, b[i+1:], 0
}

// TakeString takes a NUL-terminated byte string of 1 to max bytes from the
// start of b: a link's target or the name of an extended attribute. The
// result includes the NUL.
func TakeString(b []byte, max int) (s, rest []byte, err syscall.Errno) {
	i := bytes.IndexByte(b, 0)
	switch {
	case i < 0:
		return nil, nil, syscall.EINVAL
	case i == 0:
		return nil, nil, syscall.ENOENT
	case i > max:
		return nil, nil, syscall.ENAMETOOLONG
	}
	return b[: i+1 : i+1], b[i+1:], 0
}

// DirentLen returns the padded length of an entry of READDIR.
func DirentLen(namelen int) int { return (DirentSize + namelen + 7) &^ 7 }

// PutDirent writes one entry with its padding to the start of b and returns
// its length, 0 if it does not fit.
func PutDirent(b []byte, d *Dirent, name []byte) int {
	d.Namelen = uint32(len(name))
	n := DirentLen(len(name))
	if n > len(b) {
		return 0
	}
	end := Put(b, d)
	end += copy(b[end:n], name)
	clear(b[end:n])
	return n
}
