// Package fileserver runs the process that serves a sandbox's virtio-fs mounts:
// one per sandbox, started confined, talking vhost-user to the VMM and FUSE to
// the guest.
//
// Nouns. A Share is one host directory under a tag. A front end is the VMM's
// end of one share's socket. The starter is the supervisor (or msb virtiofs),
// which calls Start; the server is the process that Main is.
//
// One life. Start writes a request and has package confine start msb with
// it: the shares become read-only or writable binds /share/0, /share/1 ... of a
// private root, the sockets, the attach locks, a status pipe and a descriptor of
// /proc/self/fd are left open, nothing else. Main opens each share, compares it
// with the identity the caller saw, probes what its stat virtualization needs,
// forbids execve to itself, and says on the pipe that it serves, or in one JSON
// object why not. Then every share has its vhost-user device, until its front
// end closes the connection; with the last of them the process ends.
//
// Invariants.
//
//   - The guest's bytes are first looked at when everything is given up that
//     the start needed.
//   - Started by root the server is uid 0 with the capabilities to act on
//     foreign files, and never without a private root: the shares are all there
//     is. Started by a user it is that user without capabilities, in a private
//     root where the host allows user namespaces, else under Landlock alone,
//     which Findings tells.
//   - In a user namespace files of other owners than the user are seen as
//     65534, and can be used as far as their modes allow.
//   - open_by_handle_at is forbidden: with CAP_DAC_READ_SEARCH it would open any
//     inode of the file system that a share lies on.
//   - The mounts below a share are those of the start: what the host mounts
//     there later is not seen, what it unmounts stays busy until the end.
//   - Attach locks are open in the server on purpose: they are free when the
//     last of starter, VMM and server is gone.
//   - A ledger is open in the server only, and only one of a share that it may
//     change: its place there is free when the server is gone.
//   - The server never outlives the thread that started it.
//
// What is trusted: the starter. What is not: the guest, and the VMM, which may
// send any message and change guest memory at any time. What is left to others:
// requests (fuseserver), rings (vhostuser), confinement (confine).
package fileserver
