// Package diskimg makes and opens disk images.
//
// A disk volume is a raw, sparse file with one ext4 file system and no
// partition table. [FormatExt4] makes it with mkfs.ext4; all its arguments are
// in this package, so that every image of one size is the same but for its UUID.
//
// [OpenRaw] opens an image for a virtual machine and takes QEMU's image locks
// on it, so that QEMU, host tools that know these locks, and we exclude each
// other: one writer or many readers.
//
// [Lengthen] makes an image longer; the file system in it grows in a guest that
// mounts it (package guest).
//
// [CheckExt4] makes an image whole again after an unclean end: e2fsck -p, confined
// and limited, for its input is a guest's.
//
// The package trusts mkfs.ext4 with a file that it made itself. It never runs
// e2fsprogs unconfined over bytes that a guest wrote.
package diskimg
