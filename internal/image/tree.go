package image

import (
	"slices"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/image/ext4"
)

// tree is the merged content of an image as names and inodes in memory. File
// data stays in the layers: an inode says where.
type tree struct {
	root   *dentry
	limits limits
	made   int   // names ever made, those of implied parents counted
	meta   int64 // bytes of names, targets and attributes ever held
}

// fileType is the type of an inode.
type fileType uint8

const (
	typeDir fileType = iota
	typeRegular
	typeSymlink
	typeChar
	typeBlock
	typeFIFO
)

// inode is a file with all its attributes; hard links share one.
type inode struct {
	typ        fileType
	mode       uint16 // permission bits with setuid, setgid and sticky
	uid, gid   uint32
	sec        int64 // modification time, clamped to what ext4 holds
	nsec       int32
	size       int64  // of a regular file
	target     string // of a symbolic link
	major      uint32 // of a device
	minor      uint32
	xattrs     map[string]string
	layer, seq int32   // where a regular file's data is: layer and entry in it
	first      *dentry // its first name, while building
	out        *ext4.Inode
}

// dentry is one name. layer is the layer that named it last, which whiteouts
// of the same layer must not remove.
type dentry struct {
	name     string
	parent   *dentry // of the root: itself
	ino      *inode
	children map[string]*dentry // of a directory; nil while empty
	layer    int32
}

func newTree(l limits) *tree {
	root := &dentry{ino: &inode{typ: typeDir, mode: 0o755}, layer: -1}
	root.parent = root
	return &tree{root: root, limits: l}
}

func (d *dentry) isDir() bool { return d.ino.typ == typeDir }

// path is the name inside the image, without a leading slash; "." is the root.
func (d *dentry) path() string {
	if d.parent == d {
		return "."
	}
	var parts []string
	for ; d.parent != d; d = d.parent {
		parts = append(parts, d.name)
	}
	slices.Reverse(parts)
	return strings.Join(parts, "/")
}

// put sets or replaces a name. A directory over a directory keeps its children.
func (d *dentry) put(name string, ino *inode, layer int32) *dentry {
	if have := d.children[name]; have != nil && have.isDir() && ino.typ == typeDir {
		have.ino, have.layer = ino, layer
		return have
	}
	if d.children == nil {
		d.children = map[string]*dentry{}
	}
	e := &dentry{name: name, parent: d, ino: ino, layer: layer}
	d.children[name] = e
	return e
}

// hide removes what lower layers put below d, and says whether anything of
// this layer is left.
func (d *dentry) hide(layer int32) (left bool) {
	for name, c := range d.children {
		if keep := c.hide(layer); keep || c.layer == layer {
			left = true
			continue
		}
		delete(d.children, name)
	}
	return left
}

// sorted returns the children by name: the order of the file system's inodes.
func (d *dentry) sorted() []*dentry {
	out := make([]*dentry, 0, len(d.children))
	for _, c := range d.children {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *dentry) int { return strings.Compare(a.name, b.name) })
	return out
}

// maxLinks is how many symbolic links one resolution may follow (path_resolution(7)).
const maxLinks = 40

// walkMode says what a resolution does with directories that are missing.
type walkMode bool

const (
	mustExist   walkMode = false
	makeMissing walkMode = true
)

// dir resolves a path to a directory inside the image, following symbolic
// links there. ".." of the root is the root, so nothing leaves the tree. It
// returns nil if the path names nothing, or an error if it can name no directory.
func (t *tree) dir(start *dentry, path string, layer int32, mode walkMode) (*dentry, error) {
	at, links := start, 0
	rest := strings.Split(path, "/")
	for steps := 0; len(rest) > 0; steps++ {
		if steps > t.limits.path {
			return nil, badImage("path %.200q takes more than %d steps", path, t.limits.path)
		}
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = at.parent
			continue
		}
		next := at.children[name]
		if next == nil {
			if mode == mustExist {
				return nil, nil
			}
			if err := t.checkName(at, name); err != nil {
				return nil, err
			}
			next = at.put(name, &inode{typ: typeDir, mode: 0o755, sec: at.ino.sec}, layer)
			if err := t.charge(len(name)); err != nil {
				return nil, err
			}
		}
		switch next.ino.typ {
		case typeDir:
			at = next
		case typeSymlink:
			if links++; links > maxLinks {
				return nil, badImage("path %.200q has more than %d symbolic links", path, maxLinks)
			}
			if strings.HasPrefix(next.ino.target, "/") {
				at = t.root
			}
			rest = append(strings.Split(next.ino.target, "/"), rest...)
		default:
			return nil, badImage("path %.200q leads through %q, which is not a directory", path, next.path())
		}
	}
	return at, nil
}

// charge counts one name, and the bytes held for it, against the limits.
func (t *tree) charge(bytes int) error {
	t.made++
	t.meta += int64(bytes)
	if t.made > t.limits.entries {
		return tooLarge("image has more than %d entries", t.limits.entries)
	}
	if t.meta > t.limits.meta {
		return tooLarge("names and attributes of the image take more than %d bytes", t.limits.meta)
	}
	return nil
}

// checkName refuses names that no file system takes.
func (t *tree) checkName(parent *dentry, name string) error {
	if len(name) > 255 {
		return tooLarge("name %.40q... has %d bytes, more than 255", name, len(name))
	}
	length := len(name)
	for d := parent; d.parent != d; d = d.parent {
		if length += len(d.name) + 1; length > t.limits.path {
			return tooLarge("path of %.200q has more than %d bytes", name, t.limits.path)
		}
	}
	return nil
}

// file resolves a path to a regular file inside the image, following links in
// every component. It returns nil if there is none.
func (t *tree) file(path string) *inode {
	at := t.root
	for range maxLinks {
		dirName, name := splitPath(path)
		dir, err := t.dir(at, dirName, 0, mustExist)
		if dir == nil || err != nil {
			return nil
		}
		d := dir.children[name]
		if d == nil || d.ino.typ == typeRegular {
			if d == nil {
				return nil
			}
			return d.ino
		}
		if d.ino.typ != typeSymlink {
			return nil
		}
		if at = dir; strings.HasPrefix(d.ino.target, "/") {
			at = t.root
		}
		path = d.ino.target
	}
	return nil
}

func splitPath(p string) (dir, name string) {
	i := strings.LastIndexByte(p, '/')
	return p[:i+1], p[i+1:]
}

// mountPoints are the directories that a guest needs to start.
var mountPoints = []struct {
	name string
	mode uint16
}{{"dev", 0o755}, {"proc", 0o555}, {"run", 0o755}, {"sys", 0o555}, {"tmp", 0o1777}}

// addMountPoints adds those that are absent. What the image has instead, a
// symbolic link for example, stays.
func (t *tree) addMountPoints() {
	for _, m := range mountPoints {
		if t.root.children[m.name] == nil {
			t.root.put(m.name, &inode{typ: typeDir, mode: m.mode, sec: t.root.ino.sec}, -1)
		}
	}
}
