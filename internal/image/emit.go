package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// plan is the order in which a tree is written. The ext4 writer takes every
// name once, parents first, and a hard link only after its target; layers can
// only be read from front to back.
type plan struct {
	tree  *tree
	nodes []*dentry          // all that needs no data, parents first
	data  []map[int32]*inode // for each layer: files with data by entry number
	links []*dentry          // further names of inodes
	size  int64              // bytes of file data
	bytes int64              // of the image, estimated from above
}

// plan orders the tree. It sets the first name of every inode.
func (t *tree) plan(layers int) *plan {
	p := &plan{tree: t, data: make([]map[int32]*inode, layers)}
	p.add(t.root)
	return p
}

func (p *plan) add(d *dentry) {
	const block, inodeSize = 4096, 256
	ino := d.ino
	p.bytes += int64(len(d.name)) + 16
	if ino.first != nil && ino.typ != typeDir {
		p.links = append(p.links, d)
		return
	}
	ino.first = d
	p.bytes += inodeSize + (ino.size+block-1)/block*block
	if len(ino.xattrs) > 0 || len(ino.target) > 59 || ino.typ == typeDir {
		p.bytes += 2 * block
	}
	if ino.typ != typeRegular || ino.size == 0 {
		p.nodes = append(p.nodes, d)
	} else {
		if p.data[ino.layer] == nil {
			p.data[ino.layer] = map[int32]*inode{}
		}
		p.data[ino.layer][ino.seq] = ino
		p.size += ino.size
	}
	for _, c := range d.sorted() {
		p.add(c)
	}
}

// maxExt4 is the size up to which the writer reserves group descriptors: the
// limit on unpacked bytes, a block for each of a million files, and room.
const maxExt4 = 40 << 30

// writeExt4 streams the plan as a tar archive through the ext4 writer.
func (b *rootBuilder) writeExt4(ctx context.Context, p *plan) error {
	w := &imageWriter{ctx: ctx, f: b.out, store: b.store}
	if err := w.reset(); err != nil {
		return errdefs.Wrap(errdefs.IO, err, "root image of %s", b.img.Reference)
	}
	pr, pw := io.Pipe()
	emitted := make(chan error, 1)
	go func() {
		err := b.emit(ctx, p, pw)
		pw.CloseWithError(err)
		emitted <- err
	}()
	err := tar2ext4.ConvertTarToExt4(pr, w, tar2ext4.MaximumDiskSize(maxExt4))
	pr.CloseWithError(errStopped)
	if eerr := <-emitted; eerr != nil && !errors.Is(eerr, errStopped) {
		return eerr
	}
	if err == nil {
		err = w.flush()
	}
	var own *errdefs.Error
	if err != nil && !errors.As(err, &own) {
		err = errdefs.Wrap(errdefs.IO, err, "root image of %s", b.img.Reference)
	}
	return err
}

var errStopped = errors.New("writer stopped")

func (b *rootBuilder) emit(ctx context.Context, p *plan, w io.Writer) error {
	bw := bufio.NewWriterSize(w, 256<<10)
	tw := tar.NewWriter(bw)
	for _, d := range p.nodes {
		if err := tw.WriteHeader(d.ino.header()); err != nil {
			return named(d, err)
		}
	}
	var done int64
	for i, want := range p.data {
		if want == nil {
			continue
		}
		if err := b.emitLayer(ctx, tw, i, want, &done, p.size); err != nil {
			return err
		}
	}
	for _, d := range p.links {
		h := &tar.Header{Typeflag: tar.TypeLink, Name: d.path(), Linkname: d.ino.first.path(), Format: tar.FormatPAX}
		if err := tw.WriteHeader(h); err != nil {
			return named(d, err)
		}
	}
	return errors.Join(tw.Close(), bw.Flush())
}

// emitLayer copies the wanted files of one layer, in its order.
func (b *rootBuilder) emitLayer(ctx context.Context, tw *tar.Writer, i int, want map[int32]*inode, done *int64, total int64) error {
	y := b.img.Layers[i]
	r, err := b.store.openLayer(ctx, y, nil)
	if err != nil {
		return err
	}
	defer r.Close()
	buf := make([]byte, 128<<10)
	left := len(want)
	err = r.each(y, func(h *tar.Header, seq int32) error {
		ino := want[seq]
		if ino == nil {
			return nil
		}
		if err := b.emitFile(tw, ino, r, buf); err != nil {
			return err
		}
		*done += ino.size
		b.rep.send(Progress{Phase: PhaseBuild, Digest: b.img.ManifestDigest, Layers: len(b.img.Layers), Current: *done, Total: total})
		if left--; left == 0 {
			return errLayerDone
		}
		return nil
	})
	if errors.Is(err, errLayerDone) {
		return nil
	}
	return err
}

var errLayerDone = errors.New("nothing more wanted of this layer")

func (b *rootBuilder) emitFile(tw *tar.Writer, ino *inode, r io.Reader, buf []byte) error {
	if err := tw.WriteHeader(ino.header()); err != nil {
		return named(ino.first, err)
	}
	r, keep := b.capture(ino, r)
	// Only Read and Write: the tar types' own shortcuts treat holes specially.
	n, err := io.CopyBuffer(onlyWriter{tw}, onlyReader{r}, buf)
	if err == nil && n != ino.size {
		err = fmt.Errorf("%d bytes instead of %d", n, ino.size)
	}
	if err != nil {
		return named(ino.first, err)
	}
	keep()
	return nil
}

type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }

func named(d *dentry, err error) error {
	var own *errdefs.Error
	if errors.As(err, &own) || errors.Is(err, errStopped) {
		return err
	}
	return badImage("path %.200q: %v", d.path(), err)
}

// header describes the inode under its first name.
func (i *inode) header() *tar.Header {
	t := time.Unix(i.sec, int64(i.nsec))
	h := &tar.Header{
		Name: i.first.path(), Mode: int64(i.mode), Uid: int(i.uid), Gid: int(i.gid),
		ModTime: t, AccessTime: t, ChangeTime: t, Format: tar.FormatPAX,
	}
	switch i.typ {
	case typeRegular:
		h.Typeflag, h.Size = tar.TypeReg, i.size
	case typeDir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case typeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, i.target
	case typeChar, typeBlock:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(i.major), int64(i.minor)
		if i.typ == typeBlock {
			h.Typeflag = tar.TypeBlock
		}
	case typeFIFO:
		h.Typeflag = tar.TypeFifo
	}
	for k, v := range i.xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattr+k] = v
	}
	return h
}
