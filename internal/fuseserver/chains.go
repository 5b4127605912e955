package fuseserver

// chains is a hash table of inodes that are linked through themselves. A
// lookup touches one head and the inode, which is less memory, and half the
// time, of a map; taking an inode in or out allocates nothing but, now and
// then, the heads. Whoever uses it has a lock.
type chains struct {
	heads []*inode // a power of two of them
	n     int      // inodes
	by    order
}

// order is what a table of inodes is searched by, and which link is its own.
type order int

const (
	byKey order = iota
	byID
	orders
)

const minHeads = 4

func newChains(by order) chains { return chains{heads: make([]*inode, minHeads), by: by} }

// hash spreads the inodes of one shard: their shard is made of other bits.
func (n *inode) hash(by order) uint64 {
	if by == byID {
		return n.id / nodeShards
	}
	return n.key.hash()
}

func (t *chains) head(hash uint64) **inode { return &t.heads[hash&uint64(len(t.heads)-1)] }

func (t *chains) findID(id uint64) *inode {
	n := *t.head(id / nodeShards)
	for n != nil && n.id != id {
		n = n.next[byID]
	}
	return n
}

func (t *chains) findKey(k identity) *inode {
	n := *t.head(k.hash())
	for n != nil && n.key != k {
		n = n.next[byKey]
	}
	return n
}

// insert takes in an inode that is in no chain of this order.
func (t *chains) insert(n *inode) {
	if t.n == len(t.heads) {
		t.resize(2 * t.n)
	}
	t.n++
	t.link(n)
}

func (t *chains) link(n *inode) {
	head := t.head(n.hash(t.by))
	n.next[t.by] = *head
	*head = n
}

// remove takes out an inode that is there.
func (t *chains) remove(n *inode) {
	p := t.head(n.hash(t.by))
	for *p != n {
		p = &(*p).next[t.by]
	}
	*p = n.next[t.by]
	n.next[t.by] = nil
	t.n--
	if t.n < len(t.heads)/8 && len(t.heads) > minHeads {
		t.resize(len(t.heads) / 2)
	}
}

func (t *chains) resize(heads int) {
	all := t.all()
	t.heads = make([]*inode, heads)
	for _, n := range all {
		t.link(n)
	}
}

// all returns the inodes of the table.
func (t *chains) all() []*inode {
	all := make([]*inode, 0, t.n)
	for _, n := range t.heads {
		for ; n != nil; n = n.next[t.by] {
			all = append(all, n)
		}
	}
	return all
}
