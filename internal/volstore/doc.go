// Package volstore keeps volume records and data directories consistent.
//
// # The nouns
//
// A volume has a record (package records), a data directory volumes/NAME, and a
// state directory volumes/.state/ID with volume.json (a copy of the record), the
// file attach (made by the first attachment, locked by whoever has the volume
// attached) and alive, another name of volume.json (its link count tells open
// handles that the volume is gone). Names can be used again; ids cannot. An
// identity is device, inode and birth time of a data directory: it tells a
// volume's data from a stranger's. A stranger is a
// directory in volumes/ that no record, staging note or tombstone accounts for:
// it is reported and can be adopted, but never deleted.
//
// # Creating, end to end
//
// Everything slow is done in .staging/ID, a directory that is flocked while its
// maker lives: data, volume.json with the identity of data, the ledger,
// alive. Meanwhile the name is locked and the record goes on its way to the disk.
// When its journal is there, with a copy of volume.json, data is renamed to
// volumes/NAME, and when that is durable the record is committed; .staging/ID, now
// without data, is renamed to .state/ID. Removing goes the other way: the record is replaced by a tombstone
// with the identity in one transaction, .state/ID becomes .trash/ID, the data
// goes to .trash/ID/data, the name is free, and the tree is deleted: a small one
// at once, a large one in the background, as are the bookkeeping of an empty one
// and the image of a disk.
//
// # What is synced, and why
//
// Creating waits for the disk as often as its commit does, three times.
//
//   - SQLite's journal: then the change is undone by whoever finds it. It has
//     volume.json in it: a name that a power cut leaves in volumes/ must find its
//     note, or it would be a stranger's. At the same time the image of a disk volume,
//     with its directory, which must not be half of one when it has a name; and
//     limits, with the staging directory, if there are any, since nobody could make
//     them again.
//   - The database; and at the same time volumes/, after the rename: a record must
//     find its data.
//   - The end of the journal, which commits.
//
// Nothing else of the staging directory is synced, nor its rename to .state/ID:
// whatever a power cut takes of it the next mutating call makes again. Removing
// waits for its commit only: while the tombstone stands, the next mutating call moves what is
// not in the trash. Tombstones of removals that are complete stay until there are
// some: then a mutating call syncs volumes/ and .trash while it commits, and forgets
// them with that commit. Where a directory's time of birth is not known, every call
// does, since its identity may come again.
//
// # Recovery
//
// There is no repair command to run first. Every mutating call, once it has its
// name's lock, looks through .staging, .trash and the tombstones (which are
// empty but after a kill) and finishes or undoes what it finds, for its own name
// and for every other name whose lock is free:
//
//   - staging with data, without a record: was never visible; dropped.
//   - staging without data, and volumes/NAME has its identity: the kill came
//     between rename and commit; the record is committed. Should a power cut have
//     taken the staging directory, package records puts the note back first.
//   - staging without data otherwise: committed (then it is published) or undone.
//   - staging/ID.grow: a resize was killed; if the image is longer than the record
//     says, its length is recorded, by who can hold the volume.
//   - tombstone, and volumes/NAME has its identity: the kill came before the data
//     was moved to the trash; it is moved.
//   - record with moving_from: a rename is finished.
//   - record without state directory (power cut): it is written anew.
//
// # Invariants
//
//   - A record is committed only after its data has its name, durably; so a record
//     never lacks data, whatever is cut when.
//   - Data is deleted only from staging and trash, and gets to the trash only if
//     its identity is that of a removed record.
//   - A call that waited for a lock acts on the volume it was called for, never
//     on one made meanwhile under the same name.
//   - What cannot be moved (immutable, another user's, a mount point) makes a
//     removal or rename fail, and then the record is as it was.
//   - Nothing is deleted on another mount than the volume's.
//   - No reading call writes anything or waits for a name's lock.
//   - Nothing here follows a path inside a volume.
//
// # Lock order
//
// In-process mutexes of names (ascending), flocks of the names' slots
// (ascending), the attach lock, the turn of the database. While holding a name,
// other names' locks and staging and trash locks are only tried, never waited
// for. All of them are kernel locks that die with their holder; waiting honours
// ctx. The attach lock is meant to be inherited: it is free when supervisor,
// virtual machine and file server are all gone.
//
// # What it trusts, and what it leaves to others
//
// It trusts the home (mode 0700) against other users, not the content of
// volumes, which guests write. File access inside volumes is volumefs, what they
// hold and may hold is ledger (this package makes ledgers, gives them the limits of
// the record, and has them counted), sandboxes are records of their own.
package volstore
