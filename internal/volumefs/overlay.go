package volumefs

import (
	"encoding/binary"
	"errors"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// overlayXattr holds what a guest sees instead of the host's owner, mode and
// type. Name and format are shared with the peer.
const overlayXattr = "user.msb.override_stat"

// overlaySize is the length of version 1: version byte, 3 bytes padding, then
// uid, gid, mode with type bits, rdev; each 4 bytes, little-endian.
const overlaySize = 20

const overlayVersion = 1

// overlay is a decoded override; set is false when the file has none.
type overlay struct {
	set                  bool
	uid, gid, mode, rdev uint32
}

func (o overlay) isLink() bool { return o.set && o.mode&unix.S_IFMT == unix.S_IFLNK }

// errOverlay says that an override is there and cannot be understood. The guest
// gets EIO for such a file, and so do we: guessing would show a stand-in as an
// ordinary file.
var errOverlay = &refusal{text: "corrupt stat overlay", errno: unix.EIO, hint: "remove the file, or its attribute " + overlayXattr}

// decodeOverlay reads the attribute's value.
func decodeOverlay(b []byte) (overlay, error) {
	if len(b) != overlaySize || b[0] != overlayVersion {
		return overlay{}, errOverlay
	}
	le := binary.LittleEndian
	return overlay{set: true, uid: le.Uint32(b[4:]), gid: le.Uint32(b[8:]), mode: le.Uint32(b[12:]), rdev: le.Uint32(b[16:])}, nil
}

// encode is the inverse of decodeOverlay.
func (o overlay) encode() []byte {
	b := make([]byte, overlaySize)
	b[0] = overlayVersion
	le := binary.LittleEndian
	le.PutUint32(b[4:], o.uid)
	le.PutUint32(b[8:], o.gid)
	le.PutUint32(b[12:], o.mode)
	le.PutUint32(b[16:], o.rdev)
	return b
}

// on checks an override against the file that has it: only files and
// directories have one, a directory stays one, and nothing else becomes one.
func (o overlay) on(st *unix.Stat_t) (overlay, error) {
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if o.set && isDir != (o.mode&unix.S_IFMT == unix.S_IFDIR) {
		return overlay{}, errOverlay
	}
	return o, nil
}

// hasOverlay reports whether a file of this type can have an override.
func hasOverlay(st *unix.Stat_t) bool {
	t := st.Mode & unix.S_IFMT
	return t == unix.S_IFREG || t == unix.S_IFDIR
}

// overlayResult interprets the outcome of a getxattr call.
func overlayResult(b []byte, n int, err error) (overlay, error) {
	switch {
	case err == nil:
		return decodeOverlay(b[:n])
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP),
		// user attributes of a file we may not read: there is no telling, and
		// its content cannot be reached either
		errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return overlay{}, nil
	case errors.Is(err, unix.ERANGE):
		return overlay{}, errOverlay
	}
	return overlay{}, err
}

// overlayOf reads the override of an O_PATH descriptor, which fgetxattr
// refuses: by its name in /proc/self/fd.
func (f *FS) overlayOf(fd int, st *unix.Stat_t) (overlay, error) {
	if !hasOverlay(st) {
		return overlay{}, nil
	}
	ov, err := f.overlayAt(f.proc, strconv.Itoa(fd), 0, func(b []byte) (int, error) {
		return unix.Getxattr("/proc/self/fd/"+strconv.Itoa(fd), overlayXattr, b)
	})
	if err != nil {
		return ov, err
	}
	return ov.on(st)
}

// overlayIn reads the override of the name in an open directory. A symlink is
// not followed (and has no user attributes).
func (f *FS) overlayIn(dir int, name string, st *unix.Stat_t) (overlay, error) {
	if !hasOverlay(st) {
		return overlay{}, nil
	}
	ov, err := f.overlayAt(dir, name, unix.AT_SYMLINK_NOFOLLOW, func(b []byte) (int, error) {
		return unix.Lgetxattr("/proc/self/fd/"+strconv.Itoa(dir)+"/"+name, overlayXattr, b)
	})
	if err != nil {
		return ov, err
	}
	return ov.on(st)
}

// overlayAt calls getxattrat (Linux 6.13), else the older way.
func (f *FS) overlayAt(dir int, name string, flags int, older func([]byte) (int, error)) (overlay, error) {
	var b [overlaySize]byte
	if !f.noXattrAt.Load() {
		n, err := getxattrat(dir, name, flags, b[:])
		if err != unix.ENOSYS && err != unix.EPERM {
			return overlayResult(b[:], n, err)
		}
		f.noXattrAt.Store(true)
	}
	n, err := older(b[:])
	return overlayResult(b[:], n, err)
}

var overlayXattrZ = append([]byte(overlayXattr), 0)

// getxattrat reads overlayXattr. x/sys has the number but no function.
func getxattrat(dir int, name string, flags int, value []byte) (int, error) {
	args := struct { // struct xattr_args, linux/xattr.h, on 64-bit machines
		value       unsafe.Pointer
		size, flags uint32
	}{value: unsafe.Pointer(&value[0]), size: uint32(len(value))}
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	n, _, errno := unix.Syscall6(unix.SYS_GETXATTRAT, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(flags),
		uintptr(unsafe.Pointer(&overlayXattrZ[0])), uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
