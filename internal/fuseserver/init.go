package fuseserver

import (
	"golang.org/x/sys/unix"

	w "github.com/microsandbox-go/microsandbox/internal/fusewire"
)

const (
	maxWrite = 1 << 20 // bytes of data in one request
	maxPages = maxWrite / 4096
	// maxBackground lets the guest keep that many reads and writes of its
	// page cache in flight; its default of 12 starves a deep queue.
	maxBackground = 64
)

// granted are the features that every guest gets if it offers them. Not here,
// on purpose: POSIX_LOCKS and FLOCK_LOCKS (see lockFlags), WRITEBACK_CACHE (the
// guest owns sizes and times then, wrong for shared files), POSIX_ACL and
// SECURITY_CTX (attributes that are refused), DAX.
const granted = w.InitAsyncRead | w.InitBigWrites | w.InitParallelDirops | w.InitMaxPages |
	w.InitAtomicOTrunc | w.InitAsyncDIO | w.InitHandleKillprivV2 | w.InitSubmounts | w.InitExt

// opInit starts a session; one that is open already ends without DESTROY,
// because its guest is gone.
func (c *call) opInit() errno {
	var in w.InitInOld
	rest, _ := w.Decode(c.args, &in)
	out := w.InitOut{Major: w.Major, Minor: min(in.Minor, w.Minor)}
	switch {
	case in.Major > w.Major: // the guest tries again with our version
		out.Minor = w.Minor
		c.body = w.Put(c.reply[replySize:], &out)
		return 0
	case in.Major < w.Major || in.Minor < w.MinMinor:
		return unix.EPROTO
	}
	if err := c.s.beginSession(c); err != 0 {
		return err
	}
	offered := w.InitFlags(in.Flags)
	var more w.InitIn
	if _, ok := w.Decode(c.args, &more); ok && len(rest) >= 4 && offered&w.InitExt != 0 {
		offered |= w.InitFlags(more.Flags2) << 32
	}
	grant := offered & (granted | c.s.cacheFlags() | c.s.lockFlags())
	out.Flags, out.Flags2 = uint32(grant), uint32(grant>>32)
	out.MaxReadahead = in.MaxReadahead
	out.MaxBackground, out.CongestionThreshold = maxBackground, maxBackground/4*3
	out.MaxWrite, out.MaxPages = maxWrite, maxPages
	out.TimeGran = 1
	c.body = w.Put(c.reply[replySize:], &out)
	return 0
}

// cacheFlags are the features that depend on what the guest may keep. What
// READDIRPLUS tells would be old when it arrives at a guest that keeps nothing.
func (s *Server) cacheFlags() w.InitFlags {
	switch s.cache {
	case cacheNone:
		return w.InitAutoInvalData
	case cacheAlways:
		return w.InitCacheSymlinks | w.InitReaddirplus | w.InitReaddirplusAuto
	}
	return w.InitAutoInvalData | w.InitReaddirplus | w.InitReaddirplusAuto
}

func (c *call) opDestroy() errno {
	c.s.endSession()
	return 0
}

// lockFlags has the guest send its locks. On a read-only share it keeps them to
// itself: somebody who may only read must not stop those who write elsewhere.
func (s *Server) lockFlags() w.InitFlags {
	if s.readonly {
		return 0
	}
	return w.InitPosixLocks | w.InitFlockLocks
}

// opInterrupt ends the wait for a lock; no other request waits for anything
// that may never come.
func (c *call) opInterrupt() errno {
	var in w.InterruptIn
	w.Decode(c.args, &in)
	c.se.locks.interrupt(in.Unique)
	return 0
}
