package image

import (
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// limits bound what an archive of a stranger can make us do. Tests lower them.
type limits struct {
	entries    int   // tar entries over all layers, and names they imply
	meta       int64 // bytes of names, link targets and attributes held in memory
	path       int   // bytes of one path, as resolved
	target     int   // bytes of one symbolic link
	layers     int   // layers of one image
	unpacked   int64 // bytes over all layers, holes counted
	ratio      int64 // unpacked bytes for each byte of the blobs ...
	ratioFloor int64 // ... beyond this many, which any image may have
	manifest   int64 // bytes of a manifest, an index or a configuration
	reserve    int64 // bytes left free on the file system of the home
}

var defaultLimits = limits{
	entries:    1_000_000,
	meta:       256 << 20,
	path:       4096,
	target:     4095,
	layers:     128,
	unpacked:   32 << 30,
	ratio:      200,
	ratioFloor: 64 << 20,
	manifest:   4 << 20,
	reserve:    64 << 20,
}

// budget counts one image against the limits.
type budget struct {
	limits
	compressed int64 // bytes of all blobs of the image
	used       int64
	count      int
}

func (b *budget) addBytes(n int64) error {
	if n < 0 || n > b.unpacked-b.used {
		return tooLarge("image unpacks to more than %d bytes", b.unpacked)
	}
	b.used += n
	if b.used > b.ratioFloor && b.used/b.ratio > b.compressed {
		return tooLarge("image unpacks to more than %d times its %d bytes", b.ratio, b.compressed)
	}
	return nil
}

func (b *budget) addEntry() error {
	if b.count++; b.count > b.entries {
		return tooLarge("image has more than %d entries", b.entries)
	}
	return nil
}

func tooLarge(format string, args ...any) error {
	return errdefs.New(errdefs.InvalidArgument, format, args...)
}
