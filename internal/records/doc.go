// Package records keeps the records of volumes and sandboxes in one SQL
// database: SQLite in the home, and the same statements on PostgreSQL for a
// server.
//
// # The nouns
//
// A record is the durable metadata of one volume or sandbox. A tombstone
// remembers the data of a removed volume until its directory is certainly out
// of the way. The reserve is a number of free pages inside the database.
//
// # One change, end to end
//
// A change takes the handle's one connection, begins an immediate transaction
// (the write lock is taken at once, so a change that read something cannot
// lose against another writer), runs its statements and commits. The commit
// is durable when it returns: the rollback journal is sealed, written and synced at
// once (see journal.go), before the database is touched, the database before the
// journal's header is cleared, and that at last: three waits for the disk, by
// fdatasync (see vfs.go).
// A change may come with conditions that are waited for before the second and the
// last of them (see [Condition]): what else must be durable becomes so while the
// change does. It may also leave a small file in the journal for whoever finds it
// undone (see kept.go).
//
// # Invariants
//
//   - Reading never writes. [OpenReader] opens with mode=ro and works on a full
//     disk and on a read-only home. The exception is a journal left by a killed
//     writer: where the home is writable it is rolled back in place, which needs
//     no space; where it is not, database and journal are copied to a private
//     temporary directory and rolled back there. An uncommitted row is never
//     shown.
//   - Removing works at 0 bytes free. The journal is written in full size when
//     the home is made and kept (journal_mode=PERSIST), and the reserve holds
//     pages for what a change needs. It is refilled when it runs low.
//   - A start reads the schema version and nothing else; migrations run only on
//     a difference, under a lock on the home directory that dies with its
//     holder. A newer schema is refused before anything is touched.
//   - A new home gets a finished database by write, fsync and link: a reader
//     sees no database or a complete one.
//
// # Locks
//
// SQLite's own locks are POSIX record locks, which the kernel drops when the
// process closes any descriptor of the file. Nothing in this module may open
// msb.db but SQLite; the two places here that do (making it, copying it) say
// why that is safe.
//
// # What it leaves to others
//
// Names, directories and the order of steps belong to volstore; what a sandbox's
// config means belongs to the supervisor.
package records
