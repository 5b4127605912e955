package fuseserver

import (
	"sync/atomic"
	"testing"
)

// TestNodesOfOneMix: identities that fold into the same word stay apart.
func TestNodesOfOneMix(t *testing.T) {
	s := &Server{work: newWorkers(nil), fds: new(atomic.Int64)}
	defer s.work.close()
	table := newNodeTable()
	var nodes []*inode
	for i := range uint64(4) { // dev and ino cancel each other out
		n := &inode{srv: s, id: i + 2, fd: -1, key: identity{dev: i, ino: 99 ^ i<<40}}
		if n.key.mix() != 99 {
			t.Fatal("not the same mix")
		}
		nodes = append(nodes, n)
		if got := table.add(n); got != n {
			t.Fatalf("node %d was taken for %d", n.id, got.id)
		}
		n.drop()
	}
	for _, i := range []int{1, 3, 0, 2} {
		for _, n := range nodes {
			known := table.known(n.key)
			if known != nil && known != n {
				t.Errorf("node %d was found as %d", n.id, known.id)
			}
			if known != nil {
				table.forget(n.id, 1)
				known.drop()
			}
		}
		table.forget(nodes[i].id, 1)
		if table.known(nodes[i].key) != nil {
			t.Errorf("node %d is still known", nodes[i].id)
		}
	}
	if table.size() != 0 {
		t.Errorf("%d nodes left", table.size())
	}
	add := table.add(nodes[0])
	add.drop()
	nodes[1].refs.Store(0)
	table.add(nodes[1]).drop()
	table.close()
	if table.size() != 0 || table.add(nodes[2]) != nil {
		t.Error("the table is not closed")
	}
}

// TestRetire: a node that nobody uses is let go of, but not soon after the guest
// looked it up: it may be about to open it.
func TestRetire(t *testing.T) {
	s := &Server{work: newWorkers(nil), fds: new(atomic.Int64)}
	defer s.work.close()
	table := newNodeTable()
	n := &inode{srv: s, id: 2, fd: -1, key: identity{ino: 7}}
	table.add(n).drop()
	hold := table.find(n.key)
	for range graceTicks {
		if table.retire(hold) {
			t.Fatal("retired too soon")
		}
		table.time.Add(1)
	}
	table.known(n.key).drop() // looked up once more
	if table.retire(hold) {
		t.Fatal("retired after a lookup")
	}
	table.time.Add(graceTicks)
	user := table.get(n.id)
	if table.retire(hold) {
		t.Fatal("retired while it was used")
	}
	user.drop()
	if !table.retire(hold) || table.find(n.key) != nil || table.get(n.id) != nil {
		t.Error("not retired")
	}
	hold.drop()
	hold.drop() // the table's
}
