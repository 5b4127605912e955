package storetest

import "golang.org/x/sys/unix"

// legacyMutating are the calls that only amd64 has.
var legacyMutating = []uint32{
	unix.SYS_MKDIR, unix.SYS_RENAME, unix.SYS_UNLINK, unix.SYS_RMDIR, unix.SYS_LINK, unix.SYS_SYMLINK, unix.SYS_CHMOD, unix.SYS_CREAT,
}

const legacyOpen = unix.SYS_OPEN
