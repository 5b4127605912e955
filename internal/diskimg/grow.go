package diskimg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Lengthen makes an image longer, sparsely, and syncs that. The file system in it
// keeps its size until a kernel has mounted it: growing it from outside
// (resize2fs) is not safe against a kill. The image must be held by the caller.
//
// After a crash the image has its old or its new length. Errors: InvalidConfig
// for a size that the file system cannot reach or the host's file system cannot
// hold; IO.
func Lengthen(image *os.File, sizeBytes int64) error {
	most, err := mostExt4(image)
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "read the disk image")
	}
	if sizeBytes > most {
		return errdefs.New(errdefs.InvalidConfig, "%d MiB are more than the file system in it can have: %d MiB", sizeBytes/mib, most/mib)
	}
	if err := image.Truncate(sizeBytes); err != nil {
		if errors.Is(err, unix.EFBIG) {
			return errdefs.Wrap(errdefs.InvalidConfig, err, "%d MiB are more than a file may have in %s", sizeBytes/mib, image.Name())
		}
		return fmt.Errorf("lengthen the disk image: %w", err)
	}
	if err := image.Sync(); err != nil {
		return fmt.Errorf("sync the disk image: %w", err)
	}
	return nil
}

// mostExt4 is how many bytes the ext4 file system in an image can grow to: inode
// numbers have 32 bits and each block group has its share. A guest may have
// written anything there: what is no ext4 file system has no limit here, and
// nothing but this comparison depends on it.
func mostExt4(image io.ReaderAt) (int64, error) {
	const magic, maxLogBlockSize = 0xef53, 6
	sb := make([]byte, 1024)
	if n, err := image.ReadAt(sb, 1024); n < len(sb) {
		if err == io.EOF {
			err = nil
		}
		return math.MaxInt64, err
	}
	le := binary.LittleEndian
	logSize, perGroup, inodes := le.Uint32(sb[0x18:]), int64(le.Uint32(sb[0x20:])), int64(le.Uint32(sb[0x28:]))
	if le.Uint16(sb[0x38:]) != magic || logSize > maxLogBlockSize || perGroup == 0 || perGroup > 8<<(10+logSize) || inodes == 0 {
		return math.MaxInt64, nil
	}
	return (math.MaxUint32 / inodes) * perGroup << (10 + logSize), nil
}
