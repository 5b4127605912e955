package diskimg

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	maxTemplates     = 8
	maxTemplateBytes = 3 << 20 // of data in one
	// maxTemplateSize is the largest disk that gets a template: the group
	// descriptors and their copies are most of what is in one.
	maxTemplateSize = 256 << 30

	templateMagic = "msbext4\x01"
	templateHead  = len(templateMagic) + 4 // and the checksum of the rest
)

// template is what mkfs.ext4 writes when it makes a file system of one size with
// one set of arguments, kept for the next of that size. It holds nothing that a
// guest or a user has written.
type template struct {
	path string
	key  string // all that the result depends on but for the UUID
}

// templateFor returns where the template of a file system is or would be; nil if
// it is to have none.
func templateFor(mkfs string, sizeBytes int64, opt FormatOptions) *template {
	var st unix.Stat_t
	if opt.Templates == "" || sizeBytes > maxTemplateSize || unix.Stat(mkfs, &st) != nil {
		return nil
	}
	uuid := opt.UUID
	opt.UUID = ""
	key := fmt.Sprint(sizeBytes, mkfsArgs(sizeBytes, opt, ""), mkfs, st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim)
	if _, ok := parseUUID(uuid); !ok {
		return nil
	}
	name := fmt.Sprintf("ext4-%d-%08x", sizeBytes, crc32.Checksum([]byte(key), castagnoli()))
	return &template{filepath.Join(opt.Templates, name), key}
}

// parseUUID reads the canonical form.
func parseUUID(s string) (uuid [16]byte, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(s) != 36 || copy(uuid[:], b) != len(uuid) {
		return uuid, false
	}
	return uuid, formatUUID(uuid) == strings.ToLower(s)
}

func formatUUID(b [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// load returns what the template holds. A template that is missing, damaged or
// of something else is errUnusable; one that holds nothing says that there can be
// none.
func (t *template) load() ([]extent, error) {
	f, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, errUnusable
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > 2*maxTemplateBytes {
		return nil, errUnusable
	}
	b := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, errUnusable
	}
	return decodeTemplate(b, t.key)
}

var errUnusable = errors.New("no usable template")

// encodeTemplate: magic, crc32c of the rest, length of the key, the key, number of
// extents, their offsets and lengths, their data.
func encodeTemplate(extents []extent, key string) []byte {
	b := append([]byte(templateMagic), 0, 0, 0, 0)
	b = append(le.AppendUint32(b, uint32(len(key))), key...)
	b = le.AppendUint32(b, uint32(len(extents)))
	for _, e := range extents {
		b = le.AppendUint32(le.AppendUint64(b, uint64(e.off)), uint32(len(e.data)))
	}
	for _, e := range extents {
		b = append(b, e.data...)
	}
	le.PutUint32(b[len(templateMagic):], crc32.Checksum(b[templateHead:], castagnoli()))
	return b
}

func decodeTemplate(b []byte, key string) ([]extent, error) {
	if len(b) < templateHead || string(b[:len(templateMagic)]) != templateMagic ||
		le.Uint32(b[len(templateMagic):]) != crc32.Checksum(b[templateHead:], castagnoli()) {
		return nil, errUnusable
	}
	b, ok := bytes.CutPrefix(b[templateHead:], append(le.AppendUint32(nil, uint32(len(key))), key...))
	if !ok || len(b) < 4 {
		return nil, errUnusable
	}
	n := int(le.Uint32(b))
	if b = b[4:]; n > len(b)/12 {
		return nil, errUnusable
	}
	head, data, end := b[:12*n], b[12*n:], int64(0)
	extents := make([]extent, n)
	for i := range extents {
		off, length := int64(le.Uint64(head[12*i:])), int64(le.Uint32(head[12*i+8:]))
		if off < end || off > maxTemplateSize || length == 0 || length > int64(len(data)) {
			return nil, errUnusable
		}
		extents[i], data, end = extent{off, data[:length]}, data[length:], off+length
	}
	return extents, nil
}

// instance returns the image, whole blocks of it, that a template becomes with a UUID.
func instance(extents []extent, uuid string) ([]extent, error) {
	id, ok := parseUUID(uuid)
	if !ok {
		return nil, errLayout
	}
	blockSize, err := blockSizeOf(extents)
	if err != nil {
		return nil, err
	}
	image := joined(extents, blockSize)
	return image, stamp(image, id)
}

// learn keeps the template of an image that mkfs.ext4 has just made, if from the
// image that it makes with another UUID the template gives this one, byte for
// byte. Otherwise an empty template keeps the next one from trying. The template
// is written to a file at scratch, which is for the caller to remove.
func (t *template) learn(ctx context.Context, image *os.File, scratch, mkfs string, opt FormatOptions) error {
	fi, err := image.Stat()
	if err != nil {
		return err
	}
	want, err := readExtents(image, maxTemplateBytes)
	if errors.Is(err, errTooMuch) {
		return t.keep(scratch, nil)
	}
	if err != nil {
		return err
	}
	uuid := opt.UUID
	opt.UUID = randomUUID()
	extents, err := twin(ctx, mkfs, fi.Size(), opt)
	if err != nil {
		return err
	}
	if got, err := instance(extents, uuid); err != nil || !sameImage(got, want) {
		return t.keep(scratch, nil)
	}
	return t.keep(scratch, extents)
}

// twin makes another image in memory and returns what it holds.
func twin(ctx context.Context, mkfs string, sizeBytes int64, opt FormatOptions) ([]extent, error) {
	fd, err := unix.MemfdCreate("twin", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "twin")
	defer f.Close()
	if err := f.Truncate(sizeBytes); err != nil {
		return nil, err
	}
	if err := runMkfs(ctx, mkfs, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), sizeBytes, opt); err != nil {
		return nil, err
	}
	return readExtents(f, maxTemplateBytes)
}

// sameImage compares images of whole blocks with what was read of another one.
func sameImage(a, b []extent) bool {
	blockSize, err := blockSizeOf(b)
	return err == nil && slices.EqualFunc(a, joined(b, blockSize), func(a, b extent) bool {
		return a.off == b.off && bytes.Equal(a.data, b.data)
	})
}

// keep writes a template by way of a file at scratch. It is not synced: what a
// power cut leaves of it has a wrong checksum.
func (t *template) keep(scratch string, extents []extent) error {
	dir := filepath.Dir(t.path)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.WriteFile(scratch, encodeTemplate(extents, t.key), 0o600); err != nil {
		return err
	}
	if err := os.Rename(scratch, t.path); err != nil {
		return err
	}
	return evict(dir, maxTemplates)
}

// evict deletes the oldest templates beyond a number of them.
func evict(dir string, most int) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) <= most {
		return err
	}
	age := func(e fs.DirEntry) int64 {
		if fi, err := e.Info(); err == nil {
			return fi.ModTime().UnixNano()
		}
		return 0
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(age(a), age(b)) })
	for _, e := range entries[:len(entries)-most] {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}
