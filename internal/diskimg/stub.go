package diskimg

import (
	"context"
	"os"
)

// MinSizeMiB is the smallest disk volume.
const MinSizeMiB = 4

// FormatOptions of FormatExt4; the zero value gives a random UUID and no label.
type FormatOptions struct{ UUID, Label string }

// FormatExt4 makes an empty ext4 file system in a new sparse file.
func FormatExt4(ctx context.Context, path string, sizeBytes int64, opt FormatOptions) error {
	panic("not yet")
}

// FormatOf guesses the image format from the extension: "qcow2", "vmdk", else "raw".
func FormatOf(path string) string { panic("not yet") }

// Identity is device, inode and birth time of a file.
type Identity struct {
	Dev, Ino uint64
	BirthNS  int64
}

// OpenRaw opens and locks a raw image.
func OpenRaw(path string, readonly bool) (*os.File, Identity, error) { panic("not yet") }
