package diskimg

import (
	"bytes"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	sector = 512
	// maxGap is how many zeroes are written, and so take space on the host, to
	// keep what is around them in one extent: the host allocates and frees extents
	// one by one.
	maxGap = 64 << 10
)

// extent is a part of an image; off and len(data) are in bytes. The extents of an image
// ascend and do not touch each other; between them are zeroes.
type extent struct {
	off  int64
	data []byte
}

// errTooMuch says that an image holds more than it may.
var errTooMuch = errors.New("more data than a template may have")

// readExtents reads what of an image is not zero, whole sectors, at most limit bytes.
func readExtents(f *os.File, limit int64) ([]extent, error) {
	var extents []extent
	buf := make([]byte, 64<<10)
	for at := int64(0); ; {
		off, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return extents, nil // only a hole follows
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		for off -= off % sector; off < end; {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), end-off)], off)
			if err != nil && !(errors.Is(err, io.EOF) && n > 0) {
				return nil, err
			}
			extents, limit = appendSectors(extents, limit, off, buf[:n])
			if limit < 0 {
				return nil, errTooMuch
			}
			off += int64(n)
		}
		at = end
	}
}

// appendSectors appends the sectors of b, which is at off, that are not zero, and
// returns what is left of the limit.
func appendSectors(extents []extent, limit, off int64, b []byte) ([]extent, int64) {
	var zeroes [sector]byte
	for len(b) > 0 {
		s := b[:min(sector, len(b))]
		if last := len(extents) - 1; bytes.Equal(s, zeroes[:len(s)]) {
		} else if limit -= int64(len(s)); last >= 0 && extents[last].end() == off {
			extents[last].data = append(extents[last].data, s...)
		} else {
			extents = append(extents, extent{off, bytes.Clone(s)})
		}
		off, b = off+int64(len(s)), b[len(s):]
	}
	return extents, limit
}

func (e extent) end() int64 { return e.off + int64(len(e.data)) }

// joined returns the extents of an image as larger ones that begin and end at a
// block, with what is zero between those that are near each other.
func joined(extents []extent, blockSize int64) []extent {
	var out []extent
	for i := 0; i < len(extents); {
		start := extents[i].off / blockSize * blockSize
		last := i
		for last+1 < len(extents) && extents[last+1].off-extents[last].end() <= maxGap {
			last++
		}
		e := extent{start, make([]byte, (extents[last].end()+blockSize-1)/blockSize*blockSize-start)}
		for ; i <= last; i++ {
			copy(e.data[extents[i].off-start:], extents[i].data)
		}
		out = append(out, e)
	}
	return out
}

// writeExtents writes an image over zeroes. What lies beyond size is dropped: it can
// only be zeroes that fill the last block.
func writeExtents(f *os.File, extents []extent, size int64) error {
	for _, e := range extents {
		if _, err := f.WriteAt(e.data[:min(int64(len(e.data)), size-e.off)], e.off); err != nil {
			return err
		}
	}
	return nil
}
