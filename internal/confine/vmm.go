package confine

import (
	"debug/elf"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// libraryDirs and dataDirs are where a QEMU of a distribution finds its parts.
var (
	libraryDirs = []string{"/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"}
	dataDirs    = []string{"/usr/share/qemu", "/usr/share/seabios", "/usr/share/seavgabios", "/usr/share/ipxe",
		"/usr/share/qemu-kvm", "/usr/local/share/qemu"}
	// storeDirs hold whole systems, QEMU and its libraries among them.
	storeDirs = []string{"/nix/store", "/gnu/store"}
)

// QEMU returns the profile of a QEMU that opens no path but its own parts and
// files (kernel and initramfs), all read-only: everything else it gets as
// descriptors. It keeps no capability and sees no /proc.
//
// User is not set; NewVMM does that.
func QEMU(binary string, files ...string) (Profile, error) {
	resolved, err := filepath.EvalSymlinks(binary)
	if err != nil {
		return Profile{}, errdefs.Wrap(errdefs.IO, err, "QEMU")
	}
	p := Profile{
		Name:    "QEMU",
		Program: resolved,
		Filter:  FilterVMM,
		Binds:   []Bind{{Source: resolved, Exec: true}, {Source: "/etc/ld.so.cache", Optional: true}},
		Env:     []string{"PATH=/usr/bin:/bin", "LC_ALL=C"},
		Rlimits: []Rlimit{{Resource: unix.RLIMIT_CORE}, {Resource: unix.RLIMIT_FSIZE, ToHard: true}},
		Devices: usableDevices("/dev/null", "/dev/urandom", "/dev/kvm"),
	}
	p.addLibraries(resolved)
	for _, dir := range append(dataDirs, beside(resolved, "share/qemu")) {
		p.bindOnce(Bind{Source: dir, Optional: true})
	}
	if err := p.addInterpreter(resolved); err != nil {
		return Profile{}, errdefs.Wrap(errdefs.IO, err, "QEMU %s", resolved)
	}
	for _, file := range files {
		if !filepath.IsAbs(file) {
			return Profile{}, errdefs.New(errdefs.InvalidArgument, "file for QEMU %q is not an absolute path", file)
		}
		p.bindOnce(Bind{Source: filepath.Clean(file)})
	}
	return p, nil
}

// addLibraries shows the library directories, as links where the host has links
// (/lib64 -> usr/lib64).
func (p *Profile) addLibraries(binary string) {
	dirs := slices.Clone(libraryDirs)
	if prefix := filepath.Dir(filepath.Dir(binary)); prefix != "/" { // /lib is below
		dirs = append(dirs, filepath.Join(prefix, "lib"), filepath.Join(prefix, "lib64"))
	}
	for _, store := range storeDirs {
		if strings.HasPrefix(binary, store+"/") {
			dirs = append(dirs, store)
		}
	}
	for _, dir := range dirs {
		p.bindOnce(Bind{Source: dir, Exec: true, Optional: true})
	}
	for _, dir := range []string{"/lib", "/lib64"} {
		if to, err := os.Readlink(dir); err == nil {
			p.Links = append(p.Links, Link{Path: dir, To: to})
		} else {
			p.bindOnce(Bind{Source: dir, Exec: true, Optional: true})
		}
	}
}

// beside returns the directory name under the prefix of a binary in PREFIX/bin.
func beside(binary, name string) string {
	return filepath.Join(filepath.Dir(filepath.Dir(binary)), name)
}

// addInterpreter shows the dynamic loader if none of the library directories
// has it. A static binary, or a script's stand-in for QEMU, needs none.
func (p *Profile) addInterpreter(binary string) error {
	loader, err := interpreter(binary)
	if err != nil || loader == "" {
		return err
	}
	resolved, err := filepath.EvalSymlinks(loader)
	if err != nil {
		return err
	}
	if !p.shows(resolved) || !p.shows(loader) {
		p.bindOnce(Bind{Source: resolved, Target: loader, Exec: true})
	}
	return nil
}

// addOwnLibraries shows what msb itself needs to run: nothing, as it is built
// statically; its libraries, if somebody built it with cgo.
func (p *Profile) addOwnLibraries(msb string) error {
	loader, err := interpreter(msb)
	if err != nil || loader == "" {
		return err
	}
	p.addLibraries(msb)
	return p.addInterpreter(msb)
}

// interpreter returns the dynamic loader that a binary names, "" for a static
// one and for what is no ELF file.
func interpreter(binary string) (string, error) {
	f, err := elf.Open(binary)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			b, err := io.ReadAll(io.LimitReader(prog.Open(), unix.PathMax))
			return strings.TrimRight(string(b), "\x00"), err
		}
	}
	return "", nil
}

// shows tells whether path lies under a bind or a link of p.
func (p *Profile) shows(path string) bool {
	for _, b := range p.Binds {
		if path == b.target() || strings.HasPrefix(path, b.target()+"/") {
			return true
		}
	}
	for _, l := range p.Links {
		if strings.HasPrefix(path, l.Path+"/") {
			return true
		}
	}
	return false
}

// bindOnce adds b unless something with its target is there.
func (p *Profile) bindOnce(b Bind) {
	for _, have := range p.Binds {
		if have.target() == b.target() {
			return
		}
	}
	p.Binds = append(p.Binds, b)
}

// usableDevices returns those paths that this process can open for writing.
func usableDevices(paths ...string) []string {
	var usable []string
	for _, path := range paths {
		if fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err == nil {
			unix.Close(fd)
			usable = append(usable, path)
		}
	}
	return usable
}

// VMM confines one QEMU. It is used for one launch, or for one after the other.
type VMM struct {
	msb     string
	without []Measure
	user    *User
	lock    *os.File // holds user's id; inherited by QEMU
	launch  *Launch
}

// NewVMM prepares the confinement of one QEMU. Started by root it takes a uid
// of its own, which stays taken until Close and until QEMU has ended. without
// forces weaker paths.
func NewVMM(msb string, without ...Measure) (*VMM, error) {
	v := &VMM{msb: msb, without: without}
	if !Inspect().Less(without...).Privileged {
		return v, nil
	}
	r, err := uidRange()
	if err != nil {
		return nil, err
	}
	uid, lock, err := AcquireUID(uidLockDir, r)
	if err != nil {
		return nil, err
	}
	v.user, v.lock = &User{UID: uid, GID: uid}, lock
	return v, nil
}

// Launch makes the command for QEMU with these arguments, argv[0] being the
// path of its binary. files become its descriptors 3 and up, binds are host
// files that it may open for reading by their own paths. It has the signature
// of vmm/qemu's Options.Launch.
func (v *VMM) Launch(argv []string, files []*os.File, binds []string) (*exec.Cmd, error) {
	p, err := QEMU(argv[0], binds...)
	if err != nil {
		return nil, err
	}
	p.User, p.Without = v.user, v.without
	if v.user != nil {
		p.Rlimits = append(p.Rlimits, Rlimit{Resource: unix.RLIMIT_NPROC, Max: maxVMMThreads})
		files = append(append([]*os.File{}, files...), v.lock)
	} else if os.Geteuid() == 0 {
		p.Required = append(p.Required, PrivateRoot) // uid 0 owns root's files, capabilities or not
	}
	l, err := Prepare(v.msb, p, argv, files)
	if err != nil {
		return nil, err
	}
	if v.launch != nil {
		v.launch.Close()
	}
	v.launch = l
	return l.Cmd, nil
}

// maxVMMThreads bounds the threads of a QEMU with a uid of its own: virtual
// CPUs, 64 for block requests, and some.
const maxVMMThreads = 1024

// Outcome returns what could not be applied to the last launch, once QEMU is
// known to run or to have ended. The error says why it never became QEMU.
func (v *VMM) Outcome() ([]Finding, error) {
	if v.launch == nil {
		return nil, errdefs.New(errdefs.Internal, "QEMU was not launched")
	}
	return v.launch.Outcome()
}

// Close frees what belongs to the launch in this process; call it after the
// command has started and Outcome has been asked.
func (v *VMM) Close() {
	if v.launch != nil {
		v.launch.Close()
	}
	if v.lock != nil {
		_ = v.lock.Close()
	}
}
