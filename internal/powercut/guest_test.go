package powercut

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox"
	"github.com/microsandbox-go/microsandbox/internal/kernel"
	"github.com/microsandbox-go/microsandbox/internal/powercut/writelog"
)

// The guest's side: this test binary as PID 1.

const (
	guestMount = "/mnt"
	guestHome  = guestMount + "/home"
	guestMSB   = "/bin/msb"

	seedWord  = "powercut_seed="
	stepsWord = "powercut_steps="
	fsWord    = "powercut_fs="

	doneLine = "powercut: done"
)

// The disk: a file system, and behind it the block that acknowledges.
const (
	fsBytes   = 96 << 20
	ackOffset = fsBytes
	ackBytes  = 4096
	diskBytes = fsBytes + 1<<20
)

// ackMagic begins the block that says how many steps have returned.
const ackMagic = "msb power cut: acknowledged "

// guestMain is PID 1. It says on the console how it went and powers off.
func guestMain() {
	if err := guestRun(); err != nil {
		fmt.Println("powercut: error:", err)
	} else {
		fmt.Println(doneLine)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func guestRun() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	words, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	seed, n, fsys := uint64(0), 0, ""
	for _, w := range strings.Fields(string(words)) {
		if v, ok := strings.CutPrefix(w, seedWord); ok {
			seed, err = strconv.ParseUint(v, 10, 64)
		} else if v, ok := strings.CutPrefix(w, stepsWord); ok {
			n, err = strconv.Atoi(v)
		} else if v, ok := strings.CutPrefix(w, fsWord); ok {
			fsys = v
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w, err)
		}
	}
	if err := loadModules(fileSystems[fsys].modules...); err != nil {
		return err
	}
	if err := delayWrites(fileSystems[fsys]); err != nil {
		return err
	}
	return carryOut(newPlan(seed, n))
}

// fileSystem is one for the home's disk, mounted so that nothing reaches the
// disk before somebody syncs.
type fileSystem struct {
	kind    string // as mount(2) takes it
	options string
	modules []string
	tear    int64 // what it trusts a disk to write whole
	whole   int64 // and all of this at the disk's beginning
}

// superblock is where ext4's ends. It has 1024 bytes with one checksum, and a half of
// it that is missing makes the file system one that cannot be mounted.
const superblock = 4096

var fileSystems = map[string]fileSystem{
	// An fsync of any file commits the whole journal. Data is written before the
	// metadata that names it, but not because a file is renamed over another.
	"ext4": {"ext4", "commit=300,noauto_da_alloc,errors=panic", nil, 512, superblock},
	// The same, but data is written in no order to metadata.
	"ext4-writeback": {"ext4", "commit=300,noauto_da_alloc,errors=panic,data=writeback", nil, 512, superblock},
	// An fsync makes one file durable and little else.
	"btrfs": {"btrfs", "commit=300", []string{"zstd_compress", "raid6_pq", "xor", "libcrc32c", "btrfs"}, 4096, 0},
}

// loadModules loads what the kernel needs for the disk; see kernel.ModuleDir.
func loadModules(more ...string) error {
	for _, name := range append([]string{"virtio_ring", "virtio", "virtio_mmio", "virtio_blk"}, more...) {
		f, err := os.Open(filepath.Join(kernel.ModuleDir, name+".ko"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // built in
		}
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", name, err)
		}
		f.Close()
	}
	return nil
}

// delayWrites mounts the home's disk; the kernel writes nothing back by itself.
func delayWrites(f fileSystem) error {
	for name, value := range map[string]string{
		"dirty_writeback_centisecs": "0", "dirty_expire_centisecs": "1000000", "dirty_background_ratio": "90", "dirty_ratio": "95",
	} {
		if err := os.WriteFile("/proc/sys/vm/"+name, []byte(value), 0); err != nil {
			return err
		}
	}
	for end := time.Now().Add(10 * time.Second); ; { // the device comes when its driver has found it
		if _, err := os.Stat("/dev/vda"); err == nil || time.Now().After(end) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return unix.Mount("/dev/vda", guestMount, f.kind, unix.MS_NOATIME, f.options)
}

// carryOut does one step after the other, each acknowledged before the next.
func carryOut(p plan) error {
	acks, err := newAcknowledger()
	if err != nil {
		return err
	}
	b, err := microsandbox.NewLocalBackend(guestHome)
	if err != nil {
		return err
	}
	d := &doer{b: b, p: p}
	if _, err := os.Stat(guestMSB); err == nil {
		d.msb = guestMSB
	}
	for _, s := range p.steps {
		began := time.Now()
		if err := d.do(s); err != nil {
			return fmt.Errorf("step %s: %w", s, err)
		}
		fmt.Printf("powercut: %s: %d ms\n", s, time.Since(began).Milliseconds())
		if err := acks.say(s.seq); err != nil {
			return fmt.Errorf("acknowledge: %w", err)
		}
	}
	return b.Close()
}

// acknowledger writes to the disk's last blocks, past every cache and without a
// flush. The write is on its own when it is made: everything before it has
// returned, nothing after it has begun.
type acknowledger struct {
	disk  int
	block []byte // aligned, as O_DIRECT wants it
}

func newAcknowledger() (*acknowledger, error) {
	fd, err := unix.Open("/dev/vda", unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	block, err := unix.Mmap(-1, 0, ackBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return &acknowledger{fd, block}, err
}

func (a *acknowledger) say(step int) error {
	clear(a.block)
	copy(a.block, ackMagic+strconv.Itoa(step))
	_, err := unix.Pwrite(a.disk, a.block, ackOffset)
	return err
}

// acknowledged returns for each entry of a log how many steps had returned when
// it was made.
func acknowledged(log []writelog.Entry) ([]int, error) {
	out, last := make([]int, len(log)+1), 0
	for i := range log {
		out[i] = last
		if e := &log[i]; e.Offset >= ackOffset && e.Writes() {
			text, ok := bytes.CutPrefix(bytes.TrimRight(e.Data, "\x00"), []byte(ackMagic))
			n, err := strconv.Atoi(string(text))
			if !ok || err != nil || n != last+1 {
				return nil, fmt.Errorf("entry %d of the log: after step %d came %q", i, last, text)
			}
			last = n
		}
	}
	out[len(log)] = last
	return out, nil
}

// doer carries out steps, by the library or by the msb command.
type doer struct {
	b   *microsandbox.LocalBackend
	p   plan
	msb string // "" without the command
}

func (d *doer) do(s step) error {
	if s.kind == "adopt" {
		if err := d.makeStranger(s); err != nil {
			return err
		}
	}
	if s.command && d.msb != "" {
		return d.command(s)
	}
	ctx := context.Background()
	switch s.kind {
	case "write", "stream", "copy", "move", "delete":
		h, err := d.b.GetVolume(ctx, s.name)
		if err != nil {
			return err
		}
		return d.fileStep(ctx, h.FS(), s)
	}
	return d.volumeStep(ctx, s)
}

func labelsOf(s step) map[string]string {
	return map[string]string{"made": strconv.Itoa(s.seq), "tag": "0", "group": groupOf(s)}
}

func (d *doer) volumeStep(ctx context.Context, s step) error {
	var err error
	switch s.kind {
	case "create":
		_, err = d.b.CreateVolume(ctx, microsandbox.VolumeSpec{Name: s.name, Labels: labelsOf(s)})
	case "create-disk":
		_, err = d.b.CreateVolume(ctx, microsandbox.VolumeSpec{Name: s.name, Labels: labelsOf(s), Kind: microsandbox.VolumeKindDisk, SizeMiB: diskMiB})
	case "adopt":
		_, err = d.b.AdoptVolume(ctx, s.name, microsandbox.VolumeAdoptOptions{Labels: labelsOf(s)})
	case "remove":
		err = d.b.RemoveVolume(ctx, s.name)
	case "rename":
		_, err = d.b.RenameVolume(ctx, s.name, s.to)
	case "label":
		var h *microsandbox.VolumeHandle
		if h, err = d.b.GetVolume(ctx, s.name); err == nil {
			_, err = h.UpdateLabels(ctx, map[string]string{"tag": strconv.Itoa(s.seq)})
		}
	case "prune":
		_, err = d.b.PruneVolumes(ctx, microsandbox.VolumePruneOptions{Labels: map[string]string{"group": s.to}})
	default:
		err = errors.New("unknown step")
	}
	return err
}

// diskMiB is the size of disk volumes.
const diskMiB = 4

func (d *doer) fileStep(ctx context.Context, fs *microsandbox.VolumeFs, s step) error {
	if s.durable {
		fs = fs.Durable()
	}
	switch s.kind {
	case "write":
		return fs.Write(ctx, s.path, content(s.seq, s.size))
	case "stream":
		sink, err := fs.WriteStream(ctx, s.path)
		if err != nil {
			return err
		}
		if _, err := io.Copy(sink, bytes.NewReader(content(s.seq, s.size))); err != nil {
			return err
		}
		return sink.Close()
	case "copy":
		return fs.Copy(ctx, s.path, s.pathTo)
	case "move":
		return fs.Rename(ctx, s.path, s.pathTo)
	}
	return fs.Remove(ctx, s.path)
}

// makeStranger puts a directory with a synced file at a volume's place.
func (d *doer) makeStranger(s step) error {
	dir := filepath.Join(guestHome, "volumes", s.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "old"))
	if err != nil {
		return err
	}
	_, err = f.Write(content(s.seq, s.size))
	return errors.Join(err, f.Sync(), f.Close())
}

// command carries out a step by msb.
func (d *doer) command(s step) error {
	args := []string{"volume"}
	var stdin []byte
	label := func() {
		for k, v := range labelsOf(s) {
			args = append(args, "--label", k+"="+v)
		}
	}
	switch s.kind {
	case "create", "adopt":
		args = append(args, s.kind, s.name)
		label()
	case "create-disk":
		args = append(args, "create", s.name, "--kind", "disk", "--size", strconv.Itoa(diskMiB))
		label()
	case "remove":
		args = append(args, "rm", s.name)
	case "rename":
		args = append(args, "rename", s.name, s.to)
	case "label":
		args = append(args, "label", s.name, "tag="+strconv.Itoa(s.seq))
	case "prune":
		args = append(args, "prune", "--label", "group="+s.to)
	case "write", "stream":
		args, stdin = append(args, "fs", "write", s.name, s.path), content(s.seq, s.size)
	case "copy":
		args = append(args, "fs", "cp", s.name, s.path, s.pathTo)
	case "move":
		args = append(args, "fs", "mv", s.name, s.path, s.pathTo)
	case "delete":
		args = append(args, "fs", "rm", s.name, s.path)
	}
	if s.durable && (s.kind == "write" || s.kind == "stream") {
		args = append(args, "--durable")
	}
	cmd := exec.Command(d.msb, args...)
	cmd.Env = []string{"MSB_HOME=" + guestHome, "HOME=/root", "PATH=/bin:/usr/sbin"}
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("msb %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
