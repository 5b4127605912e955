package microsandbox

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/volumefs"
)

// FsEntryKind is the type of a file as a guest sees it.
type FsEntryKind string

// File types.
const (
	FsEntryKindFile      FsEntryKind = "file"
	FsEntryKindDirectory FsEntryKind = "directory"
	FsEntryKindSymlink   FsEntryKind = "symlink"
	FsEntryKindOther     FsEntryKind = "other" // device, FIFO, socket
)

// FsEntry is one child of a listed directory.
type FsEntry struct {
	Path       string // from the root, with a leading slash
	Kind       FsEntryKind
	Size       int64  // bytes
	Mode       uint32 // permission bits, & 07777
	UID, GID   uint32
	AccessTime time.Time // UTC, to the nanosecond
	ModTime    time.Time
}

// FsStat describes a file.
type FsStat struct {
	Path       string
	Size       int64  // bytes
	Mode       uint32 // permission bits, & 07777
	ModTime    time.Time
	IsDir      bool
	Kind       FsEntryKind
	UID, GID   uint32
	Readonly   bool // the owner may not write
	AccessTime time.Time
	CreateTime time.Time // zero where the file system does not record it
}

// FsMetadata is FsStat under its other name.
type FsMetadata = FsStat

// VolumeFs reads and writes a volume's files from the host, whether or not a
// sandbox has the volume. It needs no closing and may be used from several
// goroutines.
//
// Paths are relative to the volume's root; leading slashes do not matter. ".."
// is taken back as text, as path.Clean does. A path, or a link on it, that leads
// out of the volume is refused with an error that matches [ErrPathEscape] and
// has kind [ErrFilesystem]. Links inside the volume, also those that a guest
// made, are followed by what reads and writes content; Remove, RemoveAll,
// RemoveDir and Rename act on the link itself.
//
// Names that are not UTF-8 are listed with \xHH for each wrong byte, and every
// operation takes that form back.
//
// Owner, mode and type are those that a guest sees. A file made here belongs to
// the guest's default user.
//
// Once the volume is removed every call fails with kind [ErrVolumeNotFound], and
// nothing is made in its place. On a disk volume every call fails with kind
// [ErrUnsupportedOperation]. Other errors have kind [ErrFilesystem] and match
// fs.ErrNotExist, syscall.ENOSPC and the like where that is what happened.
type VolumeFs struct {
	backend Backend
	name    string
	durable bool
	volume  atomic.Pointer[volumeInfo] // nil until a VolumeFs made by name is used
}

// NewVolumeFs returns access to the files of a volume by its name. Nothing is
// looked up before the first call; from then on it means that very volume.
func NewVolumeFs(backend Backend, name string) *VolumeFs {
	return &VolumeFs{backend: backend, name: name}
}

// Root returns the volume's data directory on this host, "" on a cloud backend.
func (f *VolumeFs) Root() string { return f.backend.volumePath(f.name) }

// Durable returns a VolumeFs whose writes, copies and renames have reached the
// disk under their name when they return. Without it, after a power cut, there
// is the old file or the new one.
func (f *VolumeFs) Durable() *VolumeFs {
	d := &VolumeFs{backend: f.backend, name: f.name, durable: true}
	d.volume.Store(f.volume.Load())
	return d
}

func (f *VolumeFs) writeOptions() volumefs.WriteOptions {
	return volumefs.WriteOptions{Durable: f.durable}
}

// bound returns the volume that f means, looking it up once.
func (f *VolumeFs) bound(ctx context.Context) (*volumeInfo, error) {
	if v := f.volume.Load(); v != nil {
		return v, nil
	}
	h, err := f.backend.GetVolume(ctx, f.name)
	if err != nil {
		return nil, err
	}
	f.volume.CompareAndSwap(nil, h.info)
	return f.volume.Load(), nil
}

// open returns the open volume. Its release must be called.
func (f *VolumeFs) open(ctx context.Context, op, path string) (*openVolume, error) {
	if err := ctx.Err(); err != nil {
		return nil, toPublic(err)
	}
	v, err := f.bound(ctx)
	if err != nil {
		return nil, err
	}
	if v.kind == VolumeKindDisk {
		e := unsupported(op, f.name, "the files of a disk volume can be reached only from a sandbox")
		e.Hint = "mount the volume in a sandbox and use the sandbox's FS()"
		e.Cause = &VolumeError{Op: op, Volume: f.name, Path: path}
		return nil, e
	}
	return f.backend.openVolume(ctx, v)
}

// do runs one operation on the open volume.
func (f *VolumeFs) do(ctx context.Context, op, path string, run func(*volumefs.FS) error) error {
	v, err := f.open(ctx, op, path)
	if err != nil {
		return err
	}
	err = run(v.fs)
	v.release(err)
	return toPublic(err)
}

// Read returns the content of a file. One too large for half of the machine's
// memory is refused; see [VolumeFs.ReadStream].
func (f *VolumeFs) Read(ctx context.Context, relPath string) (data []byte, err error) {
	err = f.do(ctx, "read", relPath, func(fs *volumefs.FS) error {
		data, err = fs.Read(ctx, relPath)
		return err
	})
	return data, err
}

// ReadString returns the content of a file as text. Content that is not UTF-8
// is an error of kind [ErrFilesystem].
func (f *VolumeFs) ReadString(ctx context.Context, relPath string) (string, error) {
	data, err := f.Read(ctx, relPath)
	if err != nil {
		return "", err
	}
	if !utf8.Valid(data) {
		e := errdefs.Wrap(errdefs.Filesystem, errors.New("content is not valid UTF-8"), "read %s:%s", f.name, relPath)
		e.Op, e.Volume, e.Path = "read", f.name, relPath
		return "", toPublic(e.WithHint("read it as bytes"))
	}
	return string(data), nil
}

// Write replaces the content of a file, or makes the file and its missing
// parents. Readers, and a crash at any time, find the old content or the new
// one. The old file's mode, owner and user attributes are kept; other hard
// links to it, and who has it open, keep the old content.
func (f *VolumeFs) Write(ctx context.Context, relPath string, data []byte) error {
	return f.do(ctx, "write", relPath, func(fs *volumefs.FS) error {
		return fs.Write(ctx, relPath, data, f.writeOptions())
	})
}

// WriteString is [VolumeFs.Write] of text.
func (f *VolumeFs) WriteString(ctx context.Context, relPath, content string) error {
	return f.Write(ctx, relPath, []byte(content))
}

// List returns the immediate children of a directory, sorted by name. Links are
// listed as such, wherever they lead.
func (f *VolumeFs) List(ctx context.Context, relPath string) (entries []FsEntry, err error) {
	err = f.do(ctx, "list", relPath, func(fs *volumefs.FS) error {
		list, err := fs.List(ctx, relPath)
		if err != nil {
			return err
		}
		entries = make([]FsEntry, len(list))
		for i := range list {
			entries[i] = publicEntry(&list[i])
		}
		return nil
	})
	return entries, err
}

// Mkdir makes a directory and its missing parents. One that is there is no
// error.
func (f *VolumeFs) Mkdir(ctx context.Context, relPath string) error {
	return f.do(ctx, "mkdir", relPath, func(fs *volumefs.FS) error { return fs.Mkdir(ctx, relPath) })
}

// Remove deletes a file or a link. A directory is an error.
func (f *VolumeFs) Remove(ctx context.Context, relPath string) error {
	return f.do(ctx, "remove", relPath, func(fs *volumefs.FS) error { return fs.Remove(ctx, relPath) })
}

// RemoveDir deletes a directory with everything in it. The volume's root, a
// file and a missing path are errors.
func (f *VolumeFs) RemoveDir(ctx context.Context, relPath string) error {
	return f.do(ctx, "rmdir", relPath, func(fs *volumefs.FS) error { return fs.RemoveDir(ctx, relPath) })
}

// RemoveAll deletes what has the path: a directory with everything in it, or a
// file. A missing path is no error, the volume's root is one.
func (f *VolumeFs) RemoveAll(ctx context.Context, relPath string) error {
	return f.do(ctx, "remove", relPath, func(fs *volumefs.FS) error { return fs.RemoveAll(ctx, relPath) })
}

// Copy copies a file within the volume, making missing parents. Copying a file
// to itself is an error that changes nothing; so is copying a directory.
func (f *VolumeFs) Copy(ctx context.Context, from, to string) error {
	return f.do(ctx, "copy", from, func(fs *volumefs.FS) error { return fs.Copy(ctx, from, to, f.writeOptions()) })
}

// Rename renames or moves a file or directory, making missing parents. An
// existing file or empty directory is replaced.
func (f *VolumeFs) Rename(ctx context.Context, from, to string) error {
	return f.do(ctx, "rename", from, func(fs *volumefs.FS) error { return fs.Rename(ctx, from, to, f.writeOptions()) })
}

// Stat describes what a path leads to. A link to nothing is fs.ErrNotExist.
func (f *VolumeFs) Stat(ctx context.Context, relPath string) (stat *FsMetadata, err error) {
	err = f.do(ctx, "stat", relPath, func(fs *volumefs.FS) error {
		info, err := fs.Stat(ctx, relPath)
		if err == nil {
			stat = publicStat(&info)
		}
		return err
	})
	return stat, err
}

// Exists reports whether a path leads to anything. Absence is no error, a path
// that leads out of the volume is one.
func (f *VolumeFs) Exists(ctx context.Context, relPath string) (exists bool, err error) {
	err = f.do(ctx, "exists", relPath, func(fs *volumefs.FS) error {
		exists, err = fs.Exists(ctx, relPath)
		return err
	})
	return exists, err
}

var publicKinds = [...]FsEntryKind{
	volumefs.Other:     FsEntryKindOther,
	volumefs.File:      FsEntryKindFile,
	volumefs.Directory: FsEntryKindDirectory,
	volumefs.Symlink:   FsEntryKindSymlink,
}

func publicEntry(e *volumefs.Entry) FsEntry {
	return FsEntry{
		Path: e.Path, Kind: publicKinds[e.Kind], Size: e.Size, Mode: e.Mode, UID: e.UID, GID: e.GID,
		AccessTime: e.Atime, ModTime: e.Mtime,
	}
}

func publicStat(i *volumefs.Info) *FsStat {
	return &FsStat{
		Path: i.Path, Size: i.Size, Mode: i.Mode, ModTime: i.Mtime, IsDir: i.Kind == volumefs.Directory,
		Kind: publicKinds[i.Kind], UID: i.UID, GID: i.GID, Readonly: i.Mode&0o200 == 0,
		AccessTime: i.Atime, CreateTime: i.Birth,
	}
}
