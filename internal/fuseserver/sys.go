package fuseserver

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// The wrappers of this file differ from package unix in three points: names
// are judged, NUL-terminated bytes and cost no allocation; errors are plain
// errnos; and "quick" calls skip the Go scheduler's entry and exit, which cost
// a quarter of an fstat. A quick call must not sleep: it would hold up every
// goroutine of the process. So quick is used for inodes of local file systems
// that an open descriptor keeps in memory, and for nothing else.

type errno = syscall.Errno

const (
	atEmptyPath = unix.AT_EMPTY_PATH
	noFollow    = unix.AT_SYMLINK_NOFOLLOW

	// System call numbers of Linux 6.13, the same on every architecture.
	sysSetxattrat    = 463
	sysGetxattrat    = 464
	sysListxattrat   = 465
	sysRemovexattrat = 466

	rwfNowait = 0x8  // preadv2: do not wait for the disk
	rwfDsync  = 0x2  // pwritev2: as O_DSYNC
	rwfSync   = 0x4  // pwritev2: as O_SYNC
	rwfAppend = 0x10 // pwritev2: as O_APPEND
)

var emptyPath = [1]byte{}

// sys calls the kernel and repeats a call that a signal interrupted. The
// directive keeps what the arguments point to on the heap and alive.
//
//go:uintptrescapes
func sys(trap, a, b, c, d, e, f uintptr) (uintptr, errno) {
	for {
		r, _, err := unix.Syscall6(trap, a, b, c, d, e, f)
		if err != unix.EINTR {
			return r, err
		}
	}
}

// fstat may be quick; st must be on the heap.
func fstat(quick bool, fd int, st *unix.Stat_t) errno {
	if quick {
		_, _, err := unix.RawSyscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
		return err
	}
	_, _, err := unix.Syscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
	return err
}

const statxMask = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID

// statxFd and statxAt fill stx, which must be on the heap.
func statxFd(fd int, mask uint32, stx *unix.Statx_t) errno {
	_, err := sys(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(&emptyPath[0])), atEmptyPath|noFollow,
		uintptr(mask), uintptr(unsafe.Pointer(stx)), 0)
	return err
}

func statxAt(quick bool, dir int, name *byte, stx *unix.Statx_t) errno {
	if quick {
		_, _, err := unix.RawSyscall6(unix.SYS_STATX, uintptr(dir), uintptr(unsafe.Pointer(name)),
			noFollow|unix.AT_NO_AUTOMOUNT, statxMask, uintptr(unsafe.Pointer(stx)), 0)
		return err
	}
	_, err := sys(unix.SYS_STATX, uintptr(dir), uintptr(unsafe.Pointer(name)), noFollow|unix.AT_NO_AUTOMOUNT,
		statxMask, uintptr(unsafe.Pointer(stx)), 0)
	return err
}

func openat(dir int, name *byte, flags int, mode uint32) (int, errno) {
	fd, err := sys(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(name)),
		uintptr(flags|unix.O_CLOEXEC|unix.O_LARGEFILE), uintptr(mode), 0, 0)
	if err != 0 {
		return -1, err
	}
	return int(fd), 0
}

// closeFd closes once: after EINTR the descriptor is gone on Linux.
func closeFd(fd int) { _, _, _ = unix.Syscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func mkdirat(dir int, name *byte, mode uint32) errno {
	_, err := sys(unix.SYS_MKDIRAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(mode), 0, 0, 0)
	return err
}

func mknodat(dir int, name *byte, mode uint32) errno {
	_, err := sys(unix.SYS_MKNODAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(mode), 0, 0, 0)
	return err
}

func symlinkat(target []byte, dir int, name *byte) errno {
	_, err := sys(unix.SYS_SYMLINKAT, uintptr(unsafe.Pointer(unsafe.SliceData(target))), uintptr(dir), uintptr(unsafe.Pointer(name)), 0, 0, 0)
	return err
}

func unlinkat(dir int, name *byte, flags int) errno {
	_, err := sys(unix.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(flags), 0, 0, 0)
	return err
}

func linkat(oldDir int, oldName *byte, newDir int, newName *byte, flags int) errno {
	_, err := sys(unix.SYS_LINKAT, uintptr(oldDir), uintptr(unsafe.Pointer(oldName)),
		uintptr(newDir), uintptr(unsafe.Pointer(newName)), uintptr(flags), 0)
	return err
}

func renameat2(oldDir int, oldName *byte, newDir int, newName *byte, flags uint32) errno {
	_, err := sys(unix.SYS_RENAMEAT2, uintptr(oldDir), uintptr(unsafe.Pointer(oldName)),
		uintptr(newDir), uintptr(unsafe.Pointer(newName)), uintptr(flags), 0)
	return err
}

// readlinkFd reads the target of the symbolic link that an O_PATH descriptor holds.
func readlinkFd(fd int, b []byte) (int, errno) {
	n, err := sys(unix.SYS_READLINKAT, uintptr(fd), uintptr(unsafe.Pointer(&emptyPath[0])), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0)
	return int(n), err
}

// fchownFd changes the owner of what any descriptor holds, O_PATH included.
func fchownFd(fd int, uid, gid uint32) errno {
	_, err := sys(unix.SYS_FCHOWNAT, uintptr(fd), uintptr(unsafe.Pointer(&emptyPath[0])),
		uintptr(uid), uintptr(gid), atEmptyPath|noFollow, 0)
	return err
}

func fchmodat(dir int, name *byte, mode uint32) errno {
	_, err := sys(unix.SYS_FCHMODAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(mode), 0, 0, 0)
	return err
}

func utimensat(dir int, name *byte, ts *[2]unix.Timespec) errno {
	_, err := sys(unix.SYS_UTIMENSAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(ts)), 0, 0, 0)
	return err
}

func ftruncate(fd int, size uint64) errno {
	_, err := sys(unix.SYS_FTRUNCATE, uintptr(fd), uintptr(size), 0, 0, 0, 0)
	return err
}

// flock must not be asked to wait.
func flock(fd, how int) errno {
	_, err := sys(unix.SYS_FLOCK, uintptr(fd), uintptr(how), 0, 0, 0, 0)
	return err
}

// fcntlLock is one of the lock commands of fcntl that do not wait.
func fcntlLock(fd int, cmd uintptr, lk *unix.Flock_t) errno {
	_, err := sys(unix.SYS_FCNTL, uintptr(fd), cmd, uintptr(unsafe.Pointer(lk)), 0, 0, 0)
	return err
}

func getdents(fd int, b []byte) (int, errno) {
	n, err := sys(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0, 0)
	return int(n), err
}

func lseek(fd int, off uint64, whence uint32) (uint64, errno) {
	n, err := sys(unix.SYS_LSEEK, uintptr(fd), uintptr(off), uintptr(whence), 0, 0, 0)
	return uint64(n), err
}

// transfer is preadv2 or pwritev2.
func transfer(trap uintptr, fd int, iov []unix.Iovec, off uint64, flags uintptr) (int, errno) {
	if len(iov) == 0 {
		return 0, 0
	}
	n, err := sys(trap, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)), uintptr(off), 0, flags)
	if err != 0 {
		return 0, err
	}
	return int(n), 0
}

func fallocate(fd int, mode uint32, off, length uint64) errno {
	_, err := sys(unix.SYS_FALLOCATE, uintptr(fd), uintptr(mode), uintptr(off), uintptr(length), 0, 0)
	return err
}

func copyFileRange(in int, offIn *int64, out int, offOut *int64, length uint64) (int, errno) {
	n, err := sys(unix.SYS_COPY_FILE_RANGE, uintptr(in), uintptr(unsafe.Pointer(offIn)),
		uintptr(out), uintptr(unsafe.Pointer(offOut)), uintptr(length), 0)
	return int(n), err
}

func fgetxattr(fd int, name *byte, b []byte) (int, errno) {
	n, err := sys(unix.SYS_FGETXATTR, uintptr(fd), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0)
	return int(n), err
}

func fsetxattr(fd int, name *byte, b []byte, flags uint32) errno {
	_, err := sys(unix.SYS_FSETXATTR, uintptr(fd), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(flags), 0)
	return err
}

func flistxattr(fd int, b []byte) (int, errno) {
	n, err := sys(unix.SYS_FLISTXATTR, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0, 0)
	return int(n), err
}

func fremovexattr(fd int, name *byte) errno {
	_, err := sys(unix.SYS_FREMOVEXATTR, uintptr(fd), uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
	return err
}

// xattrArgs is struct xattr_args of the *xattrat system calls.
type xattrArgs struct {
	value unsafe.Pointer
	size  uint32
	flags uint32
}

func (x *xattrArgs) set(b []byte, flags uint32) {
	*x = xattrArgs{unsafe.Pointer(unsafe.SliceData(b)), uint32(len(b)), flags}
}

// getxattrat and setxattrat use x, which must be on the heap, for their arguments.
func getxattrat(x *xattrArgs, dir int, path, name *byte, b []byte) (int, errno) {
	x.set(b, 0)
	n, err := sys(sysGetxattrat, uintptr(dir), uintptr(unsafe.Pointer(path)), 0,
		uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(x)), unsafe.Sizeof(*x))
	return int(n), err
}

func setxattrat(x *xattrArgs, dir int, path, name *byte, b []byte, flags uint32) errno {
	x.set(b, flags)
	_, err := sys(sysSetxattrat, uintptr(dir), uintptr(unsafe.Pointer(path)), 0,
		uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(x)), unsafe.Sizeof(*x))
	return err
}

func listxattrat(dir int, path *byte, b []byte) (int, errno) {
	n, err := sys(sysListxattrat, uintptr(dir), uintptr(unsafe.Pointer(path)), 0, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0)
	return int(n), err
}

func removexattrat(dir int, path, name *byte) errno {
	_, err := sys(sysRemovexattrat, uintptr(dir), uintptr(unsafe.Pointer(path)), 0, uintptr(unsafe.Pointer(name)), 0, 0)
	return err
}

// judged is a name that was decoded: the only kind that reaches *at calls
// from the guest.
type judged = fusewire.Name
