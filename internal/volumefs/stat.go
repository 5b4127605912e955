package volumefs

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is the type of a directory entry as the guest sees it.
type Kind uint8

// The kinds. Device nodes, FIFOs and sockets, real ones and stand-ins, are Other.
const (
	Other Kind = iota
	File
	Directory
	Symlink
)

// Entry is what List says about a name.
type Entry struct {
	Path         string // from the volume's root, with a leading slash, escaped
	Kind         Kind
	Size         int64  // bytes; of a link: the length of its target
	Mode         uint32 // permission bits, setuid, setgid and sticky: & 07777
	UID, GID     uint32 // as the guest sees them
	Atime, Mtime time.Time
}

// Info is what Stat says about a path.
type Info struct {
	Entry
	Birth time.Time // zero where the file system does not record it
}

// Stat describes what path leads to, links followed. A link that leads nowhere
// is fs.ErrNotExist, one that leads out is ErrPathEscape.
func (f *FS) Stat(ctx context.Context, path string) (Info, error) {
	rel, err := f.begin(ctx, "stat", path)
	if err != nil {
		return Info{}, err
	}
	info, err := f.stat(rel)
	return info, f.end("stat", path, err)
}

func (f *FS) stat(rel string) (Info, error) {
	n, err := f.target(rel)
	if err != nil {
		return Info{}, err
	}
	defer n.close()
	info := Info{Entry: entry(&n.st, n.ov)}
	info.Path = shown(rel)
	var x unix.Statx_t
	if err := unix.Statx(n.fd, "", unix.AT_EMPTY_PATH, unix.STATX_BTIME, &x); err == nil && x.Mask&unix.STATX_BTIME != 0 {
		info.Birth = time.Unix(x.Btime.Sec, int64(x.Btime.Nsec)).UTC()
	}
	return info, nil
}

// Exists reports whether path leads to anything. A missing parent, a link to
// nothing and a loop of links are false; a path that leads out is an error.
func (f *FS) Exists(ctx context.Context, path string) (bool, error) {
	rel, err := f.begin(ctx, "exists", path)
	if err != nil {
		return false, err
	}
	n, err := f.target(rel)
	switch err {
	case nil:
		n.close()
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		return false, f.end("exists", path, nil)
	}
	return err == nil, f.end("exists", path, err)
}

// entry joins what the host and the overlay say. Path is left to the caller.
func entry(st *unix.Stat_t, ov overlay) Entry {
	e := Entry{
		Size: st.Size,
		Mode: st.Mode & 0o7777,
		UID:  st.Uid, GID: st.Gid,
		Atime: time.Unix(st.Atim.Unix()).UTC(),
		Mtime: time.Unix(st.Mtim.Unix()).UTC(),
	}
	mode := st.Mode
	if ov.set {
		e.UID, e.GID, e.Mode = ov.uid, ov.gid, ov.mode&0o7777
		mode = ov.mode
	}
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Kind = File
	case unix.S_IFDIR:
		e.Kind = Directory
	case unix.S_IFLNK:
		e.Kind = Symlink
	}
	return e
}
