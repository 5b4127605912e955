package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/failpoint"
	"github.com/microsandbox-go/microsandbox/internal/home"
)

var (
	rootWritten  = failpoint.New("image.root-written")
	rootMetaMade = failpoint.New("image.root-described")
	rootFinished = failpoint.New("image.root-finished")
)

// rootFormat changes when older root images must not be used any more: they are
// then built again.
const rootFormat = 1

// rootMeta is kept beside a root image: what is needed of its content without
// reading the file system. It is written before the image is complete, so an
// image without it is not one.
type rootMeta struct {
	Format int    `json:"format"`
	Size   int64  `json:"size"` // bytes of the image
	Passwd string `json:"passwd"`
	Group  string `json:"group"`
}

// readRoot returns the description of a complete root image, nil if there is none.
func (s *Store) readRoot(d digest) *rootMeta {
	f, err := home.OpenFile(s.metaPath(d), unix.O_RDONLY)
	if err != nil {
		return nil
	}
	defer f.Close()
	const maxMeta = 16 << 20 // two user files, escaped
	raw, err := readBounded(f, maxMeta)
	if err != nil {
		return nil
	}
	var m rootMeta
	if err := decodeJSON(raw, maxMeta, &m); err != nil || m.Format != rootFormat {
		return nil
	}
	fi, err := os.Stat(s.rootPath(d))
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != m.Size {
		return nil
	}
	return &m
}

// attachRoot fills in what the root image says, if it is there.
func (s *Store) attachRoot(img *Image) bool {
	d := digest(img.ManifestDigest)
	m := s.readRoot(d)
	if m == nil {
		return false
	}
	img.RootFS, img.meta = s.rootPath(d), m
	if fi, err := os.Stat(s.metaPath(d)); err == nil && fi.ModTime().After(img.CreatedAt) {
		img.LastUsedAt = fi.ModTime().UTC()
	}
	return true
}

// touch notes that an image is used. The time is worth no fsync and no error.
func (s *Store) touch(img *Image) {
	now := time.Now().UTC()
	if os.Chtimes(s.metaPath(digest(img.ManifestDigest)), time.Time{}, now) == nil {
		img.LastUsedAt = now
	}
}

// buildRoot makes the root image of an image whose blobs are present, once:
// whoever comes meanwhile waits for it. After a crash it is absent or complete.
func (s *Store) buildRoot(ctx context.Context, img *Image, progress func(Progress)) error {
	if s.attachRoot(img) {
		return nil
	}
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	d := digest(img.ManifestDigest)
	making := s.rootPath(d) + buildingSuffix
	f, err := takeMaking(ctx, making, func() bool { return s.readRoot(d) != nil })
	if err != nil {
		return err
	}
	if f != nil {
		defer f.Close()
		b := &rootBuilder{store: s, img: img, rep: newReporter(progress), out: f}
		meta, err := b.build(ctx)
		if err == nil {
			err = s.finishRoot(f, making, d, meta)
		}
		if err != nil {
			_ = os.Remove(making) // still locked: whoever waits notices and makes its own
			return err
		}
	}
	if !s.attachRoot(img) {
		return errdefs.New(errdefs.Internal, "root image of %s vanished while it was made", img.Reference)
	}
	return nil
}

func (s *Store) finishRoot(f *os.File, making string, d digest, meta *rootMeta) error {
	if err := rootWritten.Hit(); err != nil {
		return err
	}
	raw, err := json.Marshal(meta)
	if err == nil {
		err = writeFile(s.metaPath(d), raw)
	}
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "root image of %s", d)
	}
	if err := rootMetaMade.Hit(); err != nil {
		return err
	}
	if err := finish(f, making, s.rootPath(d)); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "root image of %s", d)
	}
	if err := f.Chmod(0o444); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "root image of %s", d)
	}
	return rootFinished.Hit()
}

// rootBuilder makes one root image.
type rootBuilder struct {
	store *Store
	img   *Image
	rep   *reporter
	out   *os.File

	tree   *tree
	passwd *inode // of /etc/passwd, nil if the image has none
	group  *inode
	meta   rootMeta
}

// build indexes all layers and writes the file system. The result is in out, not
// yet synced.
func (b *rootBuilder) build(ctx context.Context) (*rootMeta, error) {
	if err := b.index(ctx); err != nil {
		return nil, err
	}
	b.tree.addMountPoints()
	b.passwd, b.group = b.tree.file("/etc/passwd"), b.tree.file("/etc/group")
	plan := b.tree.plan(len(b.img.Layers))
	m, err := b.layout(plan)
	if err != nil {
		return nil, err
	}
	if err := b.room(m.Size()); err != nil {
		return nil, err
	}
	if err := b.writeExt4(ctx, plan, m); err != nil {
		return nil, err
	}
	b.meta.Format, b.meta.Size = rootFormat, m.Size()
	return &b.meta, nil
}

// index merges all layers, checking their digests on the way.
func (b *rootBuilder) index(ctx context.Context) error {
	l := b.store.limits
	b.tree = newTree(l)
	budget := &budget{limits: l}
	for _, y := range b.img.Layers {
		budget.compressed += y.CompressedSize
	}
	for i, y := range b.img.Layers {
		if err := b.indexLayer(ctx, i, y, budget); err != nil {
			return err
		}
	}
	return nil
}

func (b *rootBuilder) indexLayer(ctx context.Context, i int, y Layer, budget *budget) error {
	r, err := b.store.openLayer(ctx, y, budget)
	if err != nil {
		return err
	}
	defer r.Close()
	report := func() {
		b.rep.send(Progress{Phase: PhaseIndex, Digest: y.BlobDigest, Layer: i + 1, Layers: len(b.img.Layers), Current: r.read(), Total: y.CompressedSize})
	}
	const every = 256 // entries between two reports
	defer report()
	return r.each(y, func(h *tar.Header, seq int32) error {
		if seq%every == 0 {
			report()
		}
		return b.tree.apply(h, int32(i), seq)
	})
}

// room refuses an image that does not fit before writing it.
func (b *rootBuilder) room(bytes int64) error {
	free, err := b.store.free(b.store.dir)
	if err != nil {
		return errdefs.Wrap(errdefs.IO, err, "free space of %s", b.store.dir)
	}
	if bytes > free-b.store.limits.reserve {
		return noSpace(b.store.dir, bytes, free)
	}
	return nil
}

// capture keeps a copy of a user file on its way into the image.
func (b *rootBuilder) capture(ino *inode, r io.Reader) (io.Reader, func()) {
	if ino != b.passwd && ino != b.group {
		return r, func() {}
	}
	c := &head{left: maxUserFile}
	return io.TeeReader(r, c), func() {
		if ino == b.passwd {
			b.meta.Passwd = string(c.kept)
		}
		if ino == b.group {
			b.meta.Group = string(c.kept)
		}
	}
}

// head keeps the first bytes written to it.
type head struct {
	kept []byte
	left int
}

func (h *head) Write(p []byte) (int, error) {
	n := min(len(p), h.left)
	h.kept = append(h.kept, p[:n]...)
	h.left -= n
	return len(p), nil
}
