// Package sandbox makes, starts, finds and removes sandboxes. It is the creator's
// side: it decides and prepares, and hands a complete definition to a supervisor,
// which runs the sandbox from then on.
//
// The nouns: a record (in the database) keeps a sandbox's definition and its last
// known status; the sandbox's directory keeps its writable layer, its logs and its
// lock file; the supervisor holds the lock for as long as the sandbox lives.
//
// Creating takes the lock, inserts a record in status "creating", resolves the
// image, provisions volumes, formats the writable layer, stores the complete
// definition, launches the supervisor with the lock, and is done when the guest
// serves requests. Whatever fails, everything made so far is undone in reverse
// order, and only that.
//
// Invariants: who holds the lock may change the directory and the record. A
// record never proves that a sandbox lives; its lock does. A record "creating"
// with a free lock is what a killed creator left: the next mutating command
// deletes it with its directory. A record "running" with a free lock reads as
// crashed and is stored as such by the next mutating command.
//
// Lock order: sandbox lock, then what the mounts take (volume names, attach
// locks), then the database. Nothing is held while a guest runs but the
// supervisor's locks.
package sandbox
