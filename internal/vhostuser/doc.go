// Package vhostuser is the device side of the vhost-user protocol: it gives
// the requests of a guest's virtqueues to a [Handler]. It knows no FUSE.
//
// # The nouns
//
// The front end is the VMM: it owns the connection, the eventfds and the memory
// file. A region is a piece of guest memory; memory is one generation of the
// table of regions, immutable and counted. A ring is a split virtqueue in guest
// memory; a view is a ring together with the generation it was found in. A
// chain is a request as the ring describes it; a queue is the thread that
// serves one ring; a life is the time from a ring's kick descriptor to
// GET_VRING_BASE.
//
// # One request
//
// The driver makes a head available and, if asked to, writes the kick. The
// queue's thread wakes in epoll_wait, reads the available index once, takes the
// head, parses its chain into segments, and calls the handler, which reads and
// writes guest memory through them. The used element goes into a batch; the
// batch is published and, if the driver wants that, signalled when the ring is
// empty, after 32 completions or 128 KiB, or when the handler says so. Only
// before it sleeps does the thread ask for kicks again, and looks once more.
// A handler that must wait detaches the request and completes it from another
// goroutine.
//
// # Invariants
//
// The guest chose every byte of the ring and of what it points to, and changes
// them at any time: each is read once, into private memory, then judged. A
// chain that points outside memory goes back with length 0; any other malformed
// one breaks its queue until the front end restarts it. No panic is reachable
// from ring or message bytes; a fault on memory that its owner truncated breaks
// the queue.
//
// Every head taken is returned exactly once, or kept: what completes while the
// ring is stopped is published when the same ring goes on (a paused machine),
// and forgotten when a driver has reset it. The used index moves only in
// publish and only forward.
//
// A generation is unmapped when its last request has ended. Nobody waits for
// that, and the control loop waits for no request, except that the answer to
// GET_VRING_BASE gives the one that is running a moment (stopGrace) to end:
// the front end holds its big lock until it has the answer.
//
// Received eventfds are shared with the front end: their flags are never
// changed, and kicks never read.
//
// # Locks
//
// queue.mu guards a queue's configuration and the publishing side of its ring;
// it is held for no system call but a signal. The thread takes heads without
// it: see queue.claim. device fields belong to the control loop alone. limiter.mu
// is a leaf; Options.Logf is called without locks.
//
// # Trust
//
// The guest is hostile. The front end may be a VMM that the guest has taken
// over: it can end its connection and break its queues, not the process. The
// handler is trusted to write no more than it reports.
//
// Left to others: confinement (fileserver), FUSE (fuseserver), restarting.
package vhostuser
