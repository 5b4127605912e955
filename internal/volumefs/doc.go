// Package volumefs reads and writes the files of a directory volume from the
// host, and never touches anything outside that directory.
//
// The nouns: an [FS] is an open volume; a path is what a caller gives, slash
// separated and relative to the volume whether or not it begins with a slash; a
// spot is where a path leads: an open directory, a name in it, and what has
// that name now. A stand-in is a regular file that represents a guest's symlink
// or special file: its extended attribute user.msb.override_stat (the overlay)
// says what the guest sees.
//
// One write, end to end: the path is cleaned as text (".." never reaches the
// kernel from a caller), resolved to a spot, the data goes to an unnamed file
// in the spot's directory, that file takes over mode, owner and user attributes
// of the one it replaces, is synced, missing directories are made, and the file
// is linked to its name in one step. Then the volume is asked whether it still
// exists; only then is the write acknowledged.
//
// Resolution has two ways. The fast one is openat2 with RESOLVE_BENEATH: the
// kernel itself refuses every step out of the root, whatever somebody renames
// meanwhile. The other is the walk: one component at a time with O_NOFOLLOW,
// links read and followed here, ".." answered from the stack of directories
// already open. The walk alone knows stand-ins and missing directories, so the
// fast way hands those to it; where the kernel has no openat2 the walk does
// everything. Which of the two applies is decided when an FS is opened and not
// by the outcome of a call: a failing openat2 is never taken as a reason to try
// something weaker.
//
// Invariants:
//
//   - No system call gets a path of more than one component, except openat2
//     with RESOLVE_BENEATH and names in /proc/self/fd.
//   - Nothing but a regular file is ever opened for reading or writing, and
//     nothing but a directory for listing: types are known before (O_PATH).
//     Opening a FIFO wakes its writer, opening a device can do anything.
//   - A file is replaced by linking a complete, synced one over it, never
//     written in place.
//   - A link is followed by the calls that read or write content, and never by
//     those that remove or rename.
//
// What an operation adds is charged to the volume's ledger before it is there, and
// what it frees is refunded after it is gone (package ledger): a temporary before
// it has content, a directory's growth with the name that causes it, a replaced or
// removed file with the directory and the file locked, so that nobody else changes
// them between the look and the deed.
//
// The package trusts the kernel and /proc. It does not trust a single name,
// link, type or attribute in the volume: a guest may change all of them at any
// time, also between two calls here.
//
// Names, locks, records and the question whether a volume exists belong to
// volstore; the public types to the root package.
package volumefs
