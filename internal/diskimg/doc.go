// Package diskimg makes and opens disk images.
//
// A disk volume is a raw, sparse file with one ext4 file system and no
// partition table. [FormatExt4] makes it with mkfs.ext4; all its arguments are
// in this package, so that every image of one size is the same but for its UUID
// and the checksums that depend on it.
//
// So what mkfs.ext4 has written once can be written again: a template keeps it
// for the next image of that size, which gets a UUID of its own and the checksums
// that belong to it. A template is kept only if it turns one image of
// mkfs.ext4's into another one of a different UUID, byte for byte, so nothing here
// has to know ext4 for good: where a later mkfs.ext4 writes something else,
// there is no template and mkfs.ext4 runs every time. What is in a template never
// comes from a guest. One that is damaged, or of other arguments or another
// mkfs.ext4, is not used.
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
// The package trusts mkfs.ext4 with a file that it made itself, and whoever may
// write to the directory of templates: that is the home's owner. It never runs
// e2fsprogs unconfined over bytes that a guest wrote.
package diskimg
