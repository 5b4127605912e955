package confine

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

// Calls that only this architecture has, or names so.
var (
	fileServerCallsArch = []uint32{unix.SYS_FSTATAT, unix.SYS_GETRLIMIT, unix.SYS_RENAMEAT}
	vmmDeniedArch       = []uint32{unix.SYS_KEXEC_FILE_LOAD}
)
