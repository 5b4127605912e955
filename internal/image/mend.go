package image

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
)

// What is read of an ext4 file system here (Documentation/filesystems/ext4 of
// Linux): offsets into the superblock, a group descriptor, an inode and a
// block of extended attributes. There are no checksums: the writer sets
// neither metadata_csum nor gdt_csum.
const (
	sbOffset        = 1024
	sbInodesCount   = 0x00
	sbInodesPerGrp  = 0x28
	sbMagic         = 0x38
	sbInodeSize     = 0x58
	sbRoCompat      = 0x64
	sbUUID          = 0x68
	roCompatChecks  = 0x10 | 0x400 // gdt_csum, metadata_csum
	ext4Magic       = 0xef53
	ext4Block       = 4096
	gdSize          = 32
	gdInodeBitmap   = 0x04
	gdInodeTable    = 0x08
	inodeXattrBlock = 0x68
	xattrMagic      = 0xea020000
	xattrHeader     = 32
)

// mendExt4 corrects what the ext4 writer leaves wrong, so that e2fsck finds
// nothing and the kernel finds everything:
//
//   - bits beyond the last inode of a group are set in its bitmap;
//   - entries of an attribute block are in the order in which the kernel
//     searches them (it stops at the first one that sorts higher);
//   - the file system has a UUID, made from the digest: the same image always
//     is the same bytes.
func mendExt4(f *os.File, d digest) error {
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, sbOffset); err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(sb[sbMagic:]) != ext4Magic || le.Uint32(sb[sbRoCompat:])&roCompatChecks != 0 || le.Uint16(sb[sbInodeSize:]) != 256 {
		return errors.New("not an ext4 file system of the expected form")
	}
	perGroup := le.Uint32(sb[sbInodesPerGrp:])
	if perGroup == 0 || perGroup > ext4Block*8 {
		return fmt.Errorf("%d inodes in a group", perGroup)
	}
	groups := le.Uint32(sb[sbInodesCount:]) / perGroup
	copy(sb[sbUUID:], uuidOf(d))
	if _, err := f.WriteAt(sb, sbOffset); err != nil {
		return err
	}
	gds := make([]byte, groups*gdSize)
	if _, err := f.ReadAt(gds, ext4Block); err != nil {
		return err
	}
	for g := range groups {
		gd := gds[g*gdSize:]
		if err := padBitmap(f, le.Uint32(gd[gdInodeBitmap:]), perGroup); err != nil {
			return err
		}
		if err := sortXattrs(f, le.Uint32(gd[gdInodeTable:]), perGroup); err != nil {
			return err
		}
	}
	return nil
}

// uuidOf makes a version 8 (vendor-specific, RFC 9562) UUID of a digest.
func uuidOf(d digest) []byte {
	u, _ := hex.DecodeString(d.hex()[:32]) // a digest is hexadecimal
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// padBitmap sets the bits of inodes that the group does not have.
func padBitmap(f *os.File, block, perGroup uint32) error {
	b := make([]byte, ext4Block)
	at := int64(block) * ext4Block
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	for i := perGroup; i < ext4Block*8; i++ {
		b[i/8] |= 1 << (i % 8)
	}
	_, err := f.WriteAt(b, at)
	return err
}

// sortXattrs goes through a group's inodes and orders their attribute blocks.
func sortXattrs(f *os.File, table, perGroup uint32) error {
	b := make([]byte, perGroup*256)
	if _, err := f.ReadAt(b, int64(table)*ext4Block); err != nil {
		return err
	}
	for ino := b; len(ino) > 0; ino = ino[256:] {
		block := binary.LittleEndian.Uint32(ino[inodeXattrBlock:])
		if block == 0 {
			continue
		}
		if err := sortXattrBlock(f, int64(block)*ext4Block); err != nil {
			return err
		}
	}
	return nil
}

func sortXattrBlock(f *os.File, at int64) error {
	b := make([]byte, ext4Block)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(b) != xattrMagic {
		return fmt.Errorf("no attribute block at byte %d", at)
	}
	entries, end, err := xattrEntries(b)
	if err != nil {
		return err
	}
	// An entry is: name length, name index, value offset from the start of
	// the block ..., name from byte 16 on. Values stay where they are.
	slices.SortFunc(entries, func(x, y []byte) int {
		return cmp.Or(cmp.Compare(x[1], y[1]), cmp.Compare(x[0], y[0]), slices.Compare(x[16:16+int(x[0])], y[16:16+int(y[0])]))
	})
	sorted := slices.Concat(entries...)
	copy(b[xattrHeader:end], sorted)
	_, err = f.WriteAt(b, at)
	return err
}

// xattrEntries splits the entries of a block and says where they end.
func xattrEntries(b []byte) (entries [][]byte, end int, err error) {
	at := xattrHeader
	for at+4 <= len(b) && binary.LittleEndian.Uint32(b[at:]) != 0 {
		n := 16 + (int(b[at])+3)&^3
		if at+n > len(b) {
			return nil, 0, errors.New("attribute block is malformed")
		}
		entries = append(entries, slices.Clone(b[at:at+n]))
		at += n
	}
	return entries, at, nil
}
