package volumefs

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Resolver says how paths are resolved.
type Resolver uint8

const (
	// Auto uses openat2 where the kernel has it, else the walk.
	Auto Resolver = iota
	// Walk resolves one component at a time. Tests force it.
	Walk
)

// Options of an FS. The zero value serves an anonymous volume that never ends.
type Options struct {
	// Volume is the name used in errors.
	Volume string
	// Alive is called after each operation and before it is acknowledged; an
	// error it returns takes the place of the operation's result.
	Alive func() error
	// Scratch is a directory of the same file system outside the volume, where
	// a replacement has its name for the instant before it takes the old
	// file's. Nil: the replaced file's own directory.
	Scratch *os.File
	// Ledger is called by the first operation that changes the volume, and gives
	// the writer to charge all of them to. It is closed by Close. Nil: nothing is
	// counted. On an error the operation fails with it, and the next one asks again.
	Ledger func() (*ledger.Writer, error)
	// ScratchAge is how old a name in Scratch must be to be taken for a dead
	// writer's and removed by New; 0 means a minute. A live writer needs
	// milliseconds; should it have been stopped in between, its rename fails and
	// nothing is acknowledged.
	ScratchAge time.Duration
	// Resolver is Auto outside tests.
	Resolver Resolver
	// NoUnnamed keeps O_TMPFILE from being used, NoUnnamedSync such a file from
	// being synced before it has a name, NoXattrAt getxattrat: for tests of the
	// ways without them.
	NoUnnamed, NoUnnamedSync, NoXattrAt bool
	// CloseLater has replaced files closed later as if that took long: for tests.
	CloseLater bool
}

// FS is an open volume. It is safe for concurrent use.
type FS struct {
	opts    Options
	root    int // the data directory; belongs to rootF
	rootF   *os.File
	proc    int // /proc/self/fd
	scratch int // -1: none
	kernel  bool
	mount   mountID // of root, where openat2 does not tell mounts apart

	opening sync.Mutex // while the ledger is opened
	counted atomic.Pointer[accounting]

	replaced replaced

	noUnnamed atomic.Bool // set once O_TMPFILE turned out not to work here
	noXattrAt atomic.Bool // set once getxattrat turned out not to exist

	orderOnce sync.Once
	order     bool // see keepsOrder
}

// New returns the FS of an open data directory (O_PATH is enough). The
// directory stays the caller's and must stay open until Close.
func New(root *os.File, o Options) (*FS, error) {
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errdefs.Wrap(errdefs.Filesystem, err, "open /proc/self/fd").WithHint("mount proc at /proc")
	}
	f := &FS{opts: o, root: int(root.Fd()), rootF: root, proc: proc, scratch: -1}
	if o.Scratch != nil {
		f.scratch = int(o.Scratch.Fd())
		f.reapScratch()
	}
	f.noUnnamed.Store(o.NoUnnamed)
	f.noXattrAt.Store(o.NoXattrAt)
	if f.kernel = o.Resolver == Auto && f.hasOpenat2(); !f.kernel {
		f.mount = f.mountOf(f.root)
	}
	return f, nil
}

// Close releases what New opened, and the ledger. Streams must have been closed
// before.
func (f *FS) Close() error {
	f.replaced.closeAll()
	var err error
	if a := f.counted.Load(); a != nil {
		err = a.w.Close()
	}
	return errors.Join(err, unix.Close(f.proc))
}

// hasOpenat2 asks once. Old kernels answer ENOSYS, some sandboxes EPERM.
func (f *FS) hasOpenat2() bool {
	fd, err := f.openBeneath(".", unix.O_PATH)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
}

// begin checks the context and cleans the path.
func (f *FS) begin(ctx context.Context, op, path string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", f.fault(op, path, err)
	}
	rel, err := clean(path)
	if err != nil {
		return "", f.fault(op, path, err)
	}
	return rel, nil
}

// beginFile is begin for the path of a file to be written, which cannot end with
// a slash: that is a directory's.
func (f *FS) beginFile(ctx context.Context, op, path string) (string, error) {
	rel, err := f.begin(ctx, op, path)
	if err == nil && rel != "" && strings.HasSuffix(path, "/") {
		return "", f.fault(op, path, errSlash)
	}
	return rel, err
}

// end is the last step of every operation: what became of the volume matters
// more than what became of the operation.
func (f *FS) end(op, path string, err error) error {
	if f.opts.Alive != nil {
		if gone := f.opts.Alive(); gone != nil {
			return gone
		}
	}
	return f.fault(op, path, err)
}

// fault gives an error its operation, volume and path. Nil stays nil.
func (f *FS) fault(op, path string, err error) error {
	if err == nil {
		return nil
	}
	var done *errdefs.Error
	if errors.As(err, &done) {
		return err
	}
	e := errdefs.Wrap(errdefs.Filesystem, err, "%s %s", op, f.where(path))
	e.Op, e.Volume, e.Path = op, f.opts.Volume, path
	var r *refusal
	var full *errdefs.QuotaError
	switch {
	case errors.As(err, &r):
		e.Hint = r.hint
	case errors.As(err, &full):
		limit := " SIZE"
		if full.Inodes {
			limit = " --inodes N"
		}
		e.Hint = "delete files, or raise the limit: msb volume set-quota " + f.opts.Volume + limit
	}
	return e
}

func (f *FS) where(path string) string {
	shown := strconv.Quote(path)
	if plain := shown[1 : len(shown)-1]; plain == path && path != "" {
		shown = path
	}
	if f.opts.Volume == "" {
		return shown
	}
	return f.opts.Volume + ":" + shown
}

// refusal is a reason that no errno says well enough.
type refusal struct {
	text  string
	errno error
	hint  string
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.errno }

var (
	errEscape = &refusal{text: "path leads out of the volume", errno: errdefs.ErrPathEscape}
	errRoot   = &refusal{text: "is the volume's root directory", errno: unix.EBUSY}
	errSame   = &refusal{text: "source and destination are the same file", errno: unix.EINVAL}
	errNUL    = &refusal{text: "path contains a NUL byte", errno: unix.EINVAL}
	errSlash  = &refusal{text: "a path that ends with a slash is a directory's", errno: unix.EISDIR, hint: "name the file in it"}
	errIsDir  = &refusal{text: "is a directory", errno: unix.EISDIR}
	errNotDir = &refusal{text: "is not a directory", errno: unix.ENOTDIR}
)
