// Package writelog reads what QEMU's block driver blklogwrites recorded of a
// disk, and makes the disk as a loss of power at any moment would leave it. It
// is a part of the power-cut test, by itself so that its fuzzing is fast.
package writelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The format is that of the kernel's dm-log-writes (Linux
// Documentation/admin-guide/device-mapper/log-writes.rst), which QEMU's
// blklogwrites shares: a super block, then entries of a header and their data,
// all in units of a sector, little endian.
const (
	logMagic   = 0x6a736677736872
	logVersion = 1

	flagFlush   = 1 << 0
	flagFUA     = 1 << 1
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
	flagAll     = flagFlush | flagFUA | flagDiscard | flagMark

	superBytes  = 28
	headerBytes = 32
	minSector   = 512
	maxSector   = 64 << 10
)

// errLog is matched by every error of [Parse].
var errLog = errors.New("write log")

// Entry is one thing that a disk completed: a flush, a write, a discard or a
// mark. A flush with data flushes first.
type Entry struct {
	Offset int64 // bytes from the start of the disk
	Length int64 // bytes
	Data   []byte

	Flush   bool
	FUA     bool // on the disk for good when completed
	Discard bool // Length bytes at Offset read as zeros; no Data
	Mark    bool // Data is a note, not a write
}

// Writes reports whether an entry changes the disk.
func (e *Entry) Writes() bool { return e.Length > 0 && !e.Mark }

// Parse reads a log of writes to a disk of diskBytes. The entries share
// memory with b. A log that was cut short, or that names anything outside the
// disk, is an error.
func Parse(b []byte, diskBytes int64) ([]Entry, error) {
	if len(b) < superBytes {
		return nil, fmt.Errorf("%w: %d bytes are no super block", errLog, len(b))
	}
	le := binary.LittleEndian
	if magic, version := le.Uint64(b), le.Uint64(b[8:]); magic != logMagic || version != logVersion {
		return nil, fmt.Errorf("%w: magic %#x, version %d", errLog, magic, version)
	}
	count, sector := le.Uint64(b[16:]), int64(le.Uint32(b[24:]))
	if sector < minSector || sector > maxSector || sector&(sector-1) != 0 {
		return nil, fmt.Errorf("%w: sectors of %d bytes", errLog, sector)
	}
	if count > uint64(len(b))/uint64(sector) { // each entry has a sector of its own
		return nil, fmt.Errorf("%w: %d entries in %d bytes", errLog, count, len(b))
	}
	entries := make([]Entry, 0, count)
	for at := sector; len(entries) < cap(entries); {
		e, used, err := parseEntry(b, at, sector, diskBytes)
		if err != nil {
			return nil, fmt.Errorf("%w: entry %d: %w", errLog, len(entries), err)
		}
		entries = append(entries, e)
		at += used
	}
	return entries, nil
}

// parseEntry reads the entry at an offset of the log, and says how many bytes
// it takes there.
func parseEntry(b []byte, at, sector, diskBytes int64) (e Entry, used int64, err error) {
	if at > int64(len(b))-sector {
		return e, 0, errors.New("cut short")
	}
	le, head := binary.LittleEndian, b[at:at+headerBytes]
	start, sectors, flags, noteBytes := le.Uint64(head), le.Uint64(head[8:]), le.Uint64(head[16:]), le.Uint64(head[24:])
	disk := uint64(diskBytes / sector)
	if flags&^flagAll != 0 || start > disk || sectors > disk-start || noteBytes > math.MaxInt32 {
		return e, 0, fmt.Errorf("flags %#x, %d sectors at %d, note of %d bytes", flags, sectors, start, noteBytes)
	}
	e = Entry{
		Offset: int64(start) * sector, Length: int64(sectors) * sector,
		Flush: flags&flagFlush != 0, FUA: flags&flagFUA != 0, Discard: flags&flagDiscard != 0, Mark: flags&flagMark != 0,
	}
	if e.Discard {
		return e, sector, nil
	}
	data := e.Length
	if e.Mark {
		data = int64(noteBytes)
	}
	used = sector + (data+sector-1)&^(sector-1)
	if used > int64(len(b))-at && data > int64(len(b))-at-sector { // the last one need not be padded
		return e, 0, errors.New("cut short")
	}
	e.Data = b[at+sector : at+sector+data]
	return e, used, nil
}
