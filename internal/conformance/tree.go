package conformance

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Entry is what a tree holds under one name: everything that programs can see
// of it but for times of access and change, block counts and inode numbers.
type Entry struct {
	Path     string // relative to the tree
	Mode     uint32 // with the type bits of stat(2)
	UID, GID uint32
	Size     int64 // of regular files and symbolic links
	ModTime  time.Time
	Target   string            // of a symbolic link
	Device   uint64            // of a device node
	Xattrs   map[string]string // names in user. only
	Content  string            // of a regular file: its SHA-256 in hexadecimal
	// First is the name, first in order, of the same inode; Links is how many
	// names it has. Both are empty for directories, whose link counts belong
	// to the file system.
	First string
	Links uint64
}

// String is the entry as a line of a digest list. Names and values are quoted.
func (e *Entry) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %o %d:%d", e.Path, e.Mode, e.UID, e.GID)
	if e.Mode&unix.S_IFMT != unix.S_IFDIR {
		fmt.Fprintf(&b, " size=%d links=%d first=%q", e.Size, e.Links, e.First)
	}
	fmt.Fprintf(&b, " mtime=%d.%09d", e.ModTime.Unix(), e.ModTime.Nanosecond())
	if e.Target != "" {
		fmt.Fprintf(&b, " target=%q", e.Target)
	}
	if e.Device != 0 {
		fmt.Fprintf(&b, " device=%d:%d", unix.Major(e.Device), unix.Minor(e.Device))
	}
	names := make([]string, 0, len(e.Xattrs))
	for n := range e.Xattrs {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		fmt.Fprintf(&b, " %s=%q", n, e.Xattrs[n])
	}
	if e.Content != "" {
		b.WriteString(" sha256=" + e.Content)
	}
	return b.String()
}

// Digest lists the entries as lines, in order of their paths.
func Digest(entries []*Entry) []string {
	sorted := append([]*Entry(nil), entries...)
	sort.Slice(sorted, func(i, j int) bool { return sorted[i].Path < sorted[j].Path })
	first := map[string]*Entry{}
	for _, e := range sorted {
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			continue
		}
		if first[e.First] == nil {
			first[e.First] = e
		}
	}
	lines := make([]string, len(sorted))
	for i, e := range sorted {
		line := *e
		if f := first[e.First]; f != nil {
			line.First = f.Path
		}
		lines[i] = line.String()
	}
	return lines
}

// Scan reads the tree under root, without root itself. No link is followed.
func Scan(root string) ([]*Entry, error) {
	var entries []*Entry
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		e, err := scan(path)
		if err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
		e.Path = rel
		entries = append(entries, e)
		return nil
	})
	return entries, err
}

func scan(path string) (*Entry, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, err
	}
	e := &Entry{Mode: st.Mode, UID: st.Uid, GID: st.Gid, ModTime: time.Unix(st.Mtim.Unix())}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Size = st.Size
		if e.Content, err = hashFile(path); err != nil {
			return nil, err
		}
	case unix.S_IFLNK:
		e.Size = st.Size
		if e.Target, err = os.Readlink(path); err != nil {
			return nil, err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Device = st.Rdev
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		e.First, e.Links = fmt.Sprintf("inode %d", st.Ino), uint64(st.Nlink)
	}
	e.Xattrs, err = userXattrs(path)
	return e, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func userXattrs(path string) (map[string]string, error) {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return nil, fmt.Errorf("listxattr: %w", err)
	}
	var out map[string]string
	for _, name := range strings.Split(string(list[:n]), "\x00") {
		if !strings.HasPrefix(name, "user.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("getxattr %s: %w", name, err)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = string(value[:n])
	}
	return out, nil
}
