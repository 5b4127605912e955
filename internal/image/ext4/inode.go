package ext4

// extraSize is how much of an inode's second half has meaning: up to the
// project id. Attributes may follow.
const extraSize = 32

const extentsFlag = 0x80000

// put encodes the inode.
func (i *Inode) put(b []byte) {
	le.PutUint16(b[0x00:], i.Mode)
	le.PutUint16(b[0x02:], uint16(i.UID))
	le.PutUint16(b[0x18:], uint16(i.GID))
	le.PutUint16(b[0x78:], uint16(i.UID>>16))
	le.PutUint16(b[0x7a:], uint16(i.GID>>16))
	size := i.byteSize()
	le.PutUint32(b[0x04:], uint32(size))
	le.PutUint32(b[0x6c:], uint32(size>>32))
	le.PutUint16(b[0x1a:], i.linkCount())
	blocks := i.blocks + treeBlocks(i.blocks)
	if i.attr != 0 {
		blocks++
	}
	le.PutUint32(b[0x1c:], blocks*(blockSize/512))
	i.putTimes(b)
	le.PutUint32(b[0x68:], i.attr)
	le.PutUint16(b[0x80:], extraSize)
	block := b[0x28:0x64]
	switch {
	case i.is(Symlink) && i.start == 0:
		copy(block, i.Target)
	case i.is(Char), i.is(Block):
		le.PutUint32(block[4:], i.Minor&0xff|i.Major<<8|(i.Minor&^0xff)<<12)
	case i.is(FIFO):
	default:
		le.PutUint32(b[0x20:], extentsFlag)
		i.putExtents(block)
	}
	if i.attr == 0 && len(i.Xattrs) > 0 {
		i.putInlineXattrs(b[128+extraSize:])
	}
}

// byteSize is what stat shows.
func (i *Inode) byteSize() int64 {
	switch {
	case i.is(Regular):
		return i.Size
	case i.is(Dir):
		return int64(i.blocks) * blockSize
	case i.is(Symlink):
		return int64(len(i.Target))
	}
	return 0
}

// putTimes sets all four times. Seconds have 34 bits: the upper two are kept
// with the nanoseconds.
func (i *Inode) putTimes(b []byte) {
	low := uint32(i.Sec)
	extra := uint32((i.Sec-int64(int32(low)))>>32)&3 | uint32(i.Nsec)<<2
	for _, at := range []int{0x08, 0x0c, 0x10, 0x90} { // access, change, modification, birth
		le.PutUint32(b[at:], low)
	}
	for _, at := range []int{0x8c, 0x84, 0x88, 0x94} {
		le.PutUint32(b[at:], extra)
	}
}

// Content is one run of blocks, cut into extents of the greatest length.
const (
	extentLen     = 32768 // blocks
	extentSize    = 12
	extentMagic   = 0xf30a
	rootExtents   = 4
	leafExtents   = (blockSize - extentSize) / extentSize
	blocksPerLeaf = leafExtents * extentLen
)

// treeBlocks is how many blocks the extents need outside of the inode.
func treeBlocks(blocks uint32) uint32 {
	if blocks <= rootExtents*extentLen {
		return 0
	}
	return (blocks + blocksPerLeaf - 1) / blocksPerLeaf
}

func (i *Inode) putExtents(b []byte) {
	leaves := treeBlocks(i.blocks)
	if leaves == 0 {
		putRun(b, rootExtents, 0, i.blocks, i.start)
		return
	}
	putExtentHeader(b, leaves, rootExtents, 1)
	for n := range leaves {
		e := b[extentSize*(n+1):]
		le.PutUint32(e, n*blocksPerLeaf)
		le.PutUint32(e[4:], i.tree+n)
	}
}

// treeContent is the leaves.
func (i *Inode) treeContent() []byte {
	leaves := treeBlocks(i.blocks)
	b := make([]byte, leaves*blockSize)
	for n := range leaves {
		from := n * blocksPerLeaf
		putRun(b[n*blockSize:(n+1)*blockSize], leafExtents, from, min(blocksPerLeaf, i.blocks-from), i.start+from)
	}
	return b
}

// putRun encodes a run of blocks: count of them, of the file from its block
// number "from" on, on disk from start on.
func putRun(b []byte, room, from, count, start uint32) {
	putExtentHeader(b, (count+extentLen-1)/extentLen, room, 0)
	for at := uint32(0); at < count; at += extentLen {
		b = b[extentSize:]
		le.PutUint32(b, from+at)
		le.PutUint16(b[4:], uint16(min(extentLen, count-at)))
		le.PutUint32(b[8:], start+at)
	}
}

func putExtentHeader(b []byte, entries, room, depth uint32) {
	le.PutUint16(b, extentMagic)
	le.PutUint16(b[2:], uint16(entries))
	le.PutUint16(b[4:], uint16(room))
	le.PutUint16(b[6:], uint16(depth))
}
