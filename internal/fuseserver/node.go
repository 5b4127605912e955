package fuseserver

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// identity tells host inodes apart. The mount id keeps one directory seen
// through two mounts apart; it is 0 where the kernel does not tell it.
type identity struct{ dev, ino, mnt uint64 }

func identityOf(stx *unix.Statx_t) identity {
	id := identity{dev: unix.Mkdev(stx.Dev_major, stx.Dev_minor), ino: stx.Ino}
	if stx.Mask&unix.STATX_MNT_ID != 0 {
		id.mnt = stx.Mnt_id
	}
	return id
}

// inode is one host inode that the guest knows. Everything but the counters
// and the overlay cache is fixed for its life.
//
// It is 128 bytes long. What a lookup of a known inode needs comes first, so
// that it lies in one cache line.
type inode struct {
	key      identity
	next     [orders]*inode // guarded by the key shard and the id shard
	nlookup  uint64         // guarded by its key shard
	id       uint64
	refs     atomic.Int32 // one for the table, one per user
	format   uint32       // file type bits of the host's mode
	srv      *Server
	fd       int
	quick    bool        // an fstat of fd never sleeps
	submount bool        // on another mount than its parent
	seen     uint16      // nodeTable.time of the last lookup; guarded by its key shard
	large    atomic.Bool // was once at least slowClose bytes long
	ov       overlayCache
}

// hold takes another reference for somebody who has one.
func (n *inode) hold() *inode {
	n.refs.Add(1)
	return n
}

// drop gives a reference back and closes the inode with the last one.
func (n *inode) drop() {
	if n.refs.Add(-1) == 0 {
		n.srv.closeNode(n)
	}
}

func (n *inode) isDir() bool { return n.format == unix.S_IFDIR }

// openable reports whether opening the inode on the host is harmless.
func (n *inode) openable() bool { return n.format == unix.S_IFDIR || n.format == unix.S_IFREG }

const nodeShards = 64

// nodeTable finds inodes by node id and by identity. A closed table takes
// nothing in any more.
type nodeTable struct {
	time  atomic.Uint32 // in polls; see retire
	byID  [nodeShards]idShard
	byKey [nodeShards]keyShard
}

type idShard struct {
	mu    sync.RWMutex
	nodes chains // guarded by mu; shards of busy nodes do not share a cache line
}

type keyShard struct {
	mu     sync.Mutex
	nodes  chains // guarded by mu
	closed bool   // guarded by mu
	_      [64 - 56]byte
}

func newNodeTable() *nodeTable {
	t := &nodeTable{}
	for i := range nodeShards {
		t.byID[i].nodes = newChains(byID)
		t.byKey[i].nodes = newChains(byKey)
	}
	return t
}

func (t *nodeTable) idShard(id uint64) *idShard { return &t.byID[id%nodeShards] }

func (t *nodeTable) keyShard(k identity) *keyShard { return &t.byKey[k.hash()>>58] }

// mix folds an identity into one word. On one mount it is unique.
func (k identity) mix() uint64 { return k.ino ^ k.dev<<40 ^ k.mnt<<52 }

// hash spreads identities: the six highest bits choose the shard, lower ones
// the chain.
func (k identity) hash() uint64 {
	h := k.mix() * 0x9e3779b97f4a7c15
	return h ^ h>>32
}

// get returns the inode of a node id with a reference, nil if there is none.
func (t *nodeTable) get(id uint64) *inode {
	s := t.idShard(id)
	s.mu.RLock()
	n := s.nodes.findID(id)
	if n != nil {
		n.refs.Add(1)
	}
	s.mu.RUnlock()
	return n
}

// known counts a lookup of an inode that the table has, and returns it with a
// reference; nil if the table does not have it.
func (t *nodeTable) known(k identity) *inode {
	s := t.keyShard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.findKey(k)
	if n != nil {
		n.count()
		n.seen = t.now()
		n.refs.Add(1)
	}
	return n
}

// find returns the inode of an identity with a reference, nil if there is none.
func (t *nodeTable) find(k identity) *inode {
	s := t.keyShard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes.findKey(k)
	if n != nil {
		n.refs.Add(1)
	}
	return n
}

// now is the low half of the time: differences of less than an hour tell.
func (t *nodeTable) now() uint16 { return uint16(t.time.Load()) }

// peek returns the inode of an identity without counting or holding it; only
// its fixed fields and its overlay cache may be looked at.
func (t *nodeTable) peek(k identity) *inode {
	s := t.keyShard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes.findKey(k)
}

// count adds a lookup. The count saturates: such a node lives for ever.
func (n *inode) count() {
	if n.nlookup < 1<<63 {
		n.nlookup++
	}
}

// add takes a new inode in, counts one lookup and returns it with a reference
// for the caller. If another thread was first, its inode is returned and n is
// left to the caller, as it is if the table is closed (nil).
func (t *nodeTable) add(n *inode) *inode {
	s := t.keyShard(n.key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	if old := s.nodes.findKey(n.key); old != nil {
		old.count()
		old.seen = t.now()
		return old.hold()
	}
	n.nlookup, n.seen = 1, t.now()
	n.refs.Store(2)
	s.nodes.insert(n)
	i := t.idShard(n.id)
	i.mu.Lock()
	i.nodes.insert(n)
	i.mu.Unlock()
	return n
}

// forget takes lookups back. It reports false if the node did not have as
// many; then all are taken. An unknown id and the root are ignored.
func (t *nodeTable) forget(id, lookups uint64) bool {
	n := t.get(id)
	if n == nil {
		return true
	}
	defer n.drop()
	if id == rootID {
		return true
	}
	s := t.keyShard(n.key)
	s.mu.Lock()
	had := n.nlookup
	n.nlookup -= min(had, lookups)
	dead := had > 0 && n.nlookup == 0
	if dead {
		t.remove(s, n)
	}
	s.mu.Unlock()
	if dead {
		n.drop()
	}
	return lookups <= had
}

// graceTicks is how many polls a node is kept after the guest looked it up. ESTALE
// makes the guest's kernel look once more and open what it finds, but no third time:
// a file that is replaced again and again must be there long enough for that.
const graceTicks = 5

// retire takes out an inode that nobody uses but the caller, who holds it; then the
// table's reference is the caller's too. The guest may still remember its node id,
// and gets ESTALE for it.
func (t *nodeTable) retire(n *inode) bool {
	s, i := t.keyShard(n.key), t.idShard(n.id)
	s.mu.Lock()
	defer s.mu.Unlock()
	i.mu.Lock()
	unused := n.nlookup > 0 && n.refs.Load() == 2 && n.id != rootID && t.now()-n.seen >= graceTicks
	if unused {
		i.nodes.remove(n)
	}
	i.mu.Unlock()
	if unused {
		s.nodes.remove(n)
		n.nlookup = 0
	}
	return unused
}

// remove takes n out of both tables; its key shard s is locked.
func (t *nodeTable) remove(s *keyShard, n *inode) {
	s.nodes.remove(n)
	i := t.idShard(n.id)
	i.mu.Lock()
	i.nodes.remove(n)
	i.mu.Unlock()
}

// close empties the table for good.
func (t *nodeTable) close() {
	for i := range t.byKey {
		s := &t.byKey[i]
		s.mu.Lock()
		s.closed = true
		gone := s.nodes.all()
		for _, n := range gone {
			n.nlookup = 0
			t.remove(s, n)
		}
		s.mu.Unlock()
		for _, n := range gone {
			n.drop()
		}
	}
}

// size returns the number of nodes.
func (t *nodeTable) size() int {
	total := 0
	for i := range t.byID {
		s := &t.byID[i]
		s.mu.RLock()
		total += s.nodes.n
		s.mu.RUnlock()
	}
	return total
}
