// Package supervisor runs one sandbox from start to end, in a process of its own.
//
// The nouns: the request (a complete definition, from the creator), the plan (the
// sandbox's mounts, opened and locked), the file server and the machine (two
// confined children), the link (one virtio-serial port to the guest's agent), the
// relay (which shares the link among the clients of agent.sock), the lifeline (a
// pipe whose write end only the creator holds).
//
// One run: the supervisor inherits the sandbox's lock, reads the request, opens
// the mounts, starts the file server, starts QEMU, exchanges the boot message with
// the agent, listens, records "running" and reports ready. Then it waits for the
// first of: a stop request on control.sock, the end of the lifeline, a signal, the
// end of a child, the end of the link. It tears everything down in reverse order
// and records how the sandbox ended.
//
// Invariants. A sandbox ends within two seconds of the death of its creator, its
// supervisor, its QEMU or its file server, also when QEMU is stopped by a signal:
// the children get SIGKILL when the supervisor's spawning thread ends, and a guest
// that does not power off within a second is killed. Locks are freed by the
// kernel when the last process that holds them is gone; nothing else frees them.
// What a client does not read holds back its own session and no other.
//
// Lock order: relay.mu, then client.mu; neither is held over I/O.
//
// It trusts its creator, whose user it runs as. It trusts neither the guest nor
// the agent: frames are bounded before they are read, ids it does not know are
// dropped, windows are enforced on both sides.
package supervisor
