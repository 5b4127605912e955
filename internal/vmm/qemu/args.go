package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
)

// firstFD is the number of the first inherited descriptor: 0 to 2 are the
// standard ones.
const firstFD = 3

// Limits of the machine.
const (
	mmioSlots    = 24 // virtio-mmio transports of microvm with ACPI (QEMU 7.2)
	fixedDevices = 2  // virtio-serial and balloon
	maxSerial    = 20 // VIRTIO_BLK_ID_BYTES (virtio 1.2, 5.2.6.1)
	maxTag       = 36 // virtio 1.2, 5.11.4
	minMemoryMiB = 64
)

// DeviceSlots is how many disks and shares one machine can have.
const DeviceSlots = mmioSlots - fixedDevices

// builder collects arguments and the descriptors they refer to.
type builder struct {
	args  []string
	files []*os.File
	sets  int
}

func (b *builder) add(args ...string) { b.args = append(b.args, args...) }

// inherit passes a descriptor on and returns its number in QEMU.
func (b *builder) inherit(f *os.File) int {
	b.files = append(b.files, f)
	return firstFD + len(b.files) - 1
}

// fdset passes a descriptor on in a set of its own and returns the name under
// which QEMU opens it: no path is ever opened.
func (b *builder) fdset(f *os.File) string {
	b.sets++
	b.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", b.inherit(f), b.sets))
	return fmt.Sprintf("/dev/fdset/%d", b.sets)
}

// check refuses what QEMU would refuse less clearly.
func check(c *vmm.Config) error {
	if n := len(c.Disks) + len(c.Shares); n > DeviceSlots {
		return errdefs.New(errdefs.InvalidConfig, "%d disks and virtiofs mounts: one machine has %d device slots", n, DeviceSlots).
			WithHint("mount fewer volumes, or one directory that holds several")
	}
	if c.CPUs < 1 || c.MemoryMiB < minMemoryMiB {
		return errdefs.New(errdefs.InvalidConfig, "%d CPUs and %d MiB of memory: at least 1 and %d are needed", c.CPUs, c.MemoryMiB, minMemoryMiB)
	}
	if !plainID(c.ID, 64) || c.Agent == nil {
		return errdefs.New(errdefs.Internal, "machine %q without a usable id or an agent link", c.ID)
	}
	seen := map[string]bool{}
	for _, d := range c.Disks {
		if !plainID(d.Serial, maxSerial) || seen[d.Serial] || d.Format != "raw" || d.File == nil {
			return errdefs.New(errdefs.Internal, "disk %q of format %q", d.Serial, d.Format)
		}
		seen[d.Serial] = true
	}
	clear(seen)
	for _, s := range c.Shares {
		if !plainID(s.Tag, maxTag) || seen[s.Tag] || s.Conn == nil {
			return errdefs.New(errdefs.Internal, "virtiofs tag %q", s.Tag)
		}
		seen[s.Tag] = true
	}
	return nil
}

// plainID reports whether s is 1 to limit bytes none of which means anything to
// QEMU's option parser: a comma would begin another option.
func plainID(s string, limit int) bool {
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
		default:
			return false
		}
	}
	return s != "" && len(s) <= limit
}

// ends are QEMU's ends of the connections it has with the machine itself.
type ends struct{ monitor, console *os.File }

// commandLine returns QEMU's arguments and the descriptors it inherits from
// number 3 on. tscKHz is only needed by TCG.
func commandLine(c *vmm.Config, binary string, accel vmm.Accel, e ends, tscKHz int) ([]string, []*os.File) {
	b := &builder{args: []string{binary}}
	b.add("-name", "msb-"+c.ID, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot")
	b.add("-M", "microvm,memory-backend=mem,x-option-roms=off,isa-serial=on")
	if accel == vmm.AccelKVM {
		b.add("-accel", "kvm", "-cpu", "host")
	} else {
		b.add("-accel", "tcg,thread=multi", "-cpu", "max")
	}
	b.add("-smp", strconv.Itoa(c.CPUs), "-m", strconv.Itoa(c.MemoryMiB))
	b.add("-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", c.MemoryMiB))
	b.add("-global", "virtio-mmio.force-legacy=false")
	b.add("-kernel", c.Kernel.Image, "-initrd", c.Kernel.Initrd, "-append", kernelLine(c, accel, tscKHz))
	// Not a file: the guest could fill the host's disk with what it prints.
	b.add("-chardev", fmt.Sprintf("socket,id=con,fd=%d", b.inherit(e.console)), "-serial", "chardev:con")
	b.add("-chardev", fmt.Sprintf("socket,id=mon,fd=%d", b.inherit(e.monitor)), "-mon", "chardev=mon,mode=control")
	b.add("-device", "virtio-serial-device,max_ports=2")
	b.add("-chardev", fmt.Sprintf("socket,id=agent,fd=%d", b.inherit(c.Agent)), "-device", "virtserialport,chardev=agent,name=msb.agent,nr=1")
	b.add("-device", "virtio-balloon-device,free-page-reporting=on")
	for i, d := range c.Disks {
		b.disk(i, d)
	}
	for i, s := range c.Shares {
		b.add("-chardev", fmt.Sprintf("socket,id=fs%d,fd=%d", i, b.inherit(s.Conn)))
		b.add("-device", fmt.Sprintf("vhost-user-fs-device,chardev=fs%d,tag=%s,queue-size=1024", i, s.Tag))
	}
	b.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	b.files = append(b.files, c.Inherit...)
	return b.args, b.files
}

// disk adds a virtio-blk device on an open raw image. The driver is named, so
// that the image's content is never probed; discard punches holes, flushes reach
// the disk.
func (b *builder) disk(i int, d vmm.Disk) {
	onOff := func(v bool) string {
		if v {
			return "on"
		}
		return "off"
	}
	path := b.fdset(d.File)
	b.add("-blockdev", fmt.Sprintf("driver=raw,node-name=d%d,read-only=%s,discard=unmap,cache.direct=off,cache.no-flush=off,file.driver=file,file.filename=%s,file.locking=on,file.discard=unmap",
		i, onOff(d.Readonly), path))
	b.add("-device", fmt.Sprintf("virtio-blk-device,drive=d%d,serial=%s,discard=%s,write-zeroes=%s", i, d.Serial, onOff(!d.Readonly), onOff(!d.Readonly)))
}

// kernelLine is the guest kernel's command line. Without tsc_early_khz a microvm
// under TCG hangs at TSC calibration: it has neither PIT nor HPET. Without
// tsc=reliable one with several CPUs distrusts the TSC and counts ticks, of which
// a busy host loses many: its clock goes slow. TCG's CPUs all read the host's.
func kernelLine(c *vmm.Config, accel vmm.Accel, tscKHz int) string {
	words := []string{"console=ttyS0", "quiet", "reboot=t", "panic=-1", "pci=off", "rcupdate.rcu_expedited=1"}
	if accel == vmm.AccelTCG && tscKHz > 0 {
		words = append(words, "tsc_early_khz="+strconv.Itoa(tscKHz), "tsc=reliable")
	}
	if c.CPUs == 1 {
		words = append(words, "noreplace-smp")
	}
	words = append(words, c.Kernel.Cmdline...)
	if spec := agentFailpoints(os.Getenv(failpoint.EnvVar)); spec != "" {
		words = append(words, "msb.failpoint="+spec)
	}
	return strings.Join(words, " ")
}

// agentFailpoints keeps the fail points of the agent: it has no environment but
// the kernel's command line.
func agentFailpoints(spec string) string {
	var out []string
	for _, part := range strings.Split(spec, ";") {
		if strings.HasPrefix(part, "agent.") && !strings.ContainsAny(part, " \t\"") {
			out = append(out, part)
		}
	}
	return strings.Join(out, ";")
}
