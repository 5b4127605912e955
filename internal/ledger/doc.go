// Package ledger keeps how much a volume holds, and its limits, true over every
// writer of it: file servers, host programs, and those that were killed.
//
// # The nouns
//
// A charge is what a file counts, in bytes and inodes: see [Rules], which says it
// once for everybody. The ledger is a small file beside the volume. It has limits,
// a base (what the last walk found) and up to 64 slots. A [Writer] is somebody
// who changes the volume; it owns a slot, by a lock that dies with it, and is the
// only one that ever writes it. A slot holds a signed sum: what its owners have
// added, less what they have freed. A slot's sum stays when its owner goes, and
// the next owner counts on. Use is the base and all slots together.
//
// # One operation, end to end
//
//	op := w.Lock(ino)          // nobody else changes the size of this inode now
//	fstat                      // look
//	err := op.Grow(most)       // charge the most that it can add, or QuotaError
//	pwrite                     // grow
//	fstat                      // look again
//	op.Done(actual)            // what it added in truth; may be negative
//
// Grow is paid from what the writer has in reserve, in memory. When that is used
// up, the writer announces more: it writes its slot, then reads all others, and
// takes it back if the limit is exceeded. Two that do this at the same time may
// both step back and try again; they can never both stay. So no lock is needed
// for the limit, and a process that is stopped anywhere stops nobody else.
//
// # Operations
//
//	create             Lock(dir), Grow(1 inode + a directory block), Done(1 inode + growth of dir)
//	extend, append     Lock(ino), look, Grow(File(end)-File(size)), write, look, Done(difference)
//	write inside       the same: it holds the lock so that nobody cuts the file under it; costs nothing
//	many writes        op.Keep() after the first one: a Lease, under which Lock costs no system call
//	truncate, O_TRUNC  Lock(ino), look, Grow if longer, ftruncate, Done(difference)
//	link               Lock(dir, ino), Grow(1 inode + a block), Done
//	unlink             Lock(dir, ino), unlink, fstat: links left: Done(-1 inode);
//	                   none: op.Orphan(ino, charge, open here), Done(0)
//	last descriptor    TryHold(ino), look, close, w.Recount and w.Released(ino), Unhold(ino)
//	change, no name    Lock(ino), op.Nameless(ino, charge before), then as with any other
//	rename over        Lock(both directories, victim); the victim as with unlink
//	setxattr           Lock(ino), Xattrs before, Grow(limit of what it may add), Xattrs after, Done
//	mkdir, rmdir       Lock(dir), 1 inode and Rules.Dir of the new one and of dir before and after
//	copy_file_range    as extend, of the target
//	KEEP_SIZE          EOPNOTSUPP if w.Limited()
//	statfs             w.Usage()
//
// # Orphans
//
// When the last name of an inode goes while a file server has it open, its
// charge stays with the server that has it open. Without other servers the writer
// knows by itself: Orphan and Released do it. With others, what nobody here has
// open is pending in the slot with a time; each other server sees that in Poll,
// looks which of its open inodes have lost their last name ([Options].Orphans),
// takes those over into its own slot, and answers with the time at which it began
// to look. When all living servers have answered later than the time, what is
// pending is free. Who of two servers counts an inode is settled by a lock keyed
// by inode. Programs on the host that only read do not count.
//
// What is given up by one and taken over by another must be the same sum. So a
// charge is measured only while nobody changes the inode (its lock is held), and
// what has no name is changed only after somebody counts it (op.Nameless).
//
// # Truth
//
//   - Use is never below the sum of charges: growth is charged before, shrinking
//     is refunded after, and who could not exclude others refunds nothing.
//   - It equals it when the volume is quiet: a file server gives its reserve back
//     when it was idle between two Polls, everybody else after each operation.
//   - A writer that is killed at work leaves its reserve, at most one chunk (1 MiB),
//     and what its last operation charged, until a walk: [State].Unsettled says so
//     and [Ledger.Settle] does it, when nothing changes meanwhile. One that is
//     killed while it is idle leaves nothing.
//   - After a power cut the slots may be older than the files. Before use passes
//     the ceiling, a higher one is synced; the first opening in a new boot
//     ([Ledger.Recover]) takes the ceiling for the use, until a walk.
//
// # Locks
//
// All are open file description locks on bytes far beyond the end of the file,
// which die with their holder: one per slot, one for the base, one per inode and
// one per orphan. None is waited for longer than a second. Who gives up waiting
// for an inode's lock goes on (op.Late), refunds nothing and marks the volume for
// a walk, and so does who finds that it held a lock for that long and somebody gave
// up. Order: in-process stripes of inodes ascending, inode locks ascending, the
// writer's mutex.
//
// # What it trusts
//
// Nobody who can write the file: a file server that its guest has taken over can
// falsify it. All fields are checked by sum and bounded, no content makes anything
// here panic, allocate or wait without bound. Limits are set again from the
// volume's record whenever it is attached. What is not trusted is what happens
// behind our back: programs that write to the directory are found by a walk only.
package ledger
