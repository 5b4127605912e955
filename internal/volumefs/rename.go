package volumefs

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/ledger"
)

// Rename gives a file, directory or link another name, making missing parents;
// an existing file or empty directory of that name is replaced. A link is
// renamed itself. A failed call leaves no parents behind.
func (f *FS) Rename(ctx context.Context, from, to string, o WriteOptions) error {
	relFrom, err := f.begin(ctx, "rename", from)
	if err != nil {
		return err
	}
	relTo, err := f.begin(ctx, "rename", to)
	if err != nil {
		return err
	}
	err = f.rename(relFrom, relTo, o)
	if err != nil {
		err = &pairError{to: to, err: err}
	}
	return f.end("rename", from, err)
}

func (f *FS) rename(from, to string, o WriteOptions) error {
	if from == "" || to == "" {
		return errRoot
	}
	src, err := f.find(from, itself)
	if err != nil {
		return err
	}
	defer src.close()
	dst, err := f.find(to, replace)
	if err != nil {
		return err
	}
	defer dst.close()
	made, err := f.makeDirs(dst.dir, dst.missing)
	if err != nil {
		return err
	}
	if err := f.move(src, made.end(), dst); err != nil {
		made.undo()
		return err
	}
	defer made.close()
	if !o.Durable {
		return nil
	}
	if err := made.sync(); err != nil {
		return err
	}
	return syncDir(src.dir)
}

// move renames src to the name of dst in dir. Where both are names of one file
// rename(2) does nothing and says it went well; a caller expects the old name to
// be gone, as mv sees to.
func (f *FS) move(src *spot, dir int, dst *spot) error {
	n, err := f.accountName(dir, dst.name, f.inodeOf(src.dir))
	if err != nil {
		return err
	}
	defer n.close()
	if n.fd < 0 {
		if err := n.growName(ledger.Delta{}, dir, dst.name); err != nil {
			return err
		}
	}
	from := n.dirSize(src.dir)
	if err := renameat(src.dir, src.name, dir, dst.name); err != nil {
		return err
	}
	same := n.fd >= 0 && sameFile(&src.st, &n.st)
	if !same {
		n.gone()
	}
	if dst.exists() && !src.isDir() && sameFile(&src.st, &dst.st) && !sameName(src, dst) {
		if err := unix.Unlinkat(src.dir, src.name, 0); err != nil && err != unix.ENOENT {
			return err
		}
		if same {
			n.gone()
		}
	}
	if f.inodeOf(src.dir) != f.inodeOf(dir) {
		n.dirGrew(src.dir, from)
	}
	return n.settle()
}

// sameName reports whether two spots are one name in one directory.
func sameName(a, b *spot) bool {
	if a.name != b.name {
		return false
	}
	var x, y unix.Stat_t
	return unix.Fstat(a.dir, &x) == nil && unix.Fstat(b.dir, &y) == nil && sameFile(&x, &y)
}
