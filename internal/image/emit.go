package image

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/image/ext4"
)

// plan is a tree as the ext4 writer takes it. File data comes in the order of
// the layers, which can only be read from front to back.
type plan struct {
	root  *ext4.Inode
	files []*inode           // those with data, in the order of their data
	data  []map[int32]*inode // the same for each layer, by entry number
	size  int64              // bytes of file data
}

// plan orders the tree. It sets the first name of every inode.
func (t *tree) plan(layers int) *plan {
	p := &plan{data: make([]map[int32]*inode, layers)}
	p.root = p.add(t.root)
	slices.SortFunc(p.files, func(a, b *inode) int {
		if a.layer != b.layer {
			return int(a.layer - b.layer)
		}
		return int(a.seq - b.seq)
	})
	return p
}

// ext4Types are the types as ext4 has them.
var ext4Types = [...]uint16{
	typeDir: ext4.Dir, typeRegular: ext4.Regular, typeSymlink: ext4.Symlink,
	typeChar: ext4.Char, typeBlock: ext4.Block, typeFIFO: ext4.FIFO,
}

func (p *plan) add(d *dentry) *ext4.Inode {
	ino := d.ino
	if ino.out != nil && ino.typ != typeDir {
		return ino.out
	}
	ino.first = d
	ino.out = &ext4.Inode{
		Mode: ext4Types[ino.typ] | ino.mode, UID: ino.uid, GID: ino.gid, Sec: ino.sec, Nsec: ino.nsec,
		Target: ino.target, Major: ino.major, Minor: ino.minor, Xattrs: ino.xattrs,
	}
	if ino.typ == typeRegular {
		ino.out.Size = ino.size
	}
	if ino.typ == typeRegular && ino.size > 0 {
		if p.data[ino.layer] == nil {
			p.data[ino.layer] = map[int32]*inode{}
		}
		p.data[ino.layer][ino.seq] = ino
		p.files = append(p.files, ino)
		p.size += ino.size
	}
	out := ino.out
	for _, c := range d.sorted() {
		out.Entries = append(out.Entries, ext4.Entry{Name: c.name, Inode: p.add(c)})
	}
	return out
}

// layout gives everything in the plan its place.
func (b *rootBuilder) layout(p *plan) (*ext4.Image, error) {
	files := make([]*ext4.Inode, len(p.files))
	for i, ino := range p.files {
		files[i] = ino.out
	}
	m, err := ext4.New(p.root, files, uuidOf(digest(b.img.ManifestDigest)))
	if err != nil {
		return nil, badImage("no root image can hold it: %v", err)
	}
	return m, nil
}

// uuidOf makes a version 8 (vendor-specific, RFC 9562) UUID of a digest: the
// same image always is the same bytes.
func uuidOf(d digest) (u [16]byte) {
	_, _ = hex.Decode(u[:], []byte(d.hex()[:32])) // a digest is hexadecimal
	u[6] = u[6]&0x0f | 0x80
	u[8] = u[8]&0x3f | 0x80
	return u
}

// writeExt4 writes the root image from front to back.
func (b *rootBuilder) writeExt4(ctx context.Context, p *plan, m *ext4.Image) error {
	w := &imageWriter{ctx: ctx, f: b.out, store: b.store}
	err := b.out.Truncate(0)
	if err == nil {
		err = b.writeParts(ctx, p, m, w)
	}
	if err == nil {
		err = b.out.Truncate(m.Size()) // holes at the end included
	}
	var own *errdefs.Error
	if err != nil && !errors.As(err, &own) {
		err = errdefs.Wrap(errdefs.IO, err, "root image of %s", b.img.Reference)
	}
	return err
}

func (b *rootBuilder) writeParts(ctx context.Context, p *plan, m *ext4.Image, w io.Writer) error {
	bw := bufio.NewWriterSize(w, 512<<10)
	if err := m.WriteMeta(bw); err != nil {
		return err
	}
	buf := make([]byte, 128<<10)
	err := b.eachFile(ctx, p, func(ino *inode, r io.Reader) error {
		if err := copyExactly(bw, r, ino.size, buf); err != nil {
			return err
		}
		_, err := bw.Write(zeros[:ext4.Padding(ino.size)])
		return err
	})
	return errors.Join(err, bw.Flush())
}

// copyExactly copies the content of a file.
func copyExactly(w io.Writer, r io.Reader, size int64, buf []byte) error {
	// Only Read and Write: the tar types' own shortcuts treat holes specially.
	n, err := io.CopyBuffer(onlyWriter{w}, onlyReader{r}, buf)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes instead of %d", n, size)
	}
	return err
}

type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

// eachFile calls put with the data of every file of the plan, in its order.
func (b *rootBuilder) eachFile(ctx context.Context, p *plan, put func(ino *inode, r io.Reader) error) error {
	var done int64
	for i, want := range p.data {
		if want == nil {
			continue
		}
		err := b.eachOfLayer(ctx, i, want, func(ino *inode, r io.Reader) error {
			r, keep := b.capture(ino, r)
			if err := put(ino, r); err != nil {
				return named(ino.first, err)
			}
			keep()
			done += ino.size
			b.rep.send(Progress{Phase: PhaseBuild, Digest: b.img.ManifestDigest, Layers: len(b.img.Layers), Current: done, Total: p.size})
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// eachOfLayer reads the wanted files of one layer, in its order.
func (b *rootBuilder) eachOfLayer(ctx context.Context, i int, want map[int32]*inode, put func(ino *inode, r io.Reader) error) error {
	y := b.img.Layers[i]
	r, err := b.store.openLayer(ctx, y, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	left := len(want)
	err = r.each(y, func(h *tar.Header, seq int32) error {
		ino := want[seq]
		if ino == nil {
			return nil
		}
		if err := put(ino, r); err != nil {
			return err
		}
		if left--; left == 0 {
			return errLayerDone
		}
		return nil
	})
	if err == nil {
		return badImage("layer %s: %d files are gone since it was indexed", y.BlobDigest, left)
	}
	if errors.Is(err, errLayerDone) {
		return nil
	}
	return err
}

var errLayerDone = errors.New("nothing more wanted of this layer")

func named(d *dentry, err error) error {
	var own *errdefs.Error
	if errors.As(err, &own) {
		return err
	}
	return badImage("path %.200q: %v", d.path(), err)
}
