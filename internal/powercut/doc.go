// Package powercut replays what a machine wrote to its disk up to the moment
// when the power went away. It is a test kit; the product does not use it.
//
// # The nouns
//
// A log is what QEMU's block driver blklogwrites recorded: every write of the
// guest in the order in which it was completed, and every flush. A cut is a
// moment in it: all entries before the last completed flush are on the disk,
// each entry after it is on the disk, or not, or in part. An image is the
// disk as a cut leaves it. All three are in writelog.
//
// # One run, end to end
//
// The test builds its own binary for the guest and boots it as PID 1, with msb
// beside it and a home on a logged disk whose kernel writes nothing before it is
// told to: no periodic writeback, commits every five minutes, no flush on
// rename. On ext4 an fsync of anything commits the whole journal; on btrfs it
// makes one file durable and little else. The guest carries out a
// plan: volumes are made, renamed, labelled and removed, files are written. When
// a step has returned, the guest writes the step's number to a region behind
// the file system on the same disk, past every cache and without a flush. That
// write's place in the log says what had been acknowledged when: a step is
// acknowledged at a cut if its number was written before it, and the step after
// it is the only one that may be half done.
//
// Then the disk of each cut is mounted on the host and judged by the real code:
// what is listed, what the files hold, whether every name can be made and
// removed again, whether a repair leaves anything. The plan says what may be:
// the state after the last acknowledged step, or what the next one makes of it.
//
// A flush covers what was completed before it. The log says when an entry was
// completed, not when it was issued, so a write that overtook a flush is taken
// to be covered by it. The guest's kernel waits for writes before it flushes;
// the planted bugs show that what matters is found.
package powercut
