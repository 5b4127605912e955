package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// loopDisk is a loop device on a file in memory that takes one disk image after
// another. The device goes when its last user is gone, whatever happens.
type loopDisk struct {
	back   *os.File
	bytes  []byte // back, mapped
	device *os.File
}

// newLoopDisk makes a device on a file of dir. Errors say what is missing.
func newLoopDisk(dir string) (_ *loopDisk, err error) {
	d := &loopDisk{}
	if d.back, err = os.CreateTemp(dir, "disk-"); err != nil {
		return nil, err
	}
	_ = os.Remove(d.back.Name())
	if err := d.back.Truncate(diskBytes); err != nil {
		return nil, err
	}
	if d.bytes, err = unix.Mmap(int(d.back.Fd()), 0, diskBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, err
	}
	if err := d.attach(); err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	return d, nil
}

// attach takes a free device. Between asking for one and taking it, somebody
// else may have been faster.
func (d *loopDisk) attach() error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return err
		}
		if d.device, err = os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0); err != nil {
			return err
		}
		config := unix.LoopConfig{Fd: uint32(d.back.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(d.device.Fd()), &config); err == nil {
			return nil
		}
		d.device.Close()
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return unix.EBUSY
}

// load makes the device hold an image. It must not be mounted.
func (d *loopDisk) load(image []byte) error {
	const page = 4096
	for at := 0; at < len(image); at += page {
		if want, have := image[at:at+page], d.bytes[at:at+page]; !bytes.Equal(want, have) {
			copy(have, want)
		}
	}
	return unix.IoctlSetInt(int(d.device.Fd()), unix.BLKFLSBUF, 0)
}

// mounted calls fn while the device is mounted.
func (d *loopDisk) mounted(at, kind string, fn func()) (err error) {
	if kind == "btrfs" {
		forgetDevices()
	}
	if err := unix.Mount(d.device.Name(), at, kind, unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(at, 0)) }()
	fn()
	return nil
}

// forgetDevices makes btrfs forget the disks that are not mounted: an older
// state of a disk that it knows is refused.
func forgetDevices() {
	const forget = 0x50009405 // BTRFS_IOC_FORGET_DEV of linux/btrfs.h
	f, err := os.OpenFile("/dev/btrfs-control", os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	var args [4096]byte // struct btrfs_ioctl_vol_args without a name: all
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), forget, uintptr(unsafe.Pointer(&args)))
}
