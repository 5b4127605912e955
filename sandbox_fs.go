package microsandbox

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	pathpkg "path"
	"sort"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/agentclient"
	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// maxGuestFile bounds what Read keeps in memory; ReadStream has no bound.
const maxGuestFile = 1 << 30

// SandboxFSOps works on the files of a running sandbox, through its guest agent
// and as the guest's root. Paths are absolute guest paths. A missing file gives
// an error of kind [ErrFilesystem] that matches [fs.ErrNotExist].
type SandboxFSOps struct{ s *Sandbox }

// FS returns the sandbox's file operations.
func (s *Sandbox) FS() *SandboxFSOps { return &SandboxFSOps{s} }

// do runs one operation over a connection of its own.
func (o *SandboxFSOps) do(ctx context.Context, op agentproto.FSOp) (*agentproto.FSData, error) {
	c, err := o.s.run.Dial(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	defer c.Close()
	d, err := c.Do(ctx, op)
	return d, toPublic(err)
}

// Read returns a whole file of at most 1 GiB.
func (o *SandboxFSOps) Read(ctx context.Context, path string) ([]byte, error) {
	c, err := o.s.run.Dial(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	defer c.Close()
	b, err := c.ReadAll(ctx, path, maxGuestFile)
	return b, toPublic(err)
}

// ReadString is Read as text.
func (o *SandboxFSOps) ReadString(ctx context.Context, path string) (string, error) {
	b, err := o.Read(ctx, path)
	return string(b), err
}

// Write replaces a file's contents, creating it with mode 0644 and its parents
// if they are missing. It is not atomic: a reader in the guest may see a part.
func (o *SandboxFSOps) Write(ctx context.Context, path string, data []byte) error {
	w, err := o.WriteStream(ctx, path)
	if err != nil {
		return err
	}
	werr := w.WriteCtx(ctx, data)
	return errors.Join(werr, w.Close(ctx))
}

// WriteString is Write of text.
func (o *SandboxFSOps) WriteString(ctx context.Context, path, content string) error {
	return o.Write(ctx, path, []byte(content))
}

// List returns a directory's entries, sorted by name; symlinks are not followed.
func (o *SandboxFSOps) List(ctx context.Context, path string) ([]FsEntry, error) {
	d, err := o.do(ctx, agentproto.FSOp{List: &agentproto.FSPath{Path: path}})
	if err != nil {
		return nil, err
	}
	if d.List == nil {
		return nil, toPublic(errdefs.New(errdefs.Internal, "guest agent listed nothing for %s", path))
	}
	out := make([]FsEntry, 0, len(*d.List))
	for _, e := range *d.List {
		out = append(out, FsEntry{
			Path: e.Path, Kind: guestKind(e.Kind), Size: int64(e.Size), Mode: e.Mode & 0o7777,
			UID: e.UID, GID: e.GID, AccessTime: unixTime(e.Atime), ModTime: unixTime(mtime(&e)),
		})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out, nil
}

// Stat describes a file; a final symlink is followed.
func (o *SandboxFSOps) Stat(ctx context.Context, path string) (*FsStat, error) {
	d, err := o.do(ctx, agentproto.FSOp{Stat: &agentproto.FSStat{Path: path, FollowSymlink: true}})
	if err != nil {
		return nil, err
	}
	e := d.Stat
	if e == nil {
		return nil, toPublic(errdefs.New(errdefs.Internal, "guest agent described nothing for %s", path))
	}
	return &FsStat{
		Path: path, Size: int64(e.Size), Mode: e.Mode & 0o7777, ModTime: unixTime(mtime(e)), IsDir: e.Kind == agentproto.KindDir,
		Kind: guestKind(e.Kind), UID: e.UID, GID: e.GID, Readonly: e.Mode&0o200 == 0, AccessTime: unixTime(e.Atime),
	}, nil
}

func mtime(e *agentproto.FSEntry) *int64 {
	if e.Mtime != nil {
		return e.Mtime
	}
	return e.Modified
}

func unixTime(s *int64) time.Time {
	if s == nil {
		return time.Time{}
	}
	return time.Unix(*s, 0).UTC()
}

func guestKind(k string) FsEntryKind {
	switch k {
	case agentproto.KindFile:
		return FsEntryKindFile
	case agentproto.KindDir:
		return FsEntryKindDirectory
	case agentproto.KindSymlink:
		return FsEntryKindSymlink
	}
	return FsEntryKindOther
}

// Mkdir makes a directory and its missing parents; one that exists is no error.
func (o *SandboxFSOps) Mkdir(ctx context.Context, path string) error {
	_, err := o.do(ctx, agentproto.FSOp{Mkdir: &agentproto.FSMkdir{Path: path}})
	return err
}

// Remove deletes a file or a symlink.
func (o *SandboxFSOps) Remove(ctx context.Context, path string) error {
	_, err := o.do(ctx, agentproto.FSOp{Remove: &agentproto.FSPath{Path: path}})
	return err
}

// RemoveDir deletes a directory with everything in it.
func (o *SandboxFSOps) RemoveDir(ctx context.Context, path string) error {
	_, err := o.do(ctx, agentproto.FSOp{RemoveDir: &agentproto.FSRemoveDir{Path: path, Recursive: true}})
	return err
}

// Copy copies a file within the guest.
func (o *SandboxFSOps) Copy(ctx context.Context, src, dst string) error {
	_, err := o.do(ctx, agentproto.FSOp{Copy: &agentproto.FSTwoPaths{Src: src, Dst: dst}})
	return err
}

// Rename renames or moves a file or directory within the guest.
func (o *SandboxFSOps) Rename(ctx context.Context, src, dst string) error {
	_, err := o.do(ctx, agentproto.FSOp{Rename: &agentproto.FSTwoPaths{Src: src, Dst: dst}})
	return err
}

// Exists reports whether a path leads to something.
func (o *SandboxFSOps) Exists(ctx context.Context, path string) (bool, error) {
	_, err := o.Stat(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// CopyFromHost copies a host file into the guest; its permission bits are kept.
func (o *SandboxFSOps) CopyFromHost(ctx context.Context, hostPath, guestPath string) error {
	f, err := os.Open(hostPath)
	if err != nil {
		return toPublic(errdefs.Wrap(errdefs.IO, err, "copy %s into the sandbox", hostPath))
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return toPublic(errdefs.New(errdefs.IO, "%s is not a regular file", hostPath))
	}
	mode := uint32(fi.Mode().Perm())
	w, err := o.openWrite(ctx, guestPath, &mode)
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(writerOnly{ctx, w}, f, make([]byte, 256<<10)); err != nil {
		w.abort()
		return toPublic(err)
	}
	return w.Close(ctx)
}

// CopyToHost copies a guest file to the host, where it appears whole or not at
// all, with mode 0644 before the umask.
func (o *SandboxFSOps) CopyToHost(ctx context.Context, guestPath, hostPath string) error {
	r, err := o.ReadStream(ctx, guestPath)
	if err != nil {
		return err
	}
	defer r.Close()
	tmp, err := os.OpenFile(hostPath+".msb-partial", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return toPublic(errdefs.Wrap(errdefs.IO, err, "copy %s to the host", guestPath))
	}
	_, err = r.CopyTo(ctx, tmp)
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), hostPath)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return toPublic(err)
}

// FsReadStream yields a guest file in chunks. The guest reads no further than
// the stream is drained, plus 256 KiB.
type FsReadStream struct{ r *agentclient.ReadStream }

// ReadStream opens a file for reading.
func (o *SandboxFSOps) ReadStream(ctx context.Context, path string) (*FsReadStream, error) {
	c, err := o.s.run.Dial(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	r, err := c.OpenRead(ctx, path)
	if err != nil {
		c.Close()
		return nil, toPublic(err)
	}
	return &FsReadStream{r}, nil
}

// Recv returns the next chunk; nil at the end.
func (r *FsReadStream) Recv(ctx context.Context) ([]byte, error) {
	b, err := r.r.Recv(ctx)
	return b, toPublic(err)
}

// WriteTo writes the rest of the file to w.
func (r *FsReadStream) WriteTo(w io.Writer) (int64, error) {
	return r.CopyTo(context.Background(), w)
}

// CopyTo writes the rest of the file to w.
func (r *FsReadStream) CopyTo(ctx context.Context, w io.Writer) (int64, error) {
	var total int64
	for {
		b, err := r.Recv(ctx)
		if err != nil || b == nil {
			return total, err
		}
		n, err := w.Write(b)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// Close ends the stream.
func (r *FsReadStream) Close() error { return toPublic(r.r.Close()) }

// FsWriteStream sends a guest file in chunks.
type FsWriteStream struct{ w *agentclient.WriteStream }

// WriteStream creates or truncates a file and opens it for writing; missing
// parents are created. A failure of the guest, a full disk for instance, is
// reported by Close.
func (o *SandboxFSOps) WriteStream(ctx context.Context, path string) (*FsWriteStream, error) {
	return o.openWrite(ctx, path, nil)
}

func (o *SandboxFSOps) openWrite(ctx context.Context, path string, mode *uint32) (*FsWriteStream, error) {
	c, err := o.s.run.Dial(ctx)
	if err != nil {
		return nil, toPublic(err)
	}
	w, err := c.OpenWrite(ctx, path, mode)
	if errors.Is(err, fs.ErrNotExist) { // its directory, mostly
		if _, err = c.Do(ctx, agentproto.FSOp{Mkdir: &agentproto.FSMkdir{Path: pathpkg.Dir(path)}}); err == nil {
			w, err = c.OpenWrite(ctx, path, mode)
		}
	}
	if err != nil {
		c.Close()
		return nil, toPublic(err)
	}
	return &FsWriteStream{w}, nil
}

// Write sends p.
func (w *FsWriteStream) Write(p []byte) (int, error) {
	n, err := w.w.Write(context.Background(), p)
	return n, toPublic(err)
}

// WriteCtx sends data; when ctx ends the stream cannot be used any more.
func (w *FsWriteStream) WriteCtx(ctx context.Context, data []byte) error {
	_, err := w.w.Write(ctx, data)
	return toPublic(err)
}

// Close ends the file and reports whether the guest has written all of it.
func (w *FsWriteStream) Close(ctx context.Context) error { return toPublic(w.w.Close(ctx)) }

func (w *FsWriteStream) abort() { _ = w.w.Abort() }

// writerOnly is a stream as an io.Writer bound to a context.
type writerOnly struct {
	ctx context.Context
	w   *FsWriteStream
}

func (w writerOnly) Write(p []byte) (int, error) {
	if err := w.w.WriteCtx(w.ctx, p); err != nil {
		return 0, err
	}
	return len(p), nil
}
