package records

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"sync"

	"golang.org/x/sys/unix"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"
)

// A journal is what undoes a transaction, and has to be on the disk, all of it,
// before the database is touched. SQLite syncs its records first and then the
// header that says how many there are: were both on their way at once, a power cut
// could leave the header and half of the records, and SQLite's own checksums look
// at one byte in 200. Here the journal is gathered in memory and sealed: the rest
// of the header's sector gets the length and a hash of all of it. Then it is written
// by one call and synced once. A journal whose seal does not fit its content was
// never complete, so the database was not touched: it is shown to SQLite as one that
// has ended. One without a seal is SQLite's alone.
type journal struct {
	of   uintptr // SQLite's own methods of the file
	text []byte  // what the file is to begin with, if held
	held bool    // text is not in the file yet
	own  bool    // this file object has written to the file
	db   *DB     // whose it is, nil for none
}

const (
	sectorSize   = 512     // the least that SQLite gives a header
	maxHeld      = 1 << 18 // bytes; what is more goes to the file, and is synced as SQLite wants
	journalMagic = "\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"

	journalSuffix = "-journal"
	headerSize    = 28

	sealAt   = 32 // in the header's sector
	sealMark = "msbseal2"
	hashAt   = sealAt + len(sealMark) + 4 // after the length
	sealEnd  = hashAt + 16
	keptAt   = sealEnd // where kept files begin, see kept.go; 0: none
	headEnd  = keptAt + 4
)

// seal puts length and hash into the header of a journal.
func seal(text []byte) {
	copy(text[sealAt:], sealMark)
	binary.LittleEndian.PutUint32(text[hashAt-4:], uint32(len(text)))
	copy(text[hashAt:sealEnd], hashOf(text))
}

// hashOf is of everything but itself: the first half of a SHA-256, which costs 15 µs
// and, unlike a CRC-32C, no table in a process that uses it once.
func hashOf(text []byte) []byte {
	h := sha256.New()
	h.Write(text[:hashAt])
	h.Write(text[sealEnd:])
	return h.Sum(nil)[:sealEnd-hashAt]
}

// isTorn reports whether the journal in an open file has a seal that does not fit.
func isTorn(fd int) (bool, error) {
	head := make([]byte, sealEnd)
	if n, err := readAt(fd, head); err != nil || n < len(head) {
		return false, err
	}
	if string(head[:len(journalMagic)]) != journalMagic || string(head[sealAt:sealAt+len(sealMark)]) != sealMark {
		return false, nil
	}
	size := binary.LittleEndian.Uint32(head[hashAt-4:])
	if size < sectorSize || size > maxHeld {
		return true, nil
	}
	text := make([]byte, size)
	if n, err := readAt(fd, text); err != nil || n < len(text) {
		return err == nil, err
	}
	return !bytes.Equal(text[hashAt:sealEnd], hashOf(text)), nil
}

// readAt reads from the beginning of a file, less only at its end.
func readAt(fd int, p []byte) (done int, err error) {
	for done < len(p) {
		n, err := unix.Pread(fd, p[done:], int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 || err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// write takes a write that is to be held; false leaves it to the file.
func (j *journal) write(p []byte, off int64) bool {
	switch {
	case off == 0 && len(p) >= sectorSize: // a transaction begins
		if j.text == nil {
			j.text = *texts.Get().(*[]byte)
		}
		j.held, j.text = true, append(j.text[:0], p...)
		return true
	case !j.held || off > int64(len(j.text)) || off+int64(len(p)) > maxHeld:
		return false
	}
	kept := copy(j.text[off:], p)
	j.text = append(j.text, p[kept:]...)
	return true
}

// texts holds memory for journals, which SQLite opens for each transaction.
var texts = sync.Pool{New: func() any { b := make([]byte, 0, 1<<15); return &b }}

// complete reports whether SQLite has written how many records there are.
func (j *journal) complete() bool { return string(j.text[:len(journalMagic)]) == journalMagic }

// ends reports whether a write clears the header of a journal that need not keep
// anything any longer.
func (j *journal) ends(p []byte, off int64) bool {
	return off == 0 && p[0] == 0 && len(p) < sectorSize && j.own && j.db != nil && j.db.dropKept && len(j.db.carried) == 0
}

// flush writes what is held to the file.
func (j *journal) flush(file uintptr) int32 {
	if !j.held {
		return sqlite3.SQLITE_OK
	}
	j.own = true
	rc := writeAt(file, j.text, 0)
	j.held = rc != sqlite3.SQLITE_OK // what the file lacks is needed to undo the transaction
	return rc
}

// writeAt writes to an open file of SQLite's.
func writeAt(file uintptr, p []byte, off int64) int32 {
	f := at[sqlite3.TunixFile](file)
	for done := 0; done < len(p); {
		n, err := unix.Pwrite(int(f.Fh), p[done:], off+int64(done))
		done += max(n, 0)
		switch errno, _ := err.(unix.Errno); {
		case err == nil && n > 0, err == unix.EINTR:
		case err == unix.ENOSPC, err == nil:
			return sqlite3.SQLITE_FULL
		default:
			f.FlastErrno = int32(errno)
			return sqlite3.SQLITE_IOERR_WRITE
		}
	}
	return sqlite3.SQLITE_OK
}

// journalOf returns the state of an open journal.
func journalOf(file uintptr) *journal {
	vfs.mu.RLock()
	defer vfs.mu.RUnlock()
	return vfs.journals[*ownerOf(file)]
}

// openJournal gives a journal that was there before its methods.
func openJournal(tls *libc.TLS, file uintptr, owner uint64) int32 {
	j := &journal{of: at[sqlite3.Tsqlite3_file](file).FpMethods, db: dbOf(owner)}
	rc := replaceMethods(tls, file, pointer[syncFunc](syncJournal), func(m *sqlite3.Tsqlite3_io_methods) {
		m.FxClose = pointer[closeFunc](closeJournal)
		m.FxRead = pointer[ioFunc](readJournal)
		m.FxWrite = pointer[ioFunc](writeJournal)
		m.FxFileSize = pointer[sizeFunc](sizeJournal)
	})
	if rc == sqlite3.SQLITE_OK {
		vfs.mu.Lock()
		defer vfs.mu.Unlock()
		vfs.last++
		*ownerOf(file) = vfs.last
		vfs.journals[vfs.last] = j
	}
	return rc
}

// closeJournal is xClose. What is held then is of a transaction that was given up.
func closeJournal(tls *libc.TLS, file uintptr) int32 {
	j := journalOf(file)
	vfs.mu.Lock()
	delete(vfs.journals, *ownerOf(file))
	vfs.mu.Unlock()
	if j.text != nil {
		texts.Put(&j.text)
	}
	return method[closeFunc](&at[sqlite3.Tsqlite3_io_methods](j.of).FxClose)(tls, file)
}

// readJournal is xRead.
func readJournal(tls *libc.TLS, file, buf uintptr, n int32, off int64) int32 {
	j, p := journalOf(file), bytesAt(buf, n)
	if off == 0 && (j.held || j.own) && j.db != nil {
		j.db.committing = nil // the transaction is being undone
	}
	if j.held && off < int64(len(j.text)) {
		if off+int64(n) <= int64(len(j.text)) {
			copy(p, j.text[off:])
			return sqlite3.SQLITE_OK
		}
		if rc := j.flush(file); rc != sqlite3.SQLITE_OK {
			return rc
		}
	}
	rc := method[ioFunc](&at[sqlite3.Tsqlite3_io_methods](j.of).FxRead)(tls, file, buf, n, off)
	if rc != sqlite3.SQLITE_OK || off >= int64(len(journalMagic)) || j.held || j.own {
		return rc
	}
	magic := p[:min(int64(n), int64(len(journalMagic))-off)]
	if magic[0] == 0 {
		return rc
	}
	torn, err := isTorn(int(at[sqlite3.TunixFile](file).Fh))
	if err != nil {
		return sqlite3.SQLITE_IOERR_READ
	}
	if torn {
		clear(magic)
	}
	return rc
}

// writeJournal is xWrite. Should SQLite write another number of records into a
// header that is in the file, the seal is broken off first.
func writeJournal(tls *libc.TLS, file, buf uintptr, n int32, off int64) int32 {
	j := journalOf(file)
	if j.write(bytesAt(buf, n), off) {
		return sqlite3.SQLITE_OK
	}
	if j.ends(bytesAt(buf, n), off) {
		return writeAt(file, make([]byte, sealAt+len(sealMark)), 0)
	}
	if off < int64(len(j.text)) || off+int64(n) > maxHeld {
		if rc := j.flush(file); rc != sqlite3.SQLITE_OK {
			return rc
		}
	}
	if off == 0 && !j.held && *at[byte](buf) != 0 {
		if rc := writeAt(file, make([]byte, len(sealMark)), sealAt); rc != sqlite3.SQLITE_OK {
			return rc
		}
	}
	j.own = j.own || !j.held
	return method[ioFunc](&at[sqlite3.Tsqlite3_io_methods](j.of).FxWrite)(tls, file, buf, n, off)
}

// sizeJournal is xFileSize.
func sizeJournal(tls *libc.TLS, file, size uintptr) int32 {
	j := journalOf(file)
	rc := method[sizeFunc](&at[sqlite3.Tsqlite3_io_methods](j.of).FxFileSize)(tls, file, size)
	if p := at[int64](size); rc == sqlite3.SQLITE_OK && j.held {
		*p = max(*p, int64(len(j.text)))
	}
	return rc
}

// syncJournal is xSync. The first of a commit is not for the header yet: it waits
// for the second. Nor is one that ends a transaction of which nothing is in the
// file.
func syncJournal(_ *libc.TLS, file uintptr, _ int32) int32 {
	j := journalOf(file)
	if !j.held {
		return syncFile(file)
	}
	if !j.complete() {
		return sqlite3.SQLITE_OK
	}
	kept := j.keep()
	seal(j.text)
	rc := j.flush(file)
	if rc == sqlite3.SQLITE_OK {
		rc = syncFile(file)
	}
	if rc == sqlite3.SQLITE_OK && j.db != nil && j.db.awaitJournaled(kept) != nil {
		return codeSync
	}
	return rc
}
