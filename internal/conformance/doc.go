// Package conformance shows that a mounted volume behaves like a directory: its
// tests boot sandboxes and run there what programs do to files, under every
// stat virtualization policy that changes how files are kept, as root and as an
// ordinary user of the guest.
//
// The code here makes the inputs (a repository for git fast-import, a tar
// archive) and the digest list that says whether two trees are equal. It runs
// on both sides: in the tests on the host and, through package guesttest, which
// is compiled to a static binary, in the guest.
package conformance
