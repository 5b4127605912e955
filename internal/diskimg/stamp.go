package diskimg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
)

// errLayout says that a file system is not laid out as stamp knows it.
var errLayout = errors.New("not the layout of an empty file system of ours")

// Offsets and values of ext4's structures (Documentation/filesystems/ext4),
// of those that stamp needs.
const (
	superAt, superSize = 1024, 1024

	superBlocksLo   = 0x04
	superFirst      = 0x14 // block of the first group
	superLogSize    = 0x18
	superPerGroup   = 0x20
	superInodesPer  = 0x28
	superMagic      = 0x38
	superInodeSize  = 0x58
	superUUID       = 0x68
	superHashSeed   = 0xec
	superDescSize   = 0xfe
	superBlocksHi   = 0x150
	superCsum       = 0x3fc
	ext4Magic       = 0xef53
	descSize        = 64 // with the feature 64bit
	descFlags       = 0x12
	descCsum        = 0x1e
	inodesUnused    = 1 // flag: the group's inode bitmap is not in use
	blocksUnused    = 2 // flag: the group's block bitmap is not in use
	inodeSize       = 256
	inodeBlocks     = 0x28 // the root of the extent tree
	inodeGeneration = 0x64
	inodeCsumLo     = 0x7c
	inodeExtra      = 0x80
	inodeCsumHi     = 0x82
	extentMagic     = 0xf30a
	rootInode       = 2
	journalInode    = 8
	lastInode       = 11 // lost+found
	dirTailSize     = 12
	journalUUID     = 0x30
)

var (
	le         = binary.LittleEndian
	castagnoli = sync.OnceValue(func() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }) // not at every start
)

// crc continues ext4's crc32c, which is not inverted at its ends.
func crc(c uint32, parts ...[]byte) uint32 {
	for _, p := range parts {
		c = ^crc32.Update(^c, castagnoli(), p)
	}
	return c
}

// stamper gives an empty file system a UUID, on whose checksum all others of its
// metadata depend.
type stamper struct {
	extents   []extent // whole blocks
	uuid      [16]byte
	seed      uint32
	blockSize int64
	first     int64 // block
	perGroup  int64 // blocks
	inodesPer int64
	groups    int64
	err       error // the first
}

// blockSizeOf returns the size of the blocks of the file system in an image.
func blockSizeOf(extents []extent) (int64, error) {
	for _, e := range extents {
		if e.off > superAt || e.end() < superAt+superSize {
			continue
		}
		sb := e.data[superAt-e.off:]
		if log := le.Uint32(sb[superLogSize:]); le.Uint16(sb[superMagic:]) == ext4Magic && log <= 2 {
			return 1024 << log, nil
		}
	}
	return 0, errLayout
}

// stamp gives the empty file system in extents, which are whole blocks, a UUID,
// also as the seed of its directory hashes, and makes all checksums right. The
// result is what mkfs.ext4 makes when it is told that UUID: no template is used
// before that has been seen, see learn.
func stamp(extents []extent, uuid [16]byte) error {
	blockSize, err := blockSizeOf(extents)
	if err != nil {
		return err
	}
	s := &stamper{extents: extents, uuid: uuid, seed: crc(^uint32(0), uuid[:]), blockSize: blockSize}
	sb := s.bytes(superAt, superSize)
	s.first, s.perGroup = int64(le.Uint32(sb[superFirst:])), int64(le.Uint32(sb[superPerGroup:]))
	s.inodesPer = int64(le.Uint32(sb[superInodesPer:]))
	blocks := int64(le.Uint32(sb[superBlocksLo:])) + int64(le.Uint32(sb[superBlocksHi:]))<<32
	if le.Uint16(sb[superDescSize:]) != descSize || le.Uint16(sb[superInodeSize:]) != inodeSize ||
		s.perGroup != 8*blockSize || s.inodesPer > 8*blockSize || s.first > 1 || blocks <= s.first || blocks > maxTemplateSize/blockSize {
		return errLayout
	}
	s.groups = (blocks - s.first + s.perGroup - 1) / s.perGroup
	descs := s.descriptors()
	s.inodes(descs)
	s.supers(descs)
	return s.err
}

// find returns a part of the image, nil if that is not in one extent.
func (s *stamper) find(off, n int64) []byte {
	i, _ := slices.BinarySearchFunc(s.extents, off, func(e extent, off int64) int {
		if e.end() <= off {
			return -1
		}
		return 1
	})
	if i == len(s.extents) || s.extents[i].off > off || s.extents[i].end() < off+n {
		return nil
	}
	return s.extents[i].data[off-s.extents[i].off:][:n]
}

// bytes is find for what must be there.
func (s *stamper) bytes(off, n int64) []byte {
	b := s.find(off, n)
	if b == nil {
		s.fail("nothing at %d", off)
		return make([]byte, n)
	}
	return b
}

func (s *stamper) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("%w: %s", errLayout, fmt.Sprintf(format, args...))
	}
}

func (s *stamper) block(n int64) []byte { return s.bytes(n*s.blockSize, s.blockSize) }

// descriptors makes the checksums of the bitmaps and of the group descriptors
// behind the first superblock right, and returns the descriptors.
func (s *stamper) descriptors() []byte {
	descs := s.bytes((s.first+1)*s.blockSize, s.groups*descSize)
	for g := int64(0); g < s.groups && s.err == nil; g++ {
		d := descs[g*descSize:][:descSize]
		flags := le.Uint16(d[descFlags:])
		if flags&blocksUnused == 0 {
			s.bitmap(d, 0x00, 0x20, 0x18, 0x38, s.perGroup)
		}
		if flags&inodesUnused == 0 {
			s.bitmap(d, 0x04, 0x24, 0x1a, 0x3a, s.inodesPer)
		}
		sum := crc(s.seed, le.AppendUint32(nil, uint32(g)), d[:descCsum], []byte{0, 0}, d[descCsum+2:])
		le.PutUint16(d[descCsum:], uint16(sum))
	}
	return descs
}

// bitmap makes the checksum of a bitmap right whose place and checksum are at
// these offsets of a descriptor, in halves.
func (s *stamper) bitmap(d []byte, lo, hi, sumLo, sumHi int, bits int64) {
	at := int64(le.Uint32(d[lo:])) | int64(le.Uint32(d[hi:]))<<32
	b := s.find(at*s.blockSize, s.blockSize)
	if b == nil {
		b = make([]byte, s.blockSize) // nothing is in use
	}
	sum := crc(s.seed, b[:bits/8])
	le.PutUint16(d[sumLo:], uint16(sum))
	le.PutUint16(d[sumHi:], uint16(sum>>16))
}

// inodes makes the checksums of the inodes in use and of the directories right,
// and gives the journal its UUID.
func (s *stamper) inodes(descs []byte) {
	if s.err != nil {
		return
	}
	table := int64(le.Uint32(descs[0x08:])) | int64(le.Uint32(descs[0x28:]))<<32
	for ino := uint32(1); ino <= lastInode; ino++ {
		b := s.bytes(table*s.blockSize+int64(ino-1)*inodeSize, inodeSize)
		seed := crc(s.seed, le.AppendUint32(nil, ino), b[inodeGeneration:][:4])
		le.PutUint16(b[inodeCsumLo:], 0)
		hasHi := le.Uint16(b[inodeExtra:]) >= 4
		if hasHi {
			le.PutUint16(b[inodeCsumHi:], 0)
		}
		sum := crc(seed, b)
		le.PutUint16(b[inodeCsumLo:], uint16(sum))
		if hasHi {
			le.PutUint16(b[inodeCsumHi:], uint16(sum>>16))
		}
		switch ino {
		case rootInode, lastInode:
			for _, at := range s.blocksOf(b) {
				dir := s.block(at)
				tail := len(dir) - dirTailSize
				le.PutUint32(dir[tail+8:], crc(seed, dir[:tail]))
			}
		case journalInode:
			if at := s.blocksOf(b); len(at) > 0 {
				copy(s.block(at[0])[journalUUID:], s.uuid[:])
			}
		}
	}
}

// blocksOf returns the first blocks of a file, at most 16 of each extent.
func (s *stamper) blocksOf(inode []byte) (blocks []int64) {
	tree := inode[inodeBlocks:][:60]
	count, depth := int(le.Uint16(tree[2:])), le.Uint16(tree[6:])
	if le.Uint16(tree) != extentMagic || depth != 0 || count > 4 {
		s.fail("a file without extents")
		return nil
	}
	for i := range count {
		e := tree[12*(i+1):]
		at := int64(le.Uint16(e[6:]))<<32 | int64(le.Uint32(e[8:]))
		for n := range min(int64(le.Uint16(e[4:])), 16) {
			blocks = append(blocks, at+n)
		}
	}
	return blocks
}

// supers gives the superblock and its copies the UUID, and the copies the
// descriptors.
func (s *stamper) supers(descs []byte) {
	for g := int64(0); g < s.groups && s.err == nil; g++ {
		if !hasSuper(g) {
			continue
		}
		at := (s.first + g*s.perGroup) * s.blockSize
		sb := s.bytes(max(at, superAt), superSize)
		copy(sb[superUUID:], s.uuid[:])
		copy(sb[superHashSeed:], s.uuid[:])
		le.PutUint32(sb[superCsum:], crc(^uint32(0), sb[:superCsum]))
		if g > 0 {
			copy(s.bytes(at+s.blockSize, s.groups*descSize), descs)
		}
	}
}

// hasSuper tells whether a group has a copy of the superblock (sparse_super).
func hasSuper(group int64) bool {
	if group <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		power := base
		for power < group {
			power *= base
		}
		if power == group {
			return true
		}
	}
	return false
}
