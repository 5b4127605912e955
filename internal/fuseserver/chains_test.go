package fuseserver

import (
	"testing"
	"unsafe"
)

// TestChains: a table of either order grows and shrinks with what is in it,
// and finds that and nothing else.
func TestChains(t *testing.T) {
	const many = 1000
	find := map[order]func(*chains, *inode) *inode{
		byKey: func(c *chains, n *inode) *inode { return c.findKey(n.key) },
		byID:  func(c *chains, n *inode) *inode { return c.findID(n.id) },
	}
	for by, find := range find {
		c := newChains(by)
		nodes := make([]*inode, many)
		for i := range nodes {
			nodes[i] = &inode{id: uint64(i * nodeShards), key: identity{dev: 1, ino: uint64(i), mnt: 2}}
			c.insert(nodes[i])
		}
		if c.n != many || len(c.heads) < many || len(c.all()) != many {
			t.Errorf("%d inodes with %d heads, want %d", c.n, len(c.heads), many)
		}
		for i, n := range nodes {
			if find(&c, n) != n {
				t.Fatalf("inode %d is not found", i)
			}
			c.remove(n)
			if find(&c, n) != nil {
				t.Fatalf("inode %d is found after it was removed", i)
			}
			if last := nodes[many-1]; i < many-1 && find(&c, last) != last {
				t.Fatalf("the last inode is lost with inode %d", i)
			}
		}
		if c.n != 0 || len(c.heads) != minHeads {
			t.Errorf("%d inodes and %d heads are left", c.n, len(c.heads))
		}
	}
}

// TestInodeSize: a byte more and the allocator would take 144.
func TestInodeSize(t *testing.T) {
	if n := unsafe.Sizeof(inode{}); n > 128 {
		t.Errorf("an inode is %d bytes long", n)
	}
}
