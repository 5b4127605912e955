package qemu

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KVM ioctls (Linux include/uapi/linux/kvm.h).
const (
	kvmGetAPIVersion       = 0xAE00
	kvmCreateVM            = 0xAE01
	kvmGetVCPUMmapSize     = 0xAE04
	kvmCreateVCPU          = 0xAE41
	kvmRun                 = 0xAE80
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmSetRegs             = 0x4090AE82
	kvmGetSregs            = 0x8138AE83
	kvmSetSregs            = 0x4138AE84

	kvmAPIVersion     = 12
	kvmExitIO         = 2
	exitReasonOffset  = 8  // struct kvm_run.exit_reason
	suberrorOffset    = 32 // struct kvm_run.internal.suberror
	probeMemory       = 1 << 20
	probeSlow         = 5 * time.Millisecond
	sregsSize         = 0x138
	regsSize          = 0x90
	segmentSize       = 24
	offCS             = 0
	offDS             = 1 * segmentSize
	offCR0            = 0xe0
	offCR3            = offCR0 + 16
	offCR4            = offCR0 + 24
	offEFER           = offCR0 + 40
	probeEntry        = 0x1000
	probePML4         = 0x2000
	probePDPT         = 0x3000
	probePD           = 0x4000
	probeOperand      = 0x6000
	probeStack        = 0x8000
	probeLoop         = 2000
	pagePresentWrite  = 3
	pageLarge         = 0x80
	cr0LongMode       = 0x80050033 // PE MP ET NE WP AM PG
	cr4LongMode       = 0x220      // PAE OSFXSR
	eferLongMode      = 0x500      // LME LMA
	rflagsReserved    = 2
	segmentCode       = 11
	segmentData       = 3
	offSegType        = 14
	offSegPresent     = 15
	offSegDB          = 17
	offSegS           = 18
	offSegL           = 19
	offSegG           = 20
	regRCX, regRSI    = 2 * 8, 4 * 8
	regRSP, regRIP    = 6 * 8, 16 * 8
	regRFLAGS         = 17 * 8
	offSegSelector    = 12
	selectorCode      = 8
	selectorData      = 16
	segmentLimit      = 0xffffffff
	offSegLimit       = 8
	dataSegmentsCount = 5
)

// probeCode loops, then uses instructions that hosts with an instruction
// interpreter for KVM do not know, and says 'K' on port 0x80.
var probeCode = []byte{
	0xff, 0xc9, 0x75, 0xfc, // dec ecx; jnz -4
	0x0f, 0x57, 0xc0, // xorps xmm0, xmm0
	0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]
	0xb0, 0x4b, 0xe6, 0x80, // mov al, 'K'; out 0x80, al
	0xf4, // hlt
}

// ProbeMain is the probe's process: it prints a Probe as JSON.
func ProbeMain([]string) int {
	runtime.LockOSThread()
	p := Probe{}
	took, err := runProbe()
	switch {
	case err != nil:
		p.Reason = err.Error()
	case took > probeSlow:
		p.Reason = fmt.Sprintf("guest code is interpreted: %d instructions took %s", 2*probeLoop, took)
	default:
		p.Usable, p.Reason = true, "a 64-bit program ran"
	}
	p.Took = took
	if json.NewEncoder(os.Stdout).Encode(p) != nil {
		return 1
	}
	return 0
}

func runProbe() (time.Duration, error) {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("/dev/kvm: %w", err)
	}
	defer unix.Close(kvm)
	if v, err := ioctl(kvm, kvmGetAPIVersion, 0); err != nil || v != kvmAPIVersion {
		return 0, fmt.Errorf("KVM API version %d, want %d: %w", v, kvmAPIVersion, errors.Join(err))
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0)
	if err != nil {
		return 0, fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	defer unix.Close(vm)
	mem, err := unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, err
	}
	fillMemory(mem)
	region := struct {
		slot, flags       uint32
		gpa, size, hostVA uint64
	}{size: probeMemory, hostVA: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return 0, fmt.Errorf("KVM_SET_USER_MEMORY_REGION: %w", err)
	}
	return runVCPU(kvm, vm)
}

func runVCPU(kvm, vm int) (time.Duration, error) {
	vcpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return 0, fmt.Errorf("KVM_CREATE_VCPU: %w", err)
	}
	defer unix.Close(vcpu)
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return 0, err
	}
	run, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	if err := setRegisters(vcpu); err != nil {
		return 0, err
	}
	began := time.Now()
	for {
		_, err = ioctl(vcpu, kvmRun, 0)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	took := time.Since(began)
	if err != nil {
		return took, fmt.Errorf("KVM_RUN: %w", err)
	}
	if reason := binary.NativeEndian.Uint32(run[exitReasonOffset:]); reason != kvmExitIO {
		return took, fmt.Errorf("a 64-bit guest stops with exit reason %d, suberror %d", reason, binary.NativeEndian.Uint32(run[suberrorOffset:]))
	}
	return took, nil
}

// fillMemory puts the program and one identity-mapped 2 MiB page into the guest.
func fillMemory(mem []byte) {
	copy(mem[probeEntry:], probeCode)
	binary.NativeEndian.PutUint64(mem[probePML4:], probePDPT|pagePresentWrite)
	binary.NativeEndian.PutUint64(mem[probePDPT:], probePD|pagePresentWrite)
	binary.NativeEndian.PutUint64(mem[probePD:], pageLarge|pagePresentWrite)
}

func setRegisters(vcpu int) error {
	var s [sregsSize]byte
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&s[0]))); err != nil {
		return fmt.Errorf("KVM_GET_SREGS: %w", err)
	}
	setSegment(s[offCS:], segmentCode, selectorCode, 0, 1)
	for i := range dataSegmentsCount {
		setSegment(s[offDS+i*segmentSize:], segmentData, selectorData, 1, 0)
	}
	binary.NativeEndian.PutUint64(s[offCR0:], cr0LongMode)
	binary.NativeEndian.PutUint64(s[offCR3:], probePML4)
	binary.NativeEndian.PutUint64(s[offCR4:], cr4LongMode)
	binary.NativeEndian.PutUint64(s[offEFER:], eferLongMode)
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&s[0]))); err != nil {
		return fmt.Errorf("KVM_SET_SREGS: %w", err)
	}
	var r [regsSize]byte
	for off, v := range map[int]uint64{regRIP: probeEntry, regRFLAGS: rflagsReserved, regRSP: probeStack, regRCX: probeLoop, regRSI: probeOperand} {
		binary.NativeEndian.PutUint64(r[off:], v)
	}
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&r[0]))); err != nil {
		return fmt.Errorf("KVM_SET_REGS: %w", err)
	}
	return nil
}

// setSegment fills a struct kvm_segment with a flat segment.
func setSegment(b []byte, kind byte, selector uint16, db, long byte) {
	clear(b[:segmentSize])
	binary.NativeEndian.PutUint32(b[offSegLimit:], segmentLimit)
	binary.NativeEndian.PutUint16(b[offSegSelector:], selector)
	b[offSegType], b[offSegPresent], b[offSegDB], b[offSegS], b[offSegL], b[offSegG] = kind, 1, db, 1, long, 1
}

func ioctl(fd int, req, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
