package microsandbox

import (
	"context"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
	"github.com/microsandbox-go/microsandbox/internal/volstore"
	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// maxIdleVolumes is how many volumes that nobody uses stay open for the next
// call. Each holds four descriptors, five if it was written to.
const maxIdleVolumes = 32

// openVolumes keeps the volumes of a home open between calls of [VolumeFs],
// which has no Close. They are keyed by id: a later volume of the same name is
// another one.
type openVolumes struct {
	store *volstore.Store
	home  home.Dir

	mu    sync.Mutex
	byID  map[string]*openVolume // guarded by mu
	clock uint64                 // guarded by mu
}

// openVolume is a directory volume opened by id.
type openVolume struct {
	owner *openVolumes
	id    string
	fs    *volumefs.FS
	data  *volstore.Data
	state *os.File // the state directory, where temporaries have their names; may be nil

	users    int    // guarded by owner.mu
	lastUsed uint64 // guarded by owner.mu
	dropped  bool   // guarded by owner.mu; closed by its last user
}

// acquire returns the open volume; release gives it back.
func (o *openVolumes) acquire(ctx context.Context, v *volumeInfo) (*openVolume, error) {
	if found := o.take(v.id); found != nil {
		return found, nil
	}
	opened, err := o.openNew(ctx, v)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	if found := o.byID[v.id]; found != nil { // somebody was faster
		found.users++
		o.mu.Unlock()
		opened.close()
		return found, nil
	}
	if o.byID == nil {
		o.byID = map[string]*openVolume{}
	}
	opened.users = 1
	o.byID[v.id] = opened
	evicted := o.evict()
	o.mu.Unlock()
	for _, e := range evicted {
		e.close()
	}
	return opened, nil
}

func (o *openVolumes) take(id string) *openVolume {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := o.byID[id]
	if v != nil {
		v.users++
	}
	return v
}

func (o *openVolumes) openNew(ctx context.Context, v *volumeInfo) (*openVolume, error) {
	data, err := o.store.OpenData(ctx, v.id)
	if err != nil {
		return nil, err
	}
	alive := func() error {
		err := data.Alive()
		if errdefs.Is(err, errdefs.VolumeNotFound) {
			return goneVolume("use", v)
		}
		return err
	}
	opened := &openVolume{owner: o, id: v.id, data: data}
	// Without a state directory (power cut, and nothing written since) they have
	// their names in the volume.
	opened.state, _ = os.OpenFile(o.home.State(v.id), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	opened.fs, err = volumefs.New(data.Dir, volumefs.Options{Volume: v.name, Alive: alive, Scratch: opened.state, Ledger: func() (*ledger.Writer, error) {
		return o.store.NewWriter(context.Background(), v.id)
	}})
	if err != nil {
		opened.close()
		return nil, err
	}
	return opened, nil
}

// evict takes idle volumes, the least recently used ones, out of the map until
// few enough are left, and returns them for closing. mu is held.
func (o *openVolumes) evict() (out []*openVolume) {
	for len(o.byID) > maxIdleVolumes {
		var oldest *openVolume
		for _, v := range o.byID {
			if v.users == 0 && (oldest == nil || v.lastUsed < oldest.lastUsed) {
				oldest = v
			}
		}
		if oldest == nil {
			break
		}
		delete(o.byID, oldest.id)
		out = append(out, oldest)
	}
	return out
}

// closeIdle closes the volumes that nobody uses.
func (o *openVolumes) closeIdle() {
	o.mu.Lock()
	var idle []*openVolume
	for id, v := range o.byID {
		v.dropped = true
		delete(o.byID, id)
		if v.users == 0 {
			idle = append(idle, v)
		}
	}
	o.mu.Unlock()
	for _, v := range idle {
		v.close()
	}
}

// release ends one use; err is what came of it. A volume that turned out to be
// removed is not kept.
func (v *openVolume) release(err error) {
	o := v.owner
	o.mu.Lock()
	v.users--
	o.clock++
	v.lastUsed = o.clock
	if errdefs.Is(err, errdefs.VolumeNotFound) && !v.dropped {
		v.dropped = true
		delete(o.byID, v.id)
	}
	closing := v.dropped && v.users == 0
	o.mu.Unlock()
	if closing {
		v.close()
	}
}

func (v *openVolume) close() {
	if v.fs != nil {
		_ = v.fs.Close()
	}
	if v.state != nil {
		_ = v.state.Close()
	}
	_ = v.data.Close()
}
