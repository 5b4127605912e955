// Package ext4 writes read-only ext4 file systems whose whole tree is known
// beforehand.
//
// [New] takes the tree, numbers its inodes and gives everything its blocks:
//
//	0         superblock
//	1 ...     group descriptors
//	          block bitmaps, inode bitmaps and inode tables of all groups
//	          directories, long symbolic links, attributes, extent trees
//	          data of the regular files, in the order in which they are given
//
// [Image.WriteMeta] writes all but the last line, from front to back. The data
// follows without a gap: each file from the start of its block, in order, so
// that whoever has it writes one stream ([Image.Data]).
//
// Such an image has no journal, no checksums, no spare block or inode and the
// feature "read-only", so that no kernel ever writes to it. Its metadata lies at
// the front (flex_bg), hence a file is one run of blocks however many groups it
// spans. Equal trees give equal bytes.
//
// Nothing is trusted to fit: names, links, attributes and sizes beyond what the
// format holds are refused by New. The format is described in
// Documentation/filesystems/ext4 of Linux.
package ext4
