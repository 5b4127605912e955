// Package frontend is the VMM's side of the vhost-user protocol, without a
// VMM: tests, benchmarks and fuzzers use it to drive a device at native speed.
//
// A Client owns a connection and guest memory (a memfd shared with the
// device). A Queue is one split virtqueue with its kick, call and err eventfds.
// A Chain is a request whose descriptors and buffers are laid out in guest
// memory once and can be submitted many times.
//
// There are three levels of use. Client.Do sends one request and waits, from
// any goroutine. NewChain, Submit, Poll and Wait keep many requests in flight
// from one thread without allocating, the way a Linux driver does: payload is
// described page by page in pages that are not adjacent, kicks and calls follow
// EVENT_IDX. Message, WriteDescriptor, PushHead and SetAvailable write whatever
// the caller likes, which is how hostile guests and VMMs are played.
//
// The two upper levels must not be used at the same time on one queue.
package frontend
