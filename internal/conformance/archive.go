package conformance

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ArchiveEntries is how many entries an archive has.
const ArchiveEntries = 1000

// archive builds a tar archive and, beside it, what extracting it must give.
type archive struct {
	w       *tar.Writer
	rng     *rand.Rand
	devices bool
	entries []*Entry
	byName  map[string]*Entry
	files   []string // names of regular files, in order
	dir     string
}

// WriteArchive writes a tar archive of ArchiveEntries entries: directories,
// files, symbolic links (relative, absolute and dangling), hard links, also of
// symbolic links, FIFOs and, if asked for, device nodes; with owners, set-id
// and sticky bits, times to the nanosecond and extended attributes of any
// bytes. It returns what root gets by extracting it. The archive is the same
// each time.
func WriteArchive(w io.Writer, devices bool) ([]*Entry, error) {
	a := &archive{w: tar.NewWriter(w), rng: rand.New(rand.NewPCG(1, 2)), devices: devices, byName: map[string]*Entry{}}
	for i := range ArchiveEntries {
		if err := a.add(i); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return a.entries, a.w.Close()
}

func (a *archive) add(i int) error {
	if i%20 == 0 {
		return a.addDir(i)
	}
	switch i % 20 {
	case 3, 7, 11:
		return a.addSymlink(i)
	case 5, 9, 13:
		return a.addHardLink(i)
	case 15:
		return a.addSpecial(i)
	}
	return a.addFile(i)
}

func (a *archive) addDir(i int) error {
	a.dir = fmt.Sprintf("d%03d", i)
	if i%60 == 40 { // nested, under the previous top-level directory
		a.dir = fmt.Sprintf("d%03d/sub %d", i-40, i)
	}
	return a.put(&tar.Header{
		Typeflag: tar.TypeDir, Name: a.dir + "/", Mode: []int64{0o755, 0o700, 0o1777, 0o2775}[i/20%4],
	}, i, nil)
}

func (a *archive) addFile(i int) error {
	size := a.rng.IntN(6000)
	switch i % 100 {
	case 1:
		size = 0
	case 2:
		size = 300_000
	}
	body := make([]byte, size)
	for j := range body {
		body[j] = byte(a.rng.Uint32())
	}
	name := fmt.Sprintf("%s/file-%d", a.dir, i)
	if i%50 == 4 { // longer than the old header has room for, not ASCII
		name = fmt.Sprintf("%s/%s-ümlaut-%d", a.dir, strings.Repeat("long", 40), i)
	}
	modes := []int64{0o644, 0o600, 0o755, 0o444, 0o400, 0o4755, 0o2755, 0o777, 0o640}
	a.files = append(a.files, name)
	return a.put(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: modes[i%len(modes)], Size: int64(size)}, i, body)
}

func (a *archive) addSymlink(i int) error {
	target := "../" + a.files[a.rng.IntN(len(a.files))]
	if strings.Contains(a.dir, "/") {
		target = "../" + target
	}
	switch i % 60 {
	case 7:
		target = "/etc/hostname"
	case 27:
		target = "no such file"
	case 47:
		target = strings.Repeat("x/../", 200) + "deep"
	}
	return a.put(&tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("%s/link-%d", a.dir, i), Linkname: target, Mode: 0o777}, i, nil)
}

func (a *archive) addHardLink(i int) error {
	to := a.files[a.rng.IntN(len(a.files))]
	if i%60 == 25 {
		to = fmt.Sprintf("%s/link-%d", a.dir, i-2)
	}
	return a.put(&tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprintf("%s/hard-%d", a.dir, i), Linkname: to}, i, nil)
}

func (a *archive) addSpecial(i int) error {
	h := &tar.Header{Typeflag: tar.TypeFifo, Name: fmt.Sprintf("%s/fifo-%d", a.dir, i), Mode: 0o620}
	if a.devices && i%40 == 15 {
		h.Typeflag, h.Name = tar.TypeChar, fmt.Sprintf("%s/device-%d", a.dir, i)
		h.Devmajor, h.Devminor = 1, int64(3+i%5)
	}
	return a.put(h, i, nil)
}

func (a *archive) put(h *tar.Header, i int, body []byte) error {
	h.Format = tar.FormatPAX
	h.Uid, h.Gid = i%7*1000, i%5*100
	h.ModTime = time.Unix(1_000_000_000+int64(i)*86_411, int64(a.rng.IntN(1_000_000_000)))
	if i%97 == 0 {
		h.ModTime = time.Unix(-int64(i), 0) // before 1970
	}
	e := &Entry{
		Path: strings.TrimSuffix(h.Name, "/"), Mode: uint32(h.Mode), UID: uint32(h.Uid), GID: uint32(h.Gid),
		ModTime: h.ModTime, Links: 1, First: h.Name,
	}
	e.describe(h, body)
	// GNU tar sets the attributes of a file before it opens it: as an ordinary
	// user it cannot on a read-only one, on any file system.
	if h.Typeflag == tar.TypeReg && i%3 != 2 && e.Mode&0o200 != 0 || h.Typeflag == tar.TypeDir {
		e.Xattrs = map[string]string{"user.name": fmt.Sprintf("value %d", i)}
		if i%6 == 0 {
			e.Xattrs["user.any bytes"] = string([]byte{0, 1, '\n', 255, byte(i)})
		}
		h.PAXRecords = map[string]string{}
		for k, v := range e.Xattrs {
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
	}
	if h.Typeflag == tar.TypeLink {
		e = a.link(h)
	}
	a.entries = append(a.entries, e)
	a.byName[h.Name] = e
	if err := a.w.WriteHeader(h); err != nil {
		return err
	}
	_, err := a.w.Write(body)
	return err
}

// describe fills in what depends on the type.
func (e *Entry) describe(h *tar.Header, body []byte) {
	switch h.Typeflag {
	case tar.TypeReg:
		sum := sha256.Sum256(body)
		e.Mode, e.Size, e.Content = e.Mode|unix.S_IFREG, h.Size, hex.EncodeToString(sum[:])
	case tar.TypeDir:
		e.Mode, e.Links, e.First = e.Mode|unix.S_IFDIR, 0, ""
	case tar.TypeSymlink:
		e.Mode, e.Size, e.Target = e.Mode|unix.S_IFLNK, int64(len(h.Linkname)), h.Linkname
	case tar.TypeFifo:
		e.Mode |= unix.S_IFIFO
	case tar.TypeChar:
		e.Mode, e.Device = e.Mode|unix.S_IFCHR, unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
	}
}

// link returns the entry of one more name of an inode and counts it on all of them.
func (a *archive) link(h *tar.Header) *Entry {
	old := a.byName[h.Linkname]
	e := *old
	e.Path = h.Name
	a.byName[h.Name] = &e
	for _, other := range a.entries {
		if other.First == old.First && other.First != "" {
			other.Links++
		}
	}
	e.Links++
	return &e
}
