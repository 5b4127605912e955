// Package confine takes away from a program everything it does not need, before
// it runs. It serves the two processes that a guest can talk to, QEMU and the
// file server, and whatever else must read a guest's bytes.
//
// Nouns. A Profile is data: what to take (measures) and what to leave (binds,
// devices, capabilities, descriptors). A Host is what this process may do on
// this machine. Prepare cuts the profile down to the host, writes orders, and
// makes the command of stage 1: msb, started in new namespaces, which applies
// the profile to its own thread and becomes the program. A Finding is a measure
// that was not, or not fully, applied.
//
// One launch, end to end. Prepare probes the host (once per process) and
// refuses if a required measure is missing. The child is cloned into mount,
// PID, IPC, UTS and network namespaces; if we are not privileged also into a
// user namespace in which its ids are ours and it holds just the capabilities
// to mount and to drop capabilities. Stage 1 reads its orders from a file of
// memory, asks to be killed with its parent, takes detached copies of the bind
// sources and checks their identity, restricts them, puts them into an empty
// tmpfs, pivots into it and drops the old root, lowers limits, switches ids,
// reduces all five capability sets, sets no_new_privs, applies Landlock, marks
// every other descriptor close-on-exec, asks again to be killed with its parent
// (the id switch forgot it) and looks whether that is still there, leaves its
// report, installs the filter, and executes. Outcome reads the report.
//
// Invariants.
//
//   - A thread is confined, not a process: the kernel has no other way. execve
//     ends all other threads, so every thread the program ever has descends
//     from the confined one.
//   - Nothing is silently weaker than the profile: what cannot be applied is an
//     error if required, else a Finding. What the host was found to allow and
//     then fails is always an error.
//   - The check of a bind is on the very mount that is attached, so no rename or
//     link put in its place is served.
//   - With a private root no path leads to the host: the old root is gone, no
//     /proc is mounted, and the one descriptor of /proc/self/fd a program may
//     ask for is on a mount of its own from which ".." leads nowhere.
//   - A program of uid 0 without capabilities still owns root's files. It is
//     started only with a private root; QEMU, which needs no files, gets a uid
//     that owns nothing.
//   - The environment of the program is the profile's and nothing of ours.
//
// What is trusted: msb itself until execve, the kernel, and the caller's files;
// a descriptor handed over is a right handed over. What is left to others: the
// program's own filters (QEMU's -sandbox, SealExec), and resource limits beyond
// setrlimit.
package confine
