package ext4

// Types in directory entries.
var entryTypes = map[uint16]byte{Regular: 1, Dir: 2, Char: 3, Block: 4, FIFO: 5, Symlink: 7}

// recordLen is the length of a directory entry.
func recordLen(name string) int { return (8 + len(name) + 3) &^ 3 }

// each calls fn for every entry with its place: the block, and the byte in it.
func (i *Inode) each(fn func(e Entry, block, at int)) (blocks int) {
	block, at := 0, 0
	put := func(e Entry) {
		if at+recordLen(e.Name) > blockSize {
			block, at = block+1, 0
		}
		fn(e, block, at)
		at += recordLen(e.Name)
	}
	put(Entry{".", i})
	put(Entry{"..", i.parent})
	for _, e := range i.Entries {
		put(e)
	}
	return block + 1
}

func (i *Inode) dirBlocks() uint32 { return uint32(i.each(func(Entry, int, int) {})) }

// dirContent is the directory's blocks: linear, without a hash tree. The last
// entry of a block reaches to its end.
func (i *Inode) dirContent() []byte {
	b := make([]byte, i.blocks*blockSize)
	var last []byte
	lastBlock := -1
	i.each(func(e Entry, block, at int) {
		rest := b[block*blockSize+at : (block+1)*blockSize]
		if last != nil && lastBlock == block {
			le.PutUint16(last[4:], uint16(len(last)-len(rest)))
		}
		le.PutUint32(rest, e.Inode.number)
		le.PutUint16(rest[4:], uint16(len(rest)))
		rest[6] = byte(len(e.Name))
		rest[7] = entryTypes[e.Inode.Mode&typeMask]
		copy(rest[8:], e.Name)
		last, lastBlock = rest, block
	})
	return b
}
