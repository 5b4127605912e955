package image

import (
	"archive/tar"
	"encoding/binary"
	"strings"
)

// OCI image layout: a whiteout removes a name of the lower layers, the opaque
// one all names of its directory.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// apply merges one entry of a layer into the tree. Entries of one layer come in
// their order; seq is the entry's number in it.
func (t *tree) apply(h *tar.Header, layer, seq int32) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	clean, err := t.cleanPath(h.Name)
	if err != nil {
		return err
	}
	dirName, name := splitPath(clean)
	if clean == "" {
		return t.applyRoot(h, layer)
	}
	if isAufs(clean) {
		return nil
	}
	if strings.HasPrefix(name, whiteoutPrefix) {
		return t.whiteout(dirName, name, layer)
	}
	var linked *inode
	if h.Typeflag == tar.TypeLink {
		// Before the name is replaced: a link to itself must find itself.
		if linked, err = t.linkTarget(h); err != nil {
			return err
		}
	}
	parent, err := t.dir(t.root, dirName, layer, makeMissing)
	if err != nil {
		return err
	}
	if err := t.checkName(parent, name); err != nil {
		return err
	}
	if linked == nil {
		if linked, err = t.newInode(h, layer, seq); err != nil {
			return err
		}
	}
	parent.put(name, linked, layer)
	return t.charge(len(name) + linked.bytes())
}

// bytes is what the inode holds of the archive's strings.
func (i *inode) bytes() int {
	n := len(i.target)
	for k, v := range i.xattrs {
		n += len(k) + len(v)
	}
	return n
}

// cleanPath normalizes an entry's name to components without "." and ".."; a
// leading slash means the root of the image, as everywhere.
func (t *tree) cleanPath(p string) (string, error) {
	if len(p) > t.limits.path {
		return "", tooLarge("path %.80q... has %d bytes, more than %d", p, len(p), t.limits.path)
	}
	if strings.IndexByte(p, 0) >= 0 {
		return "", badImage("path %q has a zero byte", p)
	}
	var parts []string
	for part := range strings.SplitSeq(p, "/") {
		switch part {
		case "", ".":
		case "..":
			return "", badImage("path %q leads out of the image", p)
		default:
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "/"), nil
}

// applyRoot takes the attributes of the root directory from an entry "./".
func (t *tree) applyRoot(h *tar.Header, layer int32) error {
	if h.Typeflag != tar.TypeDir {
		return badImage("path %q names the root, which is not of type %q", h.Name, h.Typeflag)
	}
	ino, err := t.newInode(h, layer, 0)
	if err != nil {
		return err
	}
	t.root.ino = ino
	return nil
}

// isAufs says whether a path is, or lies in, bookkeeping of the aufs driver.
func isAufs(clean string) bool {
	for part := range strings.SplitSeq(clean, "/") {
		if strings.HasPrefix(part, whiteoutMeta) && part != whiteoutOpaque {
			return true
		}
	}
	return false
}

func (t *tree) whiteout(dirName, name string, layer int32) error {
	dir, err := t.dir(t.root, dirName, layer, mustExist)
	if dir == nil || err != nil {
		return err
	}
	if name == whiteoutOpaque {
		dir.hide(layer)
		return nil
	}
	hidden := strings.TrimPrefix(name, whiteoutPrefix)
	switch hidden {
	case "", ".", "..":
		return badImage("whiteout %q names no file", dirName+name)
	}
	if d := dir.children[hidden]; d != nil && !d.hide(layer) && d.layer != layer {
		delete(dir.children, hidden)
	}
	return nil
}

// linkTarget finds the inode of a hard link, which may be of a lower layer.
// Links in its directory are followed, one at its end is not (link(2)).
func (t *tree) linkTarget(h *tar.Header) (*inode, error) {
	clean, err := t.cleanPath(h.Linkname)
	if err != nil {
		return nil, err
	}
	dirName, name := splitPath(clean)
	dir, err := t.dir(t.root, dirName, 0, mustExist)
	if err != nil {
		return nil, err
	}
	if dir == nil || dir.children[name] == nil {
		return nil, badImage("hard link %.200q: target %.200q is not in the image", h.Name, h.Linkname)
	}
	ino := dir.children[name].ino
	if ino.typ == typeDir {
		return nil, badImage("hard link %.200q: target %.200q is a directory", h.Name, h.Linkname)
	}
	return ino, nil
}

// maxTime is the last second that an ext4 inode holds.
const maxTime = 0x37fffffff

func (t *tree) newInode(h *tar.Header, layer, seq int32) (*inode, error) {
	ino := &inode{layer: layer, seq: seq, mode: uint16(h.Mode & 0o7777)}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		ino.typ, ino.size = typeRegular, h.Size
	case tar.TypeDir:
		ino.typ = typeDir
	case tar.TypeSymlink:
		ino.typ, ino.target = typeSymlink, h.Linkname
		if ino.target == "" || len(ino.target) > t.limits.target || strings.IndexByte(ino.target, 0) >= 0 {
			return nil, badImage("symbolic link %.200q: target has %d bytes, not 1 to %d", h.Name, len(ino.target), t.limits.target)
		}
	case tar.TypeChar:
		ino.typ = typeChar
	case tar.TypeBlock:
		ino.typ = typeBlock
	case tar.TypeFifo:
		ino.typ = typeFIFO
	default:
		return nil, badImage("path %.200q: entry type %q is not supported", h.Name, h.Typeflag)
	}
	if ino.typ == typeChar || ino.typ == typeBlock {
		if h.Devmajor < 0 || h.Devmajor > 0xfff || h.Devminor < 0 || h.Devminor > 0xfffff {
			return nil, badImage("device %.200q: %d:%d is not a device number", h.Name, h.Devmajor, h.Devminor)
		}
		ino.major, ino.minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	const maxID = 1<<32 - 2 // the last one means "no id" to the kernel
	if h.Uid < 0 || h.Uid > maxID || h.Gid < 0 || h.Gid > maxID {
		return nil, badImage("path %.200q: owner %d:%d is out of range", h.Name, h.Uid, h.Gid)
	}
	ino.uid, ino.gid = uint32(h.Uid), uint32(h.Gid)
	ino.sec, ino.nsec = h.ModTime.Unix(), int32(h.ModTime.Nanosecond())
	if ino.sec < 0 || ino.sec > maxTime {
		ino.sec, ino.nsec = min(max(ino.sec, 0), maxTime), 0
	}
	var err error
	ino.xattrs, err = xattrsOf(h)
	return ino, err
}

const (
	paxXattr   = "SCHILY.xattr."
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// xattrsOf returns the extended attributes that make sense in a root image.
// Those of an overlay's own bookkeeping would change what the guest's overlay
// shows, and unknown name spaces cannot be stored.
func xattrsOf(h *tar.Header) (map[string]string, error) {
	var out map[string]string
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		switch {
		case !ok, strings.HasPrefix(name, "trusted.overlay."), strings.HasPrefix(name, "user.overlay."):
			continue
		case name == aclAccess, name == aclDefault:
			acl, ok := diskACL(v)
			if !ok {
				return nil, badImage("path %.200q: %s is malformed", h.Name, name)
			}
			v = acl
		case hasAnyPrefix(name, "user.", "trusted.", "security."):
		default:
			continue
		}
		if len(name) > 255 {
			return nil, tooLarge("path %.200q: attribute name has %d bytes, more than 255", h.Name, len(name))
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = v
	}
	if !fitsExt4(out) {
		return nil, tooLarge("path %.200q: its extended attributes do not fit into one block of 4096 bytes", h.Name)
	}
	return out, nil
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	for _, p := range prefixes {
		if rest, ok := strings.CutPrefix(s, p); ok && rest != "" {
			return true
		}
	}
	return false
}

// fitsExt4 is conservative: entries and values must fit into the block alone,
// though some go into the inode.
func fitsExt4(xattrs map[string]string) bool {
	const room = 4096 - 32 - 4 // header, terminating entry
	used := 0
	for k, v := range xattrs {
		used += 16 + (len(k)+3)&^3 + (len(v)+3)&^3
	}
	return used <= room
}

// diskACL turns a POSIX ACL as setxattr(2) takes it (version 2, an id in each
// entry) into what ext4 stores (version 1, an id only where it means something).
func diskACL(v string) (string, bool) {
	b := []byte(v)
	if len(b) < 4 || binary.LittleEndian.Uint32(b) != 2 || (len(b)-4)%8 != 0 {
		return "", false
	}
	const tagUser, tagGroup = 0x02, 0x08
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for e := b[4:]; len(e) > 0; e = e[8:] {
		out = append(out, e[:4]...)
		if tag := binary.LittleEndian.Uint16(e); tag == tagUser || tag == tagGroup {
			out = append(out, e[4:8]...)
		}
	}
	return string(out), true
}
