package ext4

import (
	"errors"
	"fmt"
)

// Types of an inode, to be or-ed with the permission bits (inode(7)).
const (
	FIFO    = 0x1000
	Char    = 0x2000
	Dir     = 0x4000
	Block   = 0x6000
	Regular = 0x8000
	Symlink = 0xa000

	typeMask = 0xf000
)

// Inode is a file. Hard links are entries with the same Inode; a directory has
// one entry.
type Inode struct {
	Mode         uint16 // type and permission bits
	UID, GID     uint32
	Sec          int64 // of all its times, seconds since 1970
	Nsec         int32
	Size         int64             // bytes, of a regular file
	Target       string            // of a symbolic link
	Major, Minor uint32            // of a device
	Xattrs       map[string]string // full names; ACLs as ext4 stores them
	Entries      []Entry           // of a directory, without "." and ".."

	number uint32
	links  uint32
	parent *Inode // of a directory
	start  uint32 // first block of the content, 0 without
	blocks uint32 // of the content
	tree   uint32 // first block of the extent tree, 0 without
	attr   uint32 // block of attributes, 0 without
}

// Entry is a name in a directory.
type Entry struct {
	Name  string
	Inode *Inode
}

func (i *Inode) is(typ uint16) bool { return i.Mode&typeMask == typ }

// Limits of the format.
const (
	MaxSize          = 128 << 30 // bytes of a file, limited by an extent tree of one level
	maxLinks         = 65000
	maxName          = 255
	maxTarget        = blockSize - 1
	fastTarget       = 59 // longest link that is kept in the inode
	firstInode       = 11
	rootInode        = 2
	lostFound        = firstInode
	maxInodes        = 1 << 27
	lostAndFoundName = "lost+found"
)

var errLostAndFound = errors.New("/lost+found is not a directory: ext4 needs that name")

// number gives every inode its number, parents before children, and counts links.
func (m *Image) number(root *Inode) error {
	lf, err := lostAndFound(root)
	if err != nil {
		return err
	}
	m.inodes = make([]*Inode, firstInode)
	m.inodes[rootInode-1], root.number, root.parent = root, rootInode, root
	m.inodes[lostFound-1], lf.number = lf, lostFound
	root.links = 1 // its own ".."; "." is counted as any directory's
	return m.numberDir(root)
}

// lostAndFound finds or makes the directory that e2fsck demands.
func lostAndFound(root *Inode) (*Inode, error) {
	for _, e := range root.Entries {
		if e.Name != lostAndFoundName {
			continue
		}
		if !e.Inode.is(Dir) {
			return nil, errLostAndFound
		}
		return e.Inode, nil
	}
	lf := &Inode{Mode: Dir | 0o700, Sec: root.Sec, Nsec: root.Nsec}
	root.Entries = append(root.Entries, Entry{lostAndFoundName, lf})
	return lf, nil
}

func (m *Image) numberDir(dir *Inode) error {
	dir.links++ // "."
	for _, e := range dir.Entries {
		if err := m.numberEntry(dir, e); err != nil {
			return fmt.Errorf("%q: %w", e.Name, err)
		}
	}
	return nil
}

func (m *Image) numberEntry(dir *Inode, e Entry) error {
	if len(e.Name) == 0 || len(e.Name) > maxName {
		return fmt.Errorf("a name of %d bytes", len(e.Name))
	}
	i := e.Inode
	first := i.links == 0
	if i.links++; i.is(Dir) {
		if !first {
			return errors.New("a directory with two names")
		}
		i.parent = dir
		dir.links++ // ".."
	} else if i.links > maxLinks {
		return fmt.Errorf("more than %d links", maxLinks)
	}
	if first && i.number == 0 {
		if len(m.inodes) >= maxInodes {
			return fmt.Errorf("more than %d inodes", maxInodes)
		}
		m.inodes = append(m.inodes, i)
		i.number = uint32(len(m.inodes))
	}
	if i.is(Dir) {
		return m.numberDir(i)
	}
	return nil
}

// linkCount is what the inode says: 1 for a directory with more than fit
// (the feature dir_nlink).
func (i *Inode) linkCount() uint16 {
	if i.links > maxLinks {
		return 1
	}
	return uint16(i.links)
}
