package ext4

import (
	"fmt"
)

const (
	blockSize      = 4096
	blocksPerGroup = 8 * blockSize
	inodeSize      = 256
	inodesPerBlock = blockSize / inodeSize
	descSize       = 32
	descsPerBlock  = blockSize / descSize
)

// Image is a file system with everything in its place.
type Image struct {
	uuid   [16]byte
	inodes []*Inode // by number, from 1; nil: reserved

	groups    uint32
	perGroup  uint32 // inodes
	bitmaps   uint32 // first block: block bitmaps, then inode bitmaps
	tables    uint32 // first block of the inode tables
	dataStart uint32
	used      uint32 // blocks in use, all of them at the front
	blocks    uint32 // of the file system
}

// New lays out the tree under root. files are the regular files that are not
// empty, in the order in which their data is written. If root has no directory
// lost+found, it gets one.
func New(root *Inode, files []*Inode, uuid [16]byte) (*Image, error) {
	m := &Image{uuid: uuid}
	if err := m.number(root); err != nil {
		return nil, err
	}
	for _, i := range m.inodes {
		if i == nil {
			continue
		}
		if err := i.measure(); err != nil {
			return nil, fmt.Errorf("inode %d: %w", i.number, err)
		}
	}
	var content uint64
	for _, i := range m.inodes {
		if i != nil {
			content += uint64(i.blocks) + uint64(i.tree) + uint64(i.attr)
		}
	}
	if err := m.divide(content); err != nil {
		return nil, err
	}
	return m, m.place(files)
}

// measure counts blocks: of the content, and in tree and attr of what else the
// inode needs.
func (i *Inode) measure() error {
	switch {
	case i.is(Regular):
		if i.Size < 0 || i.Size > MaxSize {
			return fmt.Errorf("a size of %d bytes", i.Size)
		}
		i.blocks = uint32((i.Size + blockSize - 1) / blockSize)
	case i.is(Symlink):
		if len(i.Target) == 0 || len(i.Target) > maxTarget {
			return fmt.Errorf("a link target of %d bytes", len(i.Target))
		}
		if len(i.Target) > fastTarget {
			i.blocks = 1
		}
	case i.is(Dir):
		i.blocks = i.dirBlocks()
	case i.is(Char), i.is(Block), i.is(FIFO):
	default:
		return fmt.Errorf("mode %#o", i.Mode)
	}
	i.tree = treeBlocks(i.blocks)
	return i.measureXattrs()
}

// divide finds the number of groups, which need blocks themselves.
func (m *Image) divide(content uint64) error {
	inodes := uint64(len(m.inodes))
	groups := max(1, (inodes+blocksPerGroup-1)/blocksPerGroup)
	for {
		perGroup := roundUp((inodes+groups-1)/groups, inodesPerBlock)
		descs := (groups + descsPerBlock - 1) / descsPerBlock
		tables := 1 + descs + 2*groups
		data := tables + groups*perGroup/inodesPerBlock
		used := data + content
		if need := (used + blocksPerGroup - 1) / blocksPerGroup; need > groups {
			groups = need
			continue
		}
		// A last group without any block would not be one.
		blocks := max(used, (groups-1)*blocksPerGroup+1)
		if blocks >= 1<<32 {
			return fmt.Errorf("%d blocks", blocks)
		}
		m.groups, m.perGroup = uint32(groups), uint32(perGroup)
		m.bitmaps, m.tables, m.dataStart = uint32(1+descs), uint32(tables), uint32(data)
		m.used, m.blocks = uint32(used), uint32(blocks)
		return nil
	}
}

func roundUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

// place turns the counts into block numbers: metadata first, then the files.
func (m *Image) place(files []*Inode) error {
	next := m.dataStart
	take := func(n uint32) uint32 {
		if n == 0 {
			return 0
		}
		at := next
		next += n
		return at
	}
	for _, i := range m.inodes {
		if i == nil {
			continue
		}
		if !i.is(Regular) {
			i.start = take(i.blocks)
		}
		i.tree, i.attr = take(i.tree), take(i.attr)
	}
	m.dataStart = next
	for _, i := range files {
		if !i.is(Regular) || i.blocks == 0 || i.start != 0 || i.number == 0 {
			return fmt.Errorf("inode %d is no file with data, or comes twice", i.number)
		}
		i.start = take(i.blocks)
	}
	if next != m.used {
		return fmt.Errorf("%d of %d blocks are given away: a file is missing", next, m.used)
	}
	return nil
}

// Size is the number of bytes of the image.
func (m *Image) Size() int64 { return int64(m.blocks) * blockSize }

// Data is where the data of the first file begins.
func (m *Image) Data() int64 { return int64(m.dataStart) * blockSize }

// Padding is how many zero bytes follow a file of this size.
func Padding(size int64) int64 { return (blockSize - size%blockSize) % blockSize }
