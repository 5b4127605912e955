package confine

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// call is a struct seccomp_data to be judged.
type call struct {
	arch uint32
	nr   uint32
	args [6]uint64
}

// judge runs a filter program as the kernel does.
func judge(t *testing.T, prog []unix.SockFilter, c call) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.LittleEndian.PutUint32(data, c.nr)
	binary.LittleEndian.PutUint32(data[4:], c.arch)
	for i, a := range c.args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; ; pc++ {
		if pc >= len(prog) {
			t.Fatalf("%+v: ran off the end of the program", c)
		}
		switch ins := prog[pc]; ins.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			acc = binary.LittleEndian.Uint32(data[ins.K:])
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= ins.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			pc += branch(acc == ins.K, ins)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			pc += branch(acc >= ins.K, ins)
		case unix.BPF_RET | unix.BPF_K:
			return ins.K
		default:
			t.Fatalf("instruction %#x is not one of ours", ins.Code)
		}
	}
}

func branch(yes bool, ins unix.SockFilter) int {
	if yes {
		return int(ins.Jt)
	}
	return int(ins.Jf)
}

func compile(t *testing.T, name Filter) []unix.SockFilter {
	t.Helper()
	prog, err := filterFor(name).program()
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

func TestFilters(t *testing.T) {
	const goThread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD
	enosys, eperm := fail(unix.ENOSYS), fail(unix.EPERM)
	tests := map[string]struct {
		filter Filter
		nr     uint32
		args   [6]uint64
		want   uint32
	}{
		"server reads":                        {FilterFileServer, unix.SYS_READ, [6]uint64{}, allow},
		"server makes a thread":               {FilterFileServer, unix.SYS_CLONE, [6]uint64{goThread}, allow},
		"server forks":                        {FilterFileServer, unix.SYS_CLONE, [6]uint64{uint64(unix.SIGCHLD)}, enosys},
		"server vforks":                       {FilterFileServer, unix.SYS_CLONE, [6]uint64{unix.CLONE_VM | unix.CLONE_VFORK}, enosys},
		"server thread in new user namespace": {FilterFileServer, unix.SYS_CLONE, [6]uint64{goThread | unix.CLONE_NEWUSER}, enosys},
		"server clone3":                       {FilterFileServer, unix.SYS_CLONE3, [6]uint64{}, enosys},
		"server socket":                       {FilterFileServer, unix.SYS_SOCKET, [6]uint64{unix.AF_INET}, enosys},
		"server opens by handle":              {FilterFileServer, unix.SYS_OPEN_BY_HANDLE_AT, [6]uint64{}, enosys},
		"server ptrace":                       {FilterFileServer, unix.SYS_PTRACE, [6]uint64{}, enosys},
		"server kills":                        {FilterFileServer, unix.SYS_KILL, [6]uint64{1, 9}, enosys},
		"server own limits":                   {FilterFileServer, unix.SYS_PRLIMIT64, [6]uint64{0, unix.RLIMIT_NOFILE}, allow},
		"server limits of another":            {FilterFileServer, unix.SYS_PRLIMIT64, [6]uint64{1, unix.RLIMIT_NOFILE}, enosys},
		"server own file system state":        {FilterFileServer, unix.SYS_UNSHARE, [6]uint64{unix.CLONE_FS}, allow},
		"server unshares more":                {FilterFileServer, unix.SYS_UNSHARE, [6]uint64{unix.CLONE_FS | unix.CLONE_NEWNS}, enosys},
		"server high word":                    {FilterFileServer, unix.SYS_UNSHARE, [6]uint64{1<<32 | unix.CLONE_FS}, enosys},
		"server clones a file":                {FilterFileServer, unix.SYS_IOCTL, [6]uint64{5, unix.FICLONE}, allow},
		"server types into a terminal":        {FilterFileServer, unix.SYS_IOCTL, [6]uint64{0, unix.TIOCSTI}, enosys},
		"server becomes another":              {FilterFileServer, unix.SYS_SETRESUID, [6]uint64{}, enosys},
		"owner server becomes another":        {FilterFileServerOwners, unix.SYS_SETRESUID, [6]uint64{}, allow},
		"owner server mounts":                 {FilterFileServerOwners, unix.SYS_MOUNT, [6]uint64{}, enosys},
		"vmm reads":                           {FilterVMM, unix.SYS_READ, [6]uint64{}, allow},
		"vmm installs its own filter":         {FilterVMM, unix.SYS_SECCOMP, [6]uint64{}, allow},
		"vmm thread":                          {FilterVMM, unix.SYS_CLONE, [6]uint64{goThread | unix.CLONE_SETTLS}, allow},
		"vmm thread by clone3":                {FilterVMM, unix.SYS_CLONE3, [6]uint64{}, enosys},
		"vmm user namespace":                  {FilterVMM, unix.SYS_CLONE, [6]uint64{unix.CLONE_NEWUSER | uint64(unix.SIGCHLD)}, eperm},
		"vmm mount namespace":                 {FilterVMM, unix.SYS_CLONE, [6]uint64{unix.CLONE_NEWNS}, eperm},
		"vmm unshare":                         {FilterVMM, unix.SYS_UNSHARE, [6]uint64{unix.CLONE_FS}, eperm},
		"vmm mount":                           {FilterVMM, unix.SYS_MOUNT, [6]uint64{}, eperm},
		"vmm bpf":                             {FilterVMM, unix.SYS_BPF, [6]uint64{}, eperm},
		"vmm kvm ioctl":                       {FilterVMM, unix.SYS_IOCTL, [6]uint64{4, 0xae01}, allow},
		"vmm types into a terminal":           {FilterVMM, unix.SYS_IOCTL, [6]uint64{0, unix.TIOCSTI}, eperm},
		"vmm types, high word set":            {FilterVMM, unix.SYS_IOCTL, [6]uint64{0, 1<<32 | unix.TIOCSTI}, eperm},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := judge(t, compile(t, tt.filter), call{auditArch, tt.nr, tt.args})
			if got != tt.want {
				t.Errorf("call %d %v: action %#x, want %#x", tt.nr, tt.args, got, tt.want)
			}
		})
	}
}

// TestFilterForeignABI: a filter by number is worthless for calls whose
// numbers mean something else.
func TestFilterForeignABI(t *testing.T) {
	for _, name := range []Filter{FilterFileServer, FilterFileServerOwners, FilterVMM} {
		prog := compile(t, name)
		if got := judge(t, prog, call{arch: unix.AUDIT_ARCH_I386, nr: unix.SYS_READ}); got != kill {
			t.Errorf("%s: 32-bit call: action %#x, want kill", name, got)
		}
		if auditArch != unix.AUDIT_ARCH_X86_64 {
			continue
		}
		if got := judge(t, prog, call{arch: auditArch, nr: x32Bit | unix.SYS_READ}); got != kill {
			t.Errorf("%s: x32 call: action %#x, want kill", name, got)
		}
	}
}

// TestFilterEveryNumber: no call falls off the program, and no listed rule is
// hidden by an earlier one with the same number and no tests.
func TestFilterEveryNumber(t *testing.T) {
	for _, name := range []Filter{FilterFileServer, FilterFileServerOwners, FilterVMM} {
		prog := compile(t, name)
		for nr := range uint32(1024) {
			args := [6]uint64{rand.Uint64(), rand.Uint64(), rand.Uint64()}
			judge(t, prog, call{auditArch, nr, args})
		}
		seen := map[uint32]bool{}
		for _, r := range filterFor(name).rules {
			if seen[r.nr] && len(r.tests) > 0 {
				t.Errorf("%s: rule for call %d is never reached", name, r.nr)
			}
			seen[r.nr] = seen[r.nr] || len(r.tests) == 0
		}
	}
}

// TestFileServerCallsAreAllowed reads the system call numbers that the file
// server's packages name and wants each in the allow-list: what is missing
// there would answer ENOSYS to a guest, under confinement only.
func TestFileServerCallsAreAllowed(t *testing.T) {
	named := regexp.MustCompile(`\bunix\.SYS_[A-Z0-9_]+`)
	allowed := map[string]bool{}
	for _, file := range []string{"filters.go", "filters_" + runtime.GOARCH + ".go"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		head, _, _ := strings.Cut(string(b), "vmmDenied")
		for _, name := range named.FindAllString(head, -1) {
			allowed[name] = true
		}
	}
	var files []string
	for _, dir := range []string{"fuseserver", "vhostuser"} {
		more, err := filepath.Glob("../" + dir + "/*.go")
		if err != nil || len(more) == 0 {
			t.Fatalf("no sources in %s: %v", dir, err)
		}
		files = append(files, more...)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range named.FindAllString(string(b), -1) {
			if !allowed[name] {
				t.Errorf("%s uses %s, which the file server's filter refuses", file, name)
			}
		}
	}
}
