package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/failpoint"
)

// Instants at which tests end the machine.
var (
	pointSmaller = failpoint.New("agent.grow.smaller") // a file system is mounted and smaller than its disk
	pointStep    = failpoint.New("agent.grow.step")    // it has become larger, perhaps not for the last time
	pointGrown   = failpoint.New("agent.grow.grown")   // it fills its disk
)

const (
	// growPatience is how long a boot waits for file systems to grow. What is
	// left is done while programs run.
	growPatience = 5 * time.Second
	// growGroups is how much is asked of the kernel at once, in block groups. A
	// group takes an emulated guest a millisecond.
	growGroups = 512
)

// growth enlarges the file systems of volumes whose disks were made longer.
type growth struct {
	began time.Time // of the first
	stop  atomic.Bool
	left  sync.WaitGroup // file systems that still grow
}

// add makes the ext4 file system mounted at path as large as its device dev, or
// begins to. One that cannot grow is as good as before: the volume keeps its old
// size, the console says why, and the next mount tries again.
func (g *growth) add(dev, path string) {
	if g.began.IsZero() {
		g.began = time.Now()
	}
	fs, err := openExt4(dev, path)
	if err == nil {
		err = fs.grow(func() bool { return time.Since(g.began) > growPatience })
	}
	if err != errUnfinished {
		fs.close()
		fs.report(err)
		return
	}
	g.left.Add(1)
	go func() {
		defer g.left.Done()
		defer fs.close()
		fs.report(fs.grow(g.stop.Load))
	}()
}

// end waits until nothing grows any more. It stops what does; the next mount
// goes on with it.
func (g *growth) end() {
	g.stop.Store(true)
	g.left.Wait()
}

// ext4 is a mounted ext4 file system.
type ext4 struct {
	path      string
	root, dev *os.File
	blockSize uint64
	room      uint64 // blocks that the device has
}

func openExt4(dev, path string) (*ext4, error) {
	fs := &ext4{path: path}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return fs, err
	}
	if st.Bsize < 1024 || st.Bsize > 64<<10 {
		return fs, fmt.Errorf("it has blocks of %d bytes", st.Bsize)
	}
	var err error
	if fs.root, err = os.Open(path); err != nil {
		return fs, err
	}
	if fs.dev, err = os.Open(dev); err != nil {
		return fs, err
	}
	bytes, err := fs.dev.Seek(0, io.SeekEnd)
	fs.blockSize, fs.room = uint64(st.Bsize), uint64(bytes)/uint64(st.Bsize)
	return fs, err
}

func (fs *ext4) close() {
	for _, f := range []*os.File{fs.root, fs.dev} {
		if f != nil {
			f.Close()
		}
	}
}

func (fs *ext4) report(err error) {
	switch {
	case err == errUnfinished:
		logf("agent: volume on %s: the rest of its space comes when it is mounted again", fs.path)
	case err != nil:
		logf("agent: volume on %s keeps its size: %v", fs.path, err)
	}
}

// errUnfinished says that a file system could still grow.
var errUnfinished = errors.New("not grown to its end")

// grow enlarges the file system step by step, and asks enough between two of
// them. The kernel adds groups in transactions of the journal: whenever the
// machine ends there is a whole file system of some size up to the new one. Up
// to a group's tables (3 MiB) at the end are left alone when they would not fit.
func (fs *ext4) grow(enough func() bool) error {
	size, err := fs.size()
	if err != nil || size.blocks >= fs.room {
		return err
	}
	_ = pointSmaller.Hit()
	for size.blocks < fs.room {
		if enough() {
			return errUnfinished
		}
		if err := fs.resize(size.step(fs.room)); err != nil {
			return fmt.Errorf("from %d to %d blocks of %d bytes: %w", size.blocks, fs.room, fs.blockSize, err)
		}
		before := size.blocks
		if size, err = fs.size(); err != nil {
			return err
		}
		if size.blocks <= before { // the last bytes are of no use
			break
		}
		_ = pointStep.Hit()
	}
	_ = pointGrown.Hit()
	return nil
}

// resizeFS is EXT4_IOC_RESIZE_FS of linux/fs/ext4/ext4.h, _IOW('f', 16, __u64).
const resizeFS = 1<<30 | 8<<16 | 'f'<<8 | 16

func (fs *ext4) resize(blocks uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fs.root.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	if errno != 0 {
		return errno
	}
	return nil
}

// size reads the superblock. The kernel has accepted it, but the volume's last
// guest wrote it: it only says where to begin, and the kernel checks each step.
func (fs *ext4) size() (extSize, error) {
	sb := make([]byte, superSize)
	if _, err := fs.dev.ReadAt(sb, superOffset); err != nil {
		return extSize{}, err
	}
	return sizeOfExt4(sb), nil
}

// Place and size of the superblock of ext2, ext3 and ext4.
const (
	superOffset = 1024
	superSize   = 1024
)

// extSize is what a superblock says of a file system's size, in blocks.
type extSize struct {
	blocks, first, perGroup uint64
}

func sizeOfExt4(sb []byte) extSize {
	const incompat64bit = 0x80
	s := extSize{blocks: uint64(le32(sb, 0x4)), first: uint64(le32(sb, 0x14)), perGroup: uint64(le32(sb, 0x20))}
	if le32(sb, 0x60)&incompat64bit != 0 {
		s.blocks |= uint64(binary.LittleEndian.Uint32(sb[0x150:])) << 32
	}
	return s
}

// step is the next size to ask for: whole groups, so that none is extended
// twice, and at most room.
func (s extSize) step(room uint64) uint64 {
	if s.perGroup == 0 || s.blocks < s.first || s.blocks > room {
		return room
	}
	groups := (s.blocks-s.first)/s.perGroup + growGroups
	if groups > (room-s.first)/s.perGroup {
		return room
	}
	return s.first + groups*s.perGroup
}
