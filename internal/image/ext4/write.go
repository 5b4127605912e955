package ext4

import (
	"encoding/binary"
	"fmt"
	"io"
)

var le = binary.LittleEndian

// Features: what a kernel must know to read the image, to write it, and what it
// may ignore.
const (
	compat   = 0x8 | 0x200                // ext_attr, sparse_super2 (no backups)
	incompat = 0x2 | 0x40 | 0x200         // filetype, extents, flex_bg
	roCompat = 0x2 | 0x20 | 0x40 | 0x1000 // large_file, dir_nlink, extra_isize, read-only
)

// WriteMeta writes everything from the first byte up to Data, in order.
func (m *Image) WriteMeta(w io.Writer) error {
	for _, part := range []func(io.Writer) error{m.writeSuper, m.writeDescs, m.writeBlockBitmaps, m.writeInodeBitmaps, m.writeTables, m.writeContent} {
		if err := part(w); err != nil {
			return err
		}
	}
	return nil
}

func (m *Image) writeSuper(w io.Writer) error {
	const magic, clean, ignoreErrors, dynamic = 0xef53, 1, 1, 1
	b := make([]byte, blockSize)
	sb := b[1024:]
	le.PutUint32(sb[0x00:], m.groups*m.perGroup)
	le.PutUint32(sb[0x04:], m.blocks)
	le.PutUint32(sb[0x0c:], m.blocks-m.used)
	le.PutUint32(sb[0x10:], m.groups*m.perGroup-uint32(len(m.inodes)))
	le.PutUint32(sb[0x18:], 2) // blocks of 1 KiB << 2
	le.PutUint32(sb[0x1c:], 2) // clusters as well
	le.PutUint32(sb[0x20:], blocksPerGroup)
	le.PutUint32(sb[0x24:], blocksPerGroup)
	le.PutUint32(sb[0x28:], m.perGroup)
	le.PutUint16(sb[0x36:], 0xffff) // never check because of the number of mounts
	le.PutUint16(sb[0x38:], magic)
	le.PutUint16(sb[0x3a:], clean)
	le.PutUint16(sb[0x3c:], ignoreErrors)
	le.PutUint32(sb[0x4c:], dynamic)
	le.PutUint32(sb[0x54:], firstInode)
	le.PutUint16(sb[0x58:], inodeSize)
	le.PutUint32(sb[0x5c:], compat)
	le.PutUint32(sb[0x60:], incompat)
	le.PutUint32(sb[0x64:], roCompat)
	copy(sb[0x68:], m.uuid[:])
	le.PutUint16(sb[0x15c:], extraSize)
	le.PutUint16(sb[0x15e:], extraSize)
	sb[0x174] = 31 // all groups are one flexible group
	le.PutUint32(sb[0x268:], lostFound)
	_, err := w.Write(b)
	return err
}

func (m *Image) writeDescs(w io.Writer) error {
	b := make([]byte, (m.bitmaps-1)*blockSize)
	for g := range m.groups {
		d := b[g*descSize:]
		le.PutUint32(d[0x0:], m.bitmaps+g)
		le.PutUint32(d[0x4:], m.bitmaps+m.groups+g)
		le.PutUint32(d[0x8:], m.tables+g*m.perGroup/inodesPerBlock)
		block, end := g*blocksPerGroup, min((g+1)*blocksPerGroup, m.blocks)
		le.PutUint16(d[0xc:], uint16(end-clamp(m.used, block, end)))
		inodes := m.inodes[min(int(g*m.perGroup), len(m.inodes)):min(int((g+1)*m.perGroup), len(m.inodes))]
		le.PutUint16(d[0xe:], uint16(m.perGroup-uint32(len(inodes))))
		dirs := 0
		for _, i := range inodes {
			if i != nil && i.is(Dir) {
				dirs++
			}
		}
		le.PutUint16(d[0x10:], uint16(dirs))
	}
	_, err := w.Write(b)
	return err
}

func clamp(n, low, high uint32) uint32 { return min(max(n, low), high) }

// writeBlockBitmaps: blocks below used are taken, and so are those that would
// lie beyond the end.
func (m *Image) writeBlockBitmaps(w io.Writer) error {
	b := make([]byte, blockSize)
	for g := range m.groups {
		first, end := g*blocksPerGroup, (g+1)*blocksPerGroup
		clear(b)
		setBits(b, 0, clamp(m.used, first, end)-first)
		setBits(b, clamp(m.blocks, first, end)-first, blocksPerGroup)
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// writeInodeBitmaps: inodes up to the last one are taken, reserved ones among
// them, and so are those that the group does not have.
func (m *Image) writeInodeBitmaps(w io.Writer) error {
	b := make([]byte, blockSize)
	for g := range m.groups {
		first := g * m.perGroup
		clear(b)
		setBits(b, 0, clamp(uint32(len(m.inodes)), first, first+m.perGroup)-first)
		setBits(b, m.perGroup, 8*blockSize)
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// setBits sets the bits from..to-1.
func setBits(b []byte, from, to uint32) {
	for from < to && from%8 != 0 {
		b[from/8] |= 1 << (from % 8)
		from++
	}
	for ; from+8 <= to; from += 8 {
		b[from/8] = 0xff
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}

func (m *Image) writeTables(w io.Writer) error {
	b := make([]byte, blockSize)
	for n := uint32(0); n < m.groups*m.perGroup; n += inodesPerBlock {
		clear(b)
		for k := range uint32(inodesPerBlock) {
			if n+k < uint32(len(m.inodes)) && m.inodes[n+k] != nil {
				m.inodes[n+k].put(b[k*inodeSize : (k+1)*inodeSize])
			}
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// writeContent writes what place has given blocks, in its order.
func (m *Image) writeContent(w io.Writer) error {
	for _, i := range m.inodes {
		if i == nil {
			continue
		}
		if err := i.writeContent(w); err != nil {
			return fmt.Errorf("inode %d: %w", i.number, err)
		}
	}
	return nil
}

func (i *Inode) writeContent(w io.Writer) error {
	var parts [][]byte
	switch {
	case i.start == 0 || i.is(Regular):
	case i.is(Dir):
		parts = append(parts, i.dirContent())
	default:
		b := make([]byte, blockSize)
		copy(b, i.Target)
		parts = append(parts, b)
	}
	if i.tree != 0 {
		parts = append(parts, i.treeContent())
	}
	if i.attr != 0 {
		parts = append(parts, i.attrContent())
	}
	for _, b := range parts {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}
