package frontend

import (
	"errors"
	"net"
)

// Options describe the machine that a Client pretends to be.
type Options struct {
	Queues     int  // virtqueues to set up, high-priority queue included; 0 means 2
	QueueSize  int  // ring size, a power of two; 0 means 1024
	MemMiB     int  // guest memory; 0 means 64
	NoEventIdx bool // do not negotiate EVENT_IDX
	NoIndirect bool // do not negotiate INDIRECT_DESC
	MemTable   bool // use SET_MEM_TABLE instead of ADD_MEM_REG
	Manual     bool // only connect; the caller sends every message
}

// Client is the VMM's side of one vhost-user connection, with guest memory of
// its own.
type Client struct{}

// Connect negotiates, shares memory and starts all queues. It owns conn.
func Connect(conn *net.UnixConn, o Options) (*Client, error) { return nil, errors.ErrUnsupported }

// Do sends one request on queue q (0 is the high-priority queue) and waits for
// its completion. in are the device-readable parts, outLens the lengths of the
// device-writable parts; parts above 4096 bytes are described page by page in
// pages that are not adjacent, as a Linux guest does. The reply is as long as
// the used length the device reported. Safe for concurrent use.
func (c *Client) Do(q int, in [][]byte, outLens []int) (reply []byte, err error) {
	return nil, errors.ErrUnsupported
}

// Close stops the queues, closes the connection and unmaps guest memory.
func (c *Client) Close() error { return nil }
