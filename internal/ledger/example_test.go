package ledger_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// newLedger makes a ledger with a limit, and opens it for a writer.
func newLedger(dir string, limits ledger.Limits, o ledger.Options) (*ledger.Ledger, *ledger.Writer) {
	f, err := os.OpenFile(filepath.Join(dir, "ledger"), os.O_RDWR|os.O_CREATE, 0o600)
	check(err)
	check(ledger.Format(f, limits, true))
	l, err := ledger.Open(f)
	check(err)
	return l, newWriter(dir, o)
}

func newWriter(dir string, o ledger.Options) *ledger.Writer {
	f, err := os.OpenFile(filepath.Join(dir, "ledger"), os.O_RDWR, 0) // a file of its own
	check(err)
	w, err := ledger.NewWriter(f, o)
	check(err)
	return w
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func stat(fd int) (st unix.Stat_t) {
	check(unix.Fstat(fd, &st))
	return st
}

// Growing and cutting a file.
func Example_extend() {
	dir, err := os.MkdirTemp("", "ledger")
	check(err)
	defer os.RemoveAll(dir)
	l, w := newLedger(dir, ledger.Limits{Bytes: 64 << 10, Inodes: 10}, ledger.Options{})
	var rules ledger.Rules

	// create: one inode; the directory may grow by a block, which it did not
	op := w.Lock()
	check(op.Grow(ledger.Delta{Bytes: ledger.Block, Inodes: 1}))
	f, err := os.Create(filepath.Join(dir, "file"))
	check(err)
	check(op.Done(ledger.Delta{Inodes: 1}))

	// write 10 000 bytes at 0: look, grow, look again
	ino := stat(int(f.Fd())).Ino
	write := func(off int64, n int) error {
		op := w.Lock(ino)
		before := rules.File(stat(int(f.Fd())).Size)
		if op.Late() {
			before = 0
		}
		if err := op.Grow(ledger.Delta{Bytes: rules.File(off+int64(n)) - before}); err != nil {
			return errors.Join(err, op.Done(ledger.Delta{}))
		}
		_, err := f.WriteAt(make([]byte, n), off)
		after := rules.File(stat(int(f.Fd())).Size)
		return errors.Join(err, op.Done(ledger.Delta{Bytes: after - before}))
	}
	check(write(0, 10_000))
	check(write(2000, 100)) // inside: costs nothing
	s, _ := l.State()
	fmt.Println("used", s.Used)

	err = write(60_000, 8000)
	fmt.Println(errors.Is(err, syscall.ENOSPC), err)

	// truncate, O_TRUNC
	op = w.Lock(ino)
	before := rules.File(stat(int(f.Fd())).Size)
	check(f.Truncate(0))
	check(op.Done(ledger.Delta{Bytes: -before}))
	s, _ = l.State()
	fmt.Println("used", s.Used)
	check(w.Close())
	// Output:
	// used {12288 1}
	// true quota exceeded: limit 65536 bytes, used 12288, wanted 57344 more
	// used {0 1}
}

// Taking the last name of a file that a guest has open, here and elsewhere.
func Example_unlinkWhileOpen() {
	dir, err := os.MkdirTemp("", "ledger")
	check(err)
	defer os.RemoveAll(dir)
	l, a := newLedger(dir, ledger.Limits{}, ledger.Options{Server: true})
	const ino, size = 42, 8 * ledger.Block
	file := ledger.Delta{Bytes: size, Inodes: 1}
	op := a.Lock()
	check(op.Grow(file))
	check(op.Done(file))
	// what a file server answers in Poll: its open inodes without a name
	open := map[uint64]ledger.Delta{}
	b := newWriter(dir, ledger.Options{Server: true, Orphans: func(visit func(uint64, func() (ledger.Delta, bool))) {
		for ino, charge := range open {
			visit(ino, func() (ledger.Delta, bool) { return charge, true })
		}
	}})
	used := func(when string) {
		check(a.Poll())
		check(a.Poll()) // idle: the reserve is given back
		s, _ := l.State()
		fmt.Println(when, s.Used.Bytes)
	}

	op = a.Lock(ino) // and the directory
	open[ino] = file // b has it open
	op.Orphan(ino, file, false)
	check(op.Done(ledger.Delta{})) // what Orphan was told is not part of it
	used("deleted by a:")
	check(b.Poll()) // counts it from now on
	used("b has said that it has it open:")
	delete(open, ino)
	b.Released(ino)
	check(b.Poll())
	used("closed by b:")
	check(b.Close())
	check(a.Close())
	// Output:
	// deleted by a: 32768
	// b has said that it has it open: 32768
	// closed by b: 0
}

// Names beyond the first count as an inode; a victim of rename is unlinked.
func Example_names() {
	dir, err := os.MkdirTemp("", "ledger")
	check(err)
	defer os.RemoveAll(dir)
	l, w := newLedger(dir, ledger.Limits{Bytes: 1 << 20, Inodes: 3}, ledger.Options{})
	rules := ledger.Rules{DirSizes: true}
	const root, sub, one, two = 2, 3, 4, 5

	// mkdir: the new directory's first block, and what its parent grows by
	op := w.Lock(root)
	check(op.Grow(ledger.Delta{Bytes: 2 * ledger.Block, Inodes: 1}))
	check(op.Done(ledger.Delta{Bytes: rules.Dir(4096) + rules.Root(4096), Inodes: 1}))

	// create two files
	for range 2 {
		op = w.Lock(sub)
		check(op.Grow(ledger.Delta{Bytes: ledger.Block, Inodes: 1}))
		check(op.Done(ledger.Delta{Inodes: 1}))
	}

	// link: one more name is one too many
	op = w.Lock(sub, one)
	fmt.Println(op.Grow(ledger.Delta{Bytes: ledger.Block, Inodes: 1}))
	check(op.Done(ledger.Delta{}))

	// rename one over two, which has no other name and is not open
	op = w.Lock(root, sub, one, two)
	op.Orphan(two, ledger.Delta{Inodes: 1}, false)
	check(op.Done(ledger.Delta{}))

	// setxattr: what it may add, then what it did
	op = w.Lock(one)
	check(op.Grow(ledger.Delta{Bytes: rules.Xattrs(5000)}))
	check(op.Done(ledger.Delta{Bytes: rules.Xattrs(5000) - rules.Xattrs(0)}))

	// statfs, and whether KEEP_SIZE is refused
	s, err := w.Usage()
	check(err)
	fmt.Println(s.Limits, s.Used, w.Limited())
	check(w.Close())
	s, _ = l.State()
	fmt.Println(s.Used, s.Writers)
	// Output:
	// quota exceeded: limit 3 files, used 3, wanted 1 more
	// {1048576 3} {12288 2} true
	// {12288 2} 0
}
