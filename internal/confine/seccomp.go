package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16 // six 64-bit arguments; the low word first on little endian
)

// x32Bit marks calls of the x32 ABI, which share the arch value of x86-64 and
// would walk past a filter by number.
const x32Bit = 0x40000000

// Actions of a filter.
const (
	allow = uint32(unix.SECCOMP_RET_ALLOW)
	kill  = uint32(unix.SECCOMP_RET_KILL_PROCESS)
)

func fail(errno unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(errno) }

// argTest compares the low word of an argument under a mask; with whole set
// the high word must be zero. Only scalars may be tested: what a pointer
// points at can change after the filter has looked.
type argTest struct {
	index int
	mask  uint32
	want  uint32
	whole bool
}

// rule answers one system call with an action when all its tests hold.
type rule struct {
	nr     uint32
	tests  []argTest
	action uint32
}

// filter is a list of rules, the first that matches wins, and the answer to
// everything else.
type filter struct {
	rules    []rule
	fallback uint32
}

// program assembles f for this machine's architecture. Calls of any other ABI
// end the process.
func (f *filter) program() ([]unix.SockFilter, error) {
	prog := []unix.SockFilter{
		load(dataArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		answer(kill),
		load(dataNr),
	}
	if runtime.GOARCH == "amd64" {
		prog = append(prog, jump(unix.BPF_JGE, x32Bit, 0, 1), answer(kill))
	}
	for _, r := range f.rules {
		prog = append(prog, r.assemble()...)
	}
	prog = append(prog, answer(f.fallback))
	if len(prog) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("seccomp filter has %d instructions, the kernel takes %d", len(prog), unix.BPF_MAXINSNS)
	}
	return prog, nil
}

// assemble emits one rule. The call's number is in the accumulator before and
// after it.
func (r *rule) assemble() []unix.SockFilter {
	var tests []unix.SockFilter
	for _, t := range r.tests {
		off := uint32(dataArgs + 8*t.index)
		if t.whole {
			tests = append(tests, load(off+4), jump(unix.BPF_JEQ, 0, 0, missed))
		}
		tests = append(tests, load(off),
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: t.mask},
			jump(unix.BPF_JEQ, t.want, 0, missed))
	}
	body := append(tests, answer(r.action))
	if len(r.tests) > 0 {
		body = append(body, load(dataNr)) // what a missed test jumps to
	}
	for i := range body[:len(tests)] {
		if body[i].Jf == missed {
			body[i].Jf = uint8(len(body) - 1 - (i + 1))
		}
	}
	return append([]unix.SockFilter{jump(unix.BPF_JEQ, r.nr, 0, uint8(len(body)))}, body...)
}

// missed stands for the distance to the end of the rule until that is known.
const missed = 0xff

func load(off uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
}

func jump(op uint16, k uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, K: k, Jt: yes, Jf: no}
}

func answer(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}

// install puts the filter on the calling thread or, with every set, on all
// threads of the process. no_new_privs must be set.
func (f *filter) install(every bool) error {
	prog, err := f.program()
	if err != nil {
		return err
	}
	var flags uintptr
	if every {
		flags = unix.SECCOMP_FILTER_FLAG_TSYNC
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	if r != 0 {
		return fmt.Errorf("seccomp: thread %d has another filter", r)
	}
	return nil
}

// SealExec takes execve away from every thread of the calling process. A
// confined program calls it when it is the program that was meant to run; the
// filter it was started under had to allow that one call. On a kernel without
// filters, which is a finding already, it does nothing.
func SealExec() error {
	if !seccompSupported() {
		return nil
	}
	f := filter{fallback: allow}
	for _, nr := range []uint32{unix.SYS_EXECVE, unix.SYS_EXECVEAT} {
		f.rules = append(f.rules, rule{nr: nr, action: fail(unix.EPERM)})
	}
	return f.install(true)
}

// seccompSupported asks the kernel without changing anything: a null filter
// is EFAULT where filters exist.
func seccompSupported() bool {
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, 0)
	return errno == unix.EFAULT
}
