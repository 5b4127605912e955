package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
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
	for _, d := range c.Disks {
		if d.Serial == "" || len(d.Serial) > maxSerial || d.Format != "raw" {
			return errdefs.New(errdefs.Internal, "disk %q of format %q", d.Serial, d.Format)
		}
	}
	for _, s := range c.Shares {
		if s.Tag == "" || len(s.Tag) > maxTag {
			return errdefs.New(errdefs.Internal, "virtiofs tag %q", s.Tag)
		}
	}
	return nil
}

// commandLine returns QEMU's arguments and the descriptors it inherits from
// number 3 on. monitor is QEMU's end of the QMP connection. tscKHz is only
// needed by TCG.
func commandLine(c *vmm.Config, binary string, accel vmm.Accel, monitor *os.File, tscKHz int) ([]string, []*os.File) {
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
	b.add("-chardev", fmt.Sprintf("file,id=con,path=%s,append=on", b.fdset(c.Console)), "-serial", "chardev:con")
	b.add("-chardev", fmt.Sprintf("socket,id=mon,fd=%d", b.inherit(monitor)), "-mon", "chardev=mon,mode=control")
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
// under TCG hangs at TSC calibration: it has neither PIT nor HPET.
func kernelLine(c *vmm.Config, accel vmm.Accel, tscKHz int) string {
	words := []string{"console=ttyS0", "quiet", "reboot=t", "panic=-1", "rcupdate.rcu_expedited=1"}
	if accel == vmm.AccelTCG && tscKHz > 0 {
		words = append(words, "tsc_early_khz="+strconv.Itoa(tscKHz))
	}
	if c.CPUs == 1 {
		words = append(words, "noreplace-smp")
	}
	return strings.Join(append(words, c.Kernel.Cmdline...), " ")
}
