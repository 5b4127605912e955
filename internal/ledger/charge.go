package ledger

import (
	"io"

	"golang.org/x/sys/unix"
)

// Block is the unit of charges in bytes.
const Block = 4096

// InlineLink is the longest target of a symlink, or of its stand-in, that costs
// nothing, in bytes.
const InlineLink = 59

// InlineXattrs is how many bytes of names and values of an inode's attributes
// cost nothing.
const InlineXattrs = 64

// MaxCharge is the most that a file's content, target or attributes cost, in
// bytes: more than any limit, so that a limit keeps out whatever is larger.
const MaxCharge = 1 << 54

// Delta is a charge or the difference of two. Its numbers are between -2^60 and
// 2^60: sums stop there, which 64 files of the largest charge reach.
type Delta struct{ Bytes, Inodes int64 }

// Plus returns the sum of two.
func (d Delta) Plus(e Delta) Delta { return Delta{add(d.Bytes, e.Bytes), add(d.Inodes, e.Inodes)} }

// Minus returns d less e.
func (d Delta) Minus(e Delta) Delta {
	return Delta{add(d.Bytes, -bounded(e.Bytes)), add(d.Inodes, -bounded(e.Inodes))}
}

// full reports whether a sum may be of more than it can say.
func (d Delta) full() bool { return d.Bytes >= maxValue || d.Inodes >= maxValue }

// add cannot overflow: each of two is bounded before they are added.
func add(a, b int64) int64 { return bounded(bounded(a) + bounded(b)) }

// Limits of a volume; 0 means none.
type Limits struct{ Bytes, Inodes int64 }

// DefaultInodes is the limit of inodes that comes with a limit of bytes: one per
// block, at least 1024.
func DefaultInodes(bytes int64) int64 {
	if bytes == 0 {
		return 0
	}
	return max(bytes/Block, 1024)
}

// Rules say what things cost on one file system.
type Rules struct {
	// DirSizes: a directory's size is the space it takes (ext4, XFS). Elsewhere
	// each directory costs one block.
	DirSizes bool
	// DirShrinks: a directory may get smaller when it loses a name (XFS).
	DirShrinks bool
}

// RulesOf returns the rules for the file system of an open file.
func RulesOf(fd int) (Rules, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return Rules{}, err
	}
	xfs := st.Type == unix.XFS_SUPER_MAGIC
	return Rules{DirSizes: xfs || st.Type == unix.EXT4_SUPER_MAGIC, DirShrinks: xfs}, nil
}

// File is the charge of a regular file's content: its size rounded up to blocks;
// holes count. It is charged once per inode.
func (Rules) File(size int64) int64 { return roundUp(size) }

// Link is the charge of a symlink or its stand-in by the length of its target.
func (Rules) Link(length int64) int64 {
	if length <= InlineLink {
		return 0
	}
	return roundUp(length)
}

// Dir is the charge of a directory by its st_size.
func (r Rules) Dir(size int64) int64 {
	if !r.DirSizes {
		return Block
	}
	return max(roundUp(size), Block)
}

// Root is the charge of the volume's root: its first block is free.
func (r Rules) Root(size int64) int64 { return r.Dir(size) - Block }

// Xattrs is the charge of an inode's attributes by the sum of the lengths of their
// names and values: see [CountedXattr] for which.
func (Rules) Xattrs(bytes int64) int64 {
	if bytes <= InlineXattrs {
		return 0
	}
	return roundUp(bytes)
}

// Inherited is the most that access lists cost which a new file or directory gets
// from a directory whose default list is so many bytes long.
func (r Rules) Inherited(size int, isDir bool) int64 {
	sum := len(aclAccess) + size
	if isDir {
		sum += len(DefaultACL) + size
	}
	return r.Xattrs(int64(sum))
}

// InheritedOf is Inherited for an open directory; it may be open with O_PATH.
func (r Rules) InheritedOf(dir int, isDir bool) int64 {
	size, err := unix.Getxattr(fdPath(dir), DefaultACL, nil)
	if err != nil || size <= 0 {
		return 0
	}
	return r.Inherited(size, isDir)
}

// DefaultACL is the attribute of a directory with the list that is inherited.
const DefaultACL = "system.posix_acl_default"

const aclAccess = "system.posix_acl_access"

// overlayXattr holds what guests see of a file. Every file of a volume may have
// one; it fits into any inode.
const overlayXattr = "user.msb.override_stat"

// CountedXattr reports whether an attribute counts: those that a guest can set,
// which are user attributes but for the stat overlay, and access lists.
func CountedXattr(name string) bool {
	switch name {
	case overlayXattr:
		return false
	case aclAccess, DefaultACL:
		return true
	}
	return len(name) > 5 && name[:5] == "user."
}

// Inode is the charge of an inode that has at least one name: content, attributes
// and its names. standin says that a regular file stands in for a symlink,
// xattrs is the sum for [Rules.Xattrs].
func (r Rules) Inode(st *unix.Stat_t, standin bool, xattrs int64) Delta {
	d := Delta{Bytes: r.Xattrs(xattrs), Inodes: 1}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		d.Bytes += r.Dir(st.Size)
		return d
	case unix.S_IFLNK:
		d.Bytes += r.Link(st.Size)
	case unix.S_IFREG:
		if standin {
			d.Bytes += r.Link(st.Size)
		} else {
			d.Bytes += r.File(st.Size)
		}
	}
	d.Inodes = max(int64(st.Nlink), 1)
	return d
}

func roundUp(size int64) int64 {
	if size <= 0 {
		return 0
	}
	if size > MaxCharge {
		return MaxCharge
	}
	return (size + Block - 1) &^ (Block - 1)
}

// DirGrowth is the most that a directory's charge may grow by when it gets one
// more name. exact says to look into the directory for a better answer than the
// worst case, which takes longer: it is 0 where the name surely fits.
func (r Rules) DirGrowth(dir int, nameLen int, exact bool) int64 {
	if !r.DirSizes {
		return 0
	}
	if exact && fitsBlock(dir, nameLen) {
		return 0
	}
	return 4 * Block // ext4 splits a leaf and up to two levels of index, and adds a root
}

// fitsBlock reports whether a name surely fits into what a directory has. Of XFS:
// one whose names are all in its inode grows to a block, which it is charged
// anyway. Of ext4: in a directory of one block with n names the free bytes lie in
// at most n+1 places, the largest of which has at least the average.
func fitsBlock(dir, nameLen int) bool {
	var st unix.Stat_t
	if unix.Fstat(dir, &st) != nil || st.Size > Block {
		return false
	}
	if st.Size < 1024 {
		return true
	}
	f, err := openDir(dir, ".")
	if err != nil {
		return false
	}
	defer f.Close()
	names, err := f.Readdirnames(Block / 12)
	if err != nil && err != io.EOF {
		return false
	}
	const dots, tail = 2 * 12, 12
	free, places := Block-dots-tail, 1
	for _, name := range names {
		free -= entrySize(len(name))
		places++
	}
	return free/places >= entrySize(nameLen)
}

// entrySize is what a name takes in a directory of ext4; encrypted and
// case-folded ones take 8 bytes more.
func entrySize(nameLen int) int { return (8 + 8 + nameLen + 3) &^ 3 }
