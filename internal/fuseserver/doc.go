// Package fuseserver is the file system behind a virtio-fs device: it answers
// FUSE requests of one guest with system calls on one directory of the host,
// the share, and on nothing else.
//
// # Nouns
//
// A node is what the guest calls by a node id; its inode here holds an O_PATH
// descriptor, so the host's inode cannot be freed or its number reused while
// the guest knows it. The lookup count of a node is how many times the guest
// was told its id; FORGET gives it back. Node ids are never used twice in the
// life of a server. A handle is an open file or directory; it belongs to one
// node and has one kind, and a request that names both must agree. The
// overlay is what the guest sees as owner, mode, type and device number of an
// inode; it lives in one extended attribute (see overlay.go). A session is
// everything between INIT and DESTROY.
//
// # One request
//
// The transport calls [Server.Serve] on the thread of a virtqueue. The header
// and the arguments are copied out of guest memory once, then judged, then
// used; the payloads of READ and WRITE are never copied here but named by
// iovecs. The opcode's row in the table of ops.go says how long its arguments
// and its reply are and whether it may run on a read-only share; no row, no
// service. The handler does its system calls inline, because most of them cost
// less than waking somebody else; what may block for long (fsync, reads that
// miss the page cache, freeing a huge file) moves to a worker and is completed
// there. The reply is assembled in private memory and copied out last.
//
// # Locks of files
//
// The guest's kernel sends flock, POSIX and OFD locks (lock.go), and they are
// taken on the host, so that they exclude other sandboxes and host programs. A
// blocking request whose lock is not free is put aside (lockwait.go) and answered
// when the lock is there: no thread waits in the kernel. Linux's virtiofs cannot
// take such a request back; the guest's agent says which threads have a signal to
// attend to, and that the guest stops, through an attribute of the root.
//
// # Limits
//
// With a ledger (quota.go, charge.go) whatever changes what the volume holds is
// charged to it before it is done, and refused with ENOSPC if it does not fit; what
// was not used, or was freed, comes back when it is done. A file without a name
// stays charged while a node of it is open; what the guest only remembers is let go
// when another writer has deleted it.
//
// # Invariants
//
//   - No path of more than one component, no symbolic link and no magic link
//     given by the guest is ever followed. A descriptor of a known node plus
//     one judged name is the only way to a new node.
//   - Only regular files and directories are ever opened. Everything else
//     stays an O_PATH descriptor.
//   - An error reply changes no lookup count, and a reply that would not fit
//     into the guest's buffers is refused before anything is done.
//   - An inode or a handle is closed by whoever drops its last reference, so a
//     request never works on a descriptor number that has come to mean
//     something else. The tables hold one reference, each running request one.
//   - The number of descriptors is bounded by the budget. Beyond it the guest
//     gets ENFILE, and listings still show every name.
//   - No lock is held while guest memory is touched.
//   - A lock of the host is held only while the guest has the file open that it
//     was taken through: FLUSH, RELEASE and the end of the session drop it.
//
// # Lock order
//
//	size stripe
//	  inodes of the ledger (ledger.Writer.Lock)
//	    a look at the ledger
//	      pins of an inode
//	        the ledger's writer
//	stripe (read-modify-write of one overlay)
//	  directory handle
//	lock table
//	    key shard of the node table
//	      id shard of the node table
//	    overlay cache of an inode
//
// # Trust
//
// The guest owns every byte of a request and may run any two requests at the
// same time. Other writers of the share (host programs, other sandboxes) may
// change names and files at any moment; they can make requests fail, not leave
// the share. The process's umask must be 0.
//
// # Left to others
//
// Virtqueues and guest memory (vhostuser), message layout (fusewire),
// namespaces and capabilities (confine). Permission checks between users of
// one guest are the guest kernel's (default_permissions).
package fuseserver
