package records

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// A change may have to leave a file behind for whoever finds that it was undone.
// Such a file need not be synced: its content is at the end of the sealed journal,
// which is, and the header tells where. SQLite clears the beginning of the header
// when a transaction ends; here the mark of the seal is cleared with it, in one write
// to one sector, where the transaction is committed. Who opens the records to write, or
// begins another transaction, and finds the mark of one that was undone puts its files
// back.

// KeptFile is a small file in the home. The zero KeptFile is none.
type KeptFile struct {
	Path    string
	Content []byte
}

const (
	keptMark     = "msbkept1"
	keptLengthAt = len(keptMark)
	keptHashAt   = keptLengthAt + 4
	keptHashEnd  = keptHashAt + 16
	maxKept      = maxHeld / 2 // bytes in one journal
)

// keep appends the files of the changes that are being committed to the journal,
// all of them or, where they are too large, none.
func (j *journal) keep() (kept bool) {
	if j.db == nil {
		return false
	}
	begin := len(j.text)
	text := append(j.text, keptMark...)
	text = append(text, make([]byte, keptHashEnd-keptLengthAt)...)
	for _, f := range j.db.carried {
		text = appendBytes(appendBytes(text, []byte(f.Path)), f.Content)
	}
	for _, c := range j.db.committing {
		f := c.when.Keep
		if f.Path == "" {
			continue
		}
		path, err := j.db.relative(f.Path)
		if err != nil {
			return false
		}
		text = appendBytes(appendBytes(text, []byte(path)), f.Content)
	}
	files := text[begin+keptHashEnd:]
	if len(files) == 0 || len(files) > maxKept || len(text) > maxHeld {
		return false
	}
	binary.LittleEndian.PutUint32(text[begin+keptLengthAt:], uint32(len(files)))
	sum := sha256.Sum256(files)
	copy(text[begin+keptHashAt:begin+keptHashEnd], sum[:])
	binary.LittleEndian.PutUint32(text[keptAt:], uint32(begin))
	j.text = text
	return true
}

func appendBytes(b, field []byte) []byte {
	return append(binary.AppendUvarint(b, uint64(len(field))), field...)
}

func cutBytes(b []byte) (field, rest []byte, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 || n > uint64(len(b)-size) {
		return nil, nil, false
	}
	return b[size : size+int(n)], b[size+int(n):], true
}

// restoreNow puts back what restoreKept does. Where that fails the records can be
// used all the same.
func (d *DB) restoreNow(ctx context.Context) {
	ctx = context.WithoutCancel(ctx) // a later call of the handle relies on it
	if d.take(ctx) != nil {
		return
	}
	defer d.give()
	_ = d.patiently(ctx, func() error { return d.transact(func(querier) error { return nil }) })
}

// Forget says that a kept file is not wanted any more, though its transaction was
// undone: whoever kept it has cleaned up.
func (d *DB) Forget(ctx context.Context, file KeptFile) error {
	path, err := d.relative(file.Path)
	if err != nil {
		return err
	}
	if err := d.take(ctx); err != nil {
		return d.wrap(err, "forget "+path)
	}
	defer d.give()
	d.forget = path
	defer func() { d.forget = "" }()
	return d.wrap(d.patiently(ctx, func() error { return d.transact(func(querier) error { return nil }) }), "forget "+path)
}

// relative makes a path one that holds wherever the home is when it is used.
func (d *DB) relative(path string) (string, error) {
	path, err := filepath.Rel(string(d.home), path)
	if err == nil && !filepath.IsLocal(path) {
		err = fmt.Errorf("%s is not in the home", path)
	}
	return path, err
}

// restoreKept puts back the files that were kept by a transaction that was undone,
// before another journal is written. Where that fails, for want of space perhaps, the
// next journal keeps them, too. It is called with SQLite's lock for writing: every
// transaction has ended, and a hot journal has been played back.
func (d *DB) restoreKept() {
	d.carried = nil
	path := d.home.DB() + journalSuffix
	head, err := readHead(path)
	if err != nil || head.kept() == 0 {
		return
	}
	f, err := home.OpenFile(path, unix.O_RDWR)
	if err != nil {
		return
	}
	defer f.Close()
	files, err := readKept(f, head.kept())
	for _, file := range files {
		if file.Path == d.forget {
			continue
		}
		if err := file.restore(d.home); err != nil {
			d.carried = append(d.carried, file)
		}
	}
	if err == nil && len(d.carried) == 0 {
		// A journal that is torn has its magic yet, and must not lose its seal alone.
		_, _ = f.WriteAt(make([]byte, sealAt+len(sealMark)), 0)
	}
}

// journalHead is the beginning of a journal: zeros if there is none.
type journalHead [headEnd]byte

func readHead(path string) (head journalHead, err error) {
	f, err := home.OpenFile(path, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return head, nil
	}
	if err != nil {
		return head, err
	}
	defer f.Close()
	_, err = f.ReadAt(head[:], 0)
	return head, ignoreEOF(err)
}

// ended tells that nothing is to be undone.
func (h *journalHead) ended() bool { return h[0] == 0 }

// kept returns where in the journal kept files begin, 0 for nowhere.
func (h *journalHead) kept() int64 {
	if string(h[sealAt:sealAt+len(sealMark)]) != sealMark {
		return 0
	}
	return int64(binary.LittleEndian.Uint32(h[keptAt:]))
}

// readKept reads what keep has written; a power cut may have left anything.
func readKept(f io.ReaderAt, at int64) (files []KeptFile, err error) {
	head := make([]byte, keptHashEnd)
	if _, err := f.ReadAt(head, at); err != nil {
		return nil, ignoreEOF(err)
	}
	n := binary.LittleEndian.Uint32(head[keptLengthAt:])
	if string(head[:len(keptMark)]) != keptMark || n > maxKept {
		return nil, nil
	}
	text := make([]byte, n)
	if _, err := f.ReadAt(text, at+int64(keptHashEnd)); err != nil {
		return nil, ignoreEOF(err)
	}
	if sum := sha256.Sum256(text); !bytes.Equal(sum[:keptHashEnd-keptHashAt], head[keptHashAt:]) {
		return nil, nil
	}
	for len(text) > 0 {
		path, rest, ok := cutBytes(text)
		content, rest, ok2 := cutBytes(rest)
		if !ok || !ok2 || !filepath.IsLocal(string(path)) {
			return nil, nil
		}
		files, text = append(files, KeptFile{string(path), content}), rest
	}
	return files, nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// restore makes a kept file, whose path is relative, and its directory durable.
func (file KeptFile) restore(h home.Dir) error {
	path := filepath.Join(string(h), file.Path)
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := home.OpenFile(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	have, err := io.ReadAll(io.LimitReader(f, int64(len(file.Content))+1))
	if err == nil && !bytes.Equal(have, file.Content) {
		if err = f.Truncate(0); err == nil {
			_, err = f.WriteAt(file.Content, 0)
		}
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
}
