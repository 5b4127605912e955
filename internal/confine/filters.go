package confine

import "golang.org/x/sys/unix"

// namespaceFlags are the clone(2) and unshare(2) flags that make namespaces.
const namespaceFlags = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWTIME

// filterFor returns the filter of a name, nil for an unknown one.
func filterFor(name Filter) *filter {
	switch name {
	case FilterFileServer:
		return fileServerFilter(false)
	case FilterFileServerOwners:
		return fileServerFilter(true)
	case FilterVMM:
		return vmmFilter()
	}
	return nil
}

// fileServerFilter is an allow-list. What is not in it does not exist
// (ENOSYS), so that programs take the path they take on older kernels.
//
// Left out on purpose: open_by_handle_at, with which CAP_DAC_READ_SEARCH opens
// any inode of the file system that a share lies on; socket, so that nothing
// can be connected to; memfd_create, the one place from which a program could
// be executed (shares are mounted noexec); io_uring, which walks past filters.
func fileServerFilter(owners bool) *filter {
	f := &filter{fallback: fail(unix.ENOSYS)}
	f.rules = append(f.rules, only(unix.SYS_CLONE,
		argTest{0, namespaceFlags | unix.CLONE_THREAD | unix.CLONE_VM, unix.CLONE_THREAD | unix.CLONE_VM, false}))
	f.rules = append(f.rules, only(unix.SYS_UNSHARE, argTest{0, ^uint32(0), unix.CLONE_FS, true}))
	f.rules = append(f.rules, only(unix.SYS_PRLIMIT64, argTest{0, ^uint32(0), 0, false})) // itself only
	for _, cmd := range fileServerIoctls {
		f.rules = append(f.rules, only(unix.SYS_IOCTL, argTest{1, ^uint32(0), cmd, false}))
	}
	for _, option := range fileServerPrctls {
		f.rules = append(f.rules, only(unix.SYS_PRCTL, argTest{0, ^uint32(0), option, false}))
	}
	for _, list := range [][]uint32{fileServerCalls, fileServerCallsArch} {
		for _, nr := range list {
			f.rules = append(f.rules, rule{nr: nr, action: allow})
		}
	}
	if owners {
		for _, nr := range ownerCalls {
			f.rules = append(f.rules, rule{nr: nr, action: allow})
		}
	}
	return f
}

func only(nr uint32, tests ...argTest) rule { return rule{nr: nr, tests: tests, action: allow} }

// TCGETS is how a program asks whether a descriptor is a terminal.
var fileServerIoctls = []uint32{unix.FICLONE, unix.FICLONERANGE, unix.FS_IOC_GETFLAGS, unix.TCGETS}

var fileServerPrctls = []uint32{unix.PR_SET_VMA, unix.PR_SET_NAME, unix.PR_GET_DUMPABLE, unix.PR_CAPBSET_READ}

// ownerCalls change the ids of one thread; the capabilities of the process
// decide which.
var ownerCalls = []uint32{
	unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS,
}

var fileServerCalls = []uint32{
	// Bytes.
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREAD64, unix.SYS_PWRITE64,
	unix.SYS_PREADV, unix.SYS_PWRITEV, unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_LSEEK,
	unix.SYS_COPY_FILE_RANGE, unix.SYS_SPLICE, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE, unix.SYS_FADVISE64,
	unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNCFS, unix.SYS_SYNC_FILE_RANGE, unix.SYS_READAHEAD,
	// Names and attributes.
	unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_CLOSE, unix.SYS_CLOSE_RANGE, unix.SYS_FSTAT, unix.SYS_STATX,
	unix.SYS_STATFS, unix.SYS_FSTATFS, unix.SYS_FACCESSAT, unix.SYS_FACCESSAT2, unix.SYS_GETDENTS64,
	unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT2, unix.SYS_LINKAT,
	unix.SYS_SYMLINKAT, unix.SYS_READLINKAT, unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2,
	unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT, unix.SYS_UMASK, unix.SYS_NAME_TO_HANDLE_AT,
	unix.SYS_FCHDIR, unix.SYS_CHDIR, unix.SYS_GETCWD,
	unix.SYS_GETXATTR, unix.SYS_LGETXATTR, unix.SYS_FGETXATTR, unix.SYS_SETXATTR, unix.SYS_LSETXATTR,
	unix.SYS_FSETXATTR, unix.SYS_LISTXATTR, unix.SYS_LLISTXATTR, unix.SYS_FLISTXATTR, unix.SYS_REMOVEXATTR,
	unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR,
	unix.SYS_GETXATTRAT, unix.SYS_SETXATTRAT, unix.SYS_LISTXATTRAT, unix.SYS_REMOVEXATTRAT,
	unix.SYS_FLOCK, unix.SYS_FCNTL, unix.SYS_DUP, unix.SYS_DUP3,
	// The front end's socket, guest memory, eventfds.
	unix.SYS_RECVMSG, unix.SYS_SENDMSG, unix.SYS_RECVFROM, unix.SYS_SENDTO, unix.SYS_ACCEPT4,
	unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT, unix.SYS_SETSOCKOPT, unix.SYS_SHUTDOWN,
	unix.SYS_EVENTFD2, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_PWAIT2,
	unix.SYS_PPOLL, unix.SYS_PIPE2, unix.SYS_TIMERFD_CREATE, unix.SYS_TIMERFD_SETTIME,
	unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MPROTECT, unix.SYS_MADVISE, unix.SYS_MREMAP, unix.SYS_MINCORE, unix.SYS_BRK,
	// The Go runtime.
	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOCK_GETRES,
	unix.SYS_GETTIMEOFDAY, unix.SYS_GETRANDOM, unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN,
	unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL, unix.SYS_TGKILL, unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETPPID,
	unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_GETGROUPS,
	unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETCPU, unix.SYS_MEMBARRIER, unix.SYS_RSEQ,
	unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS, unix.SYS_GETRUSAGE, unix.SYS_SYSINFO, unix.SYS_UNAME,
	unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE,
	unix.SYS_CAPGET, unix.SYS_CAPSET, // within what is permitted, which only shrinks
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP,
	// The execve that ends stage 1, and the filter that then forbids it.
	unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_SECCOMP,
}

// vmmFilter is a deny-list under QEMU's own -sandbox, which this filter must
// let it install: it only takes what no VMM of ours uses.
func vmmFilter() *filter {
	f := &filter{fallback: allow}
	for _, flag := range namespaceBits() {
		f.rules = append(f.rules, rule{unix.SYS_CLONE, []argTest{{0, flag, flag, false}}, fail(unix.EPERM)})
	}
	// Its flags are behind a pointer; without it libraries fall back to clone.
	f.rules = append(f.rules, rule{nr: unix.SYS_CLONE3, action: fail(unix.ENOSYS)})
	f.rules = append(f.rules, rule{unix.SYS_IOCTL, []argTest{{1, ^uint32(0), unix.TIOCSTI, false}}, fail(unix.EPERM)})
	for _, list := range [][]uint32{vmmDenied, vmmDeniedArch} {
		for _, nr := range list {
			f.rules = append(f.rules, rule{nr: nr, action: fail(unix.EPERM)})
		}
	}
	return f
}

// namespaceBits are the single flags of namespaceFlags; CLONE_NEWTIME is not
// among them, being part of the exit signal in clone(2).
func namespaceBits() []uint32 {
	var bits []uint32
	for flag := uint32(1); flag != 0; flag <<= 1 {
		if namespaceFlags&^unix.CLONE_NEWTIME&flag != 0 {
			bits = append(bits, flag)
		}
	}
	return bits
}

var vmmDenied = []uint32{
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_OPEN_TREE, unix.SYS_OPEN_TREE_ATTR, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	unix.SYS_STATMOUNT, unix.SYS_LISTMOUNT,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PROCESS_MADVISE, unix.SYS_KCMP,
	unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_SEND_SIGNAL,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_SYSLOG,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_FANOTIFY_INIT,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_VHANGUP, unix.SYS_PERSONALITY,
	unix.SYS_NFSSERVCTL, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_MBIND, unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES,
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID,
	unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_SETGROUPS, unix.SYS_CAPSET,
}
