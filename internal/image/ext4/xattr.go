package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

const (
	xattrMagic  = 0xea020000
	xattrHeader = 32                              // of a block
	inlineRoom  = inodeSize - 128 - extraSize - 4 // after the magic number
	attrRoom    = blockSize - xattrHeader
	maxXattr    = 255 // bytes of a name
)

// prefixes are the name spaces that have a number.
var prefixes = []struct {
	index byte
	name  string
}{
	{2, "system.posix_acl_access"},
	{3, "system.posix_acl_default"},
	{1, "user."},
	{4, "trusted."},
	{6, "security."},
}

// xattr is an attribute with the number of its name space.
type xattr struct {
	index       byte
	name, value string
}

// attributes returns the attributes in the order in which the kernel searches
// a block: it stops at the first one that sorts higher.
func (i *Inode) attributes() ([]xattr, error) {
	list := make([]xattr, 0, len(i.Xattrs))
	for full, value := range i.Xattrs {
		x := xattr{value: value}
		for _, p := range prefixes {
			if rest, ok := strings.CutPrefix(full, p.name); ok {
				x.index, x.name = p.index, rest
				break
			}
		}
		acl := x.index == 2 || x.index == 3
		if x.index == 0 || len(x.name) > maxXattr || acl != (x.name == "") {
			return nil, fmt.Errorf("attribute %.300q", full)
		}
		list = append(list, x)
	}
	slices.SortFunc(list, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
	})
	return list, nil
}

func (x xattr) entryLen() int { return 16 + (len(x.name)+3)&^3 }
func (x xattr) valueLen() int { return (len(x.value) + 3) &^ 3 }

// measureXattrs sets attr to 1 if the attributes do not fit into the inode.
func (i *Inode) measureXattrs() error {
	if len(i.Xattrs) == 0 {
		return nil
	}
	list, err := i.attributes()
	if err != nil {
		return err
	}
	need := 4 // the end of the entries
	for _, x := range list {
		need += x.entryLen() + x.valueLen()
	}
	if need > attrRoom {
		return fmt.Errorf("attributes of %d bytes", need)
	}
	if need > inlineRoom {
		i.attr = 1
	}
	return nil
}

func (i *Inode) putInlineXattrs(b []byte) {
	list, _ := i.attributes() // measured before
	le.PutUint32(b, xattrMagic)
	putXattrs(b[4:], 0, list)
}

// attrContent is the block of attributes.
func (i *Inode) attrContent() []byte {
	b := make([]byte, blockSize)
	list, _ := i.attributes() // measured before
	le.PutUint32(b, xattrMagic)
	le.PutUint32(b[4:], 1) // inodes that use it
	le.PutUint32(b[8:], 1) // blocks
	putXattrs(b[xattrHeader:], xattrHeader, list)
	return b
}

// putXattrs encodes entries from the start and values from the end. Offsets of
// values count from "before" bytes before b.
func putXattrs(b []byte, before int, list []xattr) {
	entry, end := b, len(b)
	for _, x := range list {
		end -= x.valueLen()
		entry[0], entry[1] = byte(len(x.name)), x.index
		le.PutUint16(entry[2:], uint16(before+end))
		le.PutUint32(entry[8:], uint32(len(x.value)))
		le.PutUint32(entry[12:], x.hash())
		copy(entry[16:], x.name)
		copy(b[end:], x.value)
		entry = entry[x.entryLen():]
	}
}

// hash is what e2fsck expects of an entry.
func (x xattr) hash() uint32 {
	var h uint32
	for _, c := range []byte(x.name) {
		h = h<<5 ^ h>>27 ^ uint32(c)
	}
	padded := append([]byte(x.value), 0, 0, 0)
	for n := range x.valueLen() / 4 {
		h = h<<16 ^ h>>16 ^ le.Uint32(padded[n*4:])
	}
	return h
}
