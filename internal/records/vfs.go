package records

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
	"modernc.org/libc"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/microsandbox-go/microsandbox/internal/home"
)

// vfsName names the VFS of this package (sqlite.org/vfs.html). It is SQLite's
// own for Unix, to which it hands on every call, with these differences:
//
//   - It syncs by fdatasync. SQLite does, too, where its C code is told that
//     there is one; the translation to Go was not. What SQLite writes lies in
//     place, and nobody needs its time of modification: an fsync would have ext4
//     commit its journal for that. A changed size is synced by fdatasync as well.
//     A journal that is there already has its name, durably, since the home was
//     made: SQLite syncs the directory in every transaction, because it opens the
//     journal with the flag that would make it.
//   - It gathers a journal in memory and writes and syncs it at once: see journal.go.
//   - It deletes no journal: one that a killed writer left is played back by a
//     connection that does not know yet that journals are kept.
//   - It opens files only, and so waits for no pipe.
//   - After the sync of the journal, and again between that of the database and the
//     end of the journal, which makes a transaction committed, it waits for what the
//     transaction's changes wait for (see Condition).
const vfsName = "msb"

// ownerParam tells the VFS in the database's URI whose it is.
const ownerParam = "owner"

// vfs is what the functions below share. Addresses are of memory that SQLite has
// allocated and that is never freed: it keeps pointers into it.
var vfs struct {
	once sync.Once
	err  error

	unix  uintptr // the sqlite3_vfs of SQLite
	param uintptr // ownerParam

	mu       sync.RWMutex
	methods  map[[2]uintptr]uintptr // our sqlite3_io_methods by SQLite's and xSync; guarded by mu
	owners   map[uint64]*DB         // guarded by mu
	journals map[uint64]*journal    // open ones; guarded by mu
	last     uint64                 // owner or journal; guarded by mu
}

// registerVFS makes the VFS known to SQLite, once. It takes 3 µs.
func registerVFS() error {
	vfs.once.Do(func() {
		tls := libc.NewTLS()
		defer tls.Close()
		vfs.err = register(tls)
	})
	return vfs.err
}

func register(tls *libc.TLS) error {
	vfs.methods, vfs.owners, vfs.journals = map[[2]uintptr]uintptr{}, map[uint64]*DB{}, map[uint64]*journal{}
	vfs.unix = sqlite3.Xsqlite3_vfs_find(tls, 0)
	if vfs.unix == 0 {
		return errors.New("SQLite knows no VFS")
	}
	var err error
	if vfs.param, err = libc.CString(ownerParam); err != nil {
		return err
	}
	own := *at[sqlite3.Tsqlite3_vfs](vfs.unix)
	own.FszOsFile += int32(unsafe.Sizeof(uint64(0))) // the owner or journal, behind SQLite's part
	own.FpNext = 0
	if own.FzName, err = libc.CString(vfsName); err != nil {
		return err
	}
	own.FxOpen, own.FxDelete = pointer[openFunc](vfsOpen), pointer[deleteFunc](vfsDelete)
	call, err := libc.CString("fchown")
	if err != nil {
		return err
	}
	set := *(*setCallFunc)(unsafe.Pointer(&own.FxSetSystemCall))
	if rc := set(tls, vfs.unix, call, pointer[chownFunc](keepOwner)); rc != sqlite3.SQLITE_OK {
		return fmt.Errorf("set the call fchown: result %d", rc)
	}
	p, err := allocate(tls, own)
	if err != nil {
		return err
	}
	if rc := sqlite3.Xsqlite3_vfs_register(tls, p, 0); rc != sqlite3.SQLITE_OK {
		return fmt.Errorf("register the VFS %s: result %d", vfsName, rc)
	}
	return nil
}

// own gives a handle a number that its connections name in their URI.
func own(d *DB) string {
	vfs.mu.Lock()
	defer vfs.mu.Unlock()
	vfs.last++
	vfs.owners[vfs.last] = d
	d.owner = vfs.last
	return strconv.FormatUint(d.owner, 10)
}

// disown ends what own began; a second call does nothing.
func disown(d *DB) {
	if d.owner == 0 {
		return
	}
	vfs.mu.Lock()
	defer vfs.mu.Unlock()
	delete(vfs.owners, d.owner)
	d.owner = 0
}

// Functions of SQLite's interface, as sqlite3_vfs.xOpen, xDelete and xSetSystemCall,
// sqlite3_io_methods.xClose, xRead and xWrite, xSync and xFileSize, and fchown(2).
type (
	openFunc   = func(tls *libc.TLS, vfs, name, file uintptr, flags int32, outFlags uintptr) int32
	deleteFunc = func(tls *libc.TLS, vfs, name uintptr, syncDir int32) int32
	closeFunc  = func(tls *libc.TLS, file uintptr) int32
	ioFunc     = func(tls *libc.TLS, file, buf uintptr, n int32, off int64) int32
	syncFunc   = func(tls *libc.TLS, file uintptr, flags int32) int32
	sizeFunc   = func(tls *libc.TLS, file, size uintptr) int32

	setCallFunc = func(tls *libc.TLS, vfs, name, call uintptr) int32
	chownFunc   = func(tls *libc.TLS, fd int32, uid, gid uint32) int32
)

// vfsOpen is xOpen: SQLite's own, then the file gets our methods.
func vfsOpen(tls *libc.TLS, _, name, file uintptr, flags int32, outFlags uintptr) int32 {
	const ours = sqlite3.SQLITE_OPEN_MAIN_DB | sqlite3.SQLITE_OPEN_MAIN_JOURNAL
	if flags&ours != 0 && home.CheckRegular(libc.GoString(name)) != nil {
		*at[sqlite3.Tsqlite3_file](file) = sqlite3.Tsqlite3_file{} // nothing to close
		return sqlite3.SQLITE_CANTOPEN
	}
	open := method[openFunc](&at[sqlite3.Tsqlite3_vfs](vfs.unix).FxOpen)
	switch {
	case flags&sqlite3.SQLITE_OPEN_MAIN_DB != 0:
		rc := open(tls, vfs.unix, name, file, flags, outFlags)
		if rc == sqlite3.SQLITE_OK {
			*ownerOf(file) = ownerIn(tls, name)
			if d := dbOf(*ownerOf(file)); d != nil {
				d.seen = versionIn(int(at[sqlite3.TunixFile](file).Fh))
			}
			return replaceMethods(tls, file, pointer[syncFunc](syncDatabase), func(*sqlite3.Tsqlite3_io_methods) {})
		}
		return rc
	case flags&sqlite3.SQLITE_OPEN_MAIN_JOURNAL != 0:
		rc := open(tls, vfs.unix, name, file, flags&^sqlite3.SQLITE_OPEN_CREATE, outFlags)
		if rc == sqlite3.SQLITE_OK {
			return openJournal(tls, file, ownerIn(tls, name))
		}
		if _, err := os.Lstat(libc.GoString(name)); err == nil {
			return rc // to be read by nobody but the methods above
		}
	}
	return open(tls, vfs.unix, name, file, flags, outFlags) // a new journal's directory must be synced
}

// vfsDelete is xDelete: SQLite's own, but a journal stays, without the beginning of
// its header.
func vfsDelete(tls *libc.TLS, _, name uintptr, syncDir int32) int32 {
	path := libc.GoString(name)
	if !strings.HasSuffix(path, journalSuffix) {
		return method[deleteFunc](&at[sqlite3.Tsqlite3_vfs](vfs.unix).FxDelete)(tls, vfs.unix, name, syncDir)
	}
	f, err := home.OpenFile(path, unix.O_RDWR|unix.O_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) {
		return sqlite3.SQLITE_IOERR_DELETE_NOENT
	}
	if err == nil {
		_, err = f.WriteAt(make([]byte, headerSize), 0)
		err = errors.Join(err, unix.Fdatasync(int(f.Fd())), f.Close())
	}
	if err != nil {
		return sqlite3.SQLITE_IOERR_DELETE
	}
	return sqlite3.SQLITE_OK
}

// versionIn returns the user version in an open database (sqlite.org/fileformat2.html,
// 1.3), 0 if it has none.
func versionIn(fd int) uint32 {
	var field [4]byte
	if n, err := unix.Pread(fd, field[:], 60); n < len(field) || err != nil {
		return 0
	}
	return binary.BigEndian.Uint32(field[:])
}

// ownerIn returns the owner that the name of a database or its journal tells, as
// SQLite keeps it, 0 for none.
func ownerIn(tls *libc.TLS, name uintptr) uint64 {
	p := sqlite3.Xsqlite3_uri_parameter(tls, name, vfs.param)
	if p == 0 {
		return 0
	}
	owner, _ := strconv.ParseUint(libc.GoString(p), 10, 64)
	return owner
}

// dbOf returns an owner, nil for none.
func dbOf(owner uint64) *DB {
	vfs.mu.RLock()
	defer vfs.mu.RUnlock()
	return vfs.owners[owner]
}

// keepOwner is fchown for SQLite, which as root gives the journal to the owner of
// the database whenever it looks at it: nearly always its owner already, but for
// the file system a change, which it may have to wait for.
func keepOwner(_ *libc.TLS, fd int32, uid, gid uint32) int32 {
	var st unix.Stat_t
	if unix.Fstat(int(fd), &st) == nil && st.Uid == uid && st.Gid == gid {
		return 0
	}
	if unix.Fchown(int(fd), int(uid), int(gid)) != nil {
		return -1
	}
	return 0
}

// replaceMethods gives an open file a copy of its methods with another xSync, and
// what else change replaces.
func replaceMethods(tls *libc.TLS, file, sync uintptr, change func(*sqlite3.Tsqlite3_io_methods)) int32 {
	f := at[sqlite3.Tsqlite3_file](file)
	vfs.mu.Lock()
	defer vfs.mu.Unlock()
	of := [2]uintptr{f.FpMethods, sync}
	m := vfs.methods[of]
	if m == 0 {
		methods := *at[sqlite3.Tsqlite3_io_methods](f.FpMethods)
		methods.FxSync = sync
		change(&methods)
		var err error
		if m, err = allocate(tls, methods); err != nil {
			return sqlite3.SQLITE_NOMEM // SQLite closes the file: it has methods
		}
		vfs.methods[of] = m
	}
	f.FpMethods = m
	return sqlite3.SQLITE_OK
}

// syncFile makes the content of an open file durable.
func syncFile(file uintptr) int32 {
	f := at[sqlite3.TunixFile](file)
	for {
		switch err := unix.Fdatasync(int(f.Fh)); err {
		case nil:
			return sqlite3.SQLITE_OK
		case unix.EINTR:
		default:
			if errno, ok := err.(unix.Errno); ok {
				f.FlastErrno = int32(errno)
			}
			return codeSync
		}
	}
}

// syncDatabase is xSync of the database. Its failing undoes the transaction.
func syncDatabase(_ *libc.TLS, file uintptr, _ int32) int32 {
	d := dbOf(*ownerOf(file))
	if d != nil && d.awaitJournaled(false) != nil { // of a journal that SQLite has synced
		return codeSync
	}
	if rc := syncFile(file); rc != sqlite3.SQLITE_OK {
		if d != nil {
			d.committing = nil // undoing syncs the database, too
		}
		return rc
	}
	if d != nil && d.awaitSynced() != nil {
		return codeSync
	}
	return sqlite3.SQLITE_OK
}

// ownerOf returns the field behind SQLite's part of a file.
func ownerOf(file uintptr) *uint64 {
	return at[uint64](file + uintptr(at[sqlite3.Tsqlite3_vfs](vfs.unix).FszOsFile))
}

// What follows is the border to SQLite, whose pointers are numbers.

// at returns what lies at an address of SQLite's.
func at[T any](address uintptr) *T { return *(**T)(unsafe.Pointer(&address)) }

// allocate copies a value to memory of SQLite's. The race detector's checks of
// pointers do not let it have memory of Go's.
func allocate[T any](tls *libc.TLS, v T) (uintptr, error) {
	p := sqlite3.Xsqlite3_malloc(tls, int32(unsafe.Sizeof(v)))
	if p == 0 {
		return 0, unix.ENOMEM
	}
	*at[T](p) = v
	return p, nil
}

// pointer returns a function of this package as SQLite calls it.
func pointer[F openFunc | deleteFunc | closeFunc | ioFunc | syncFunc | sizeFunc | chownFunc](f F) uintptr {
	return *(*uintptr)(unsafe.Pointer(&f))
}

// method returns a function of SQLite's from where its address is.
func method[F openFunc | deleteFunc | closeFunc | ioFunc | sizeFunc](address *uintptr) F {
	return *(*F)(unsafe.Pointer(address))
}

// bytesAt returns memory of SQLite's.
func bytesAt(address uintptr, n int32) []byte { return unsafe.Slice(at[byte](address), n) }
