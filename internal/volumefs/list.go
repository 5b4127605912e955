package volumefs

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// parallelList is the number of entries from which a second goroutine pays.
const parallelList = 512

// List returns the immediate children of a directory, sorted by path. Links
// are listed as such, wherever they lead. An entry that vanishes meanwhile is
// left out; one whose overlay cannot be read is listed as Other.
func (f *FS) List(ctx context.Context, path string) ([]Entry, error) {
	rel, err := f.begin(ctx, "list", path)
	if err != nil {
		return nil, err
	}
	entries, err := f.list(ctx, rel)
	if err := f.end("list", path, err); err != nil {
		return nil, err
	}
	return entries, nil
}

func (f *FS) list(ctx context.Context, rel string) ([]Entry, error) {
	fd, err := f.openDir(rel)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	names, err := readNames(ctx, fd)
	if err != nil {
		return nil, err
	}
	prefix := shown(rel)
	if rel != "" {
		prefix += "/"
	}
	entries := make([]Entry, len(names))
	if err := f.describe(ctx, fd, prefix, names, entries); err != nil {
		return nil, err
	}
	entries = slices.DeleteFunc(entries, func(e Entry) bool { return e.Path == "" })
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return entries, nil
}

// openDir opens a directory for reading its names. O_DIRECTORY makes opening
// anything else fail before it has an effect.
func (f *FS) openDir(rel string) (int, error) {
	if f.kernel {
		fd, err := f.openBeneath(rel, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != errSlow {
			return fd, err
		}
	}
	s, err := f.walk(rel, follow)
	if err != nil {
		return -1, err
	}
	defer s.close()
	if !s.isDir() {
		return -1, unix.ENOTDIR
	}
	return f.reopen(s.fd, unix.O_RDONLY|unix.O_DIRECTORY)
}

// readNames reads all names of an open directory but "." and "..".
func readNames(ctx context.Context, fd int) ([]string, error) {
	var names []string
	buf := make([]byte, 64<<10)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := unix.ReadDirent(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// describe fills entries[i] for names[i], on two processors when there are many.
func (f *FS) describe(ctx context.Context, dir int, prefix string, names []string, entries []Entry) error {
	parts := 1
	if len(names) >= parallelList {
		parts = min(2, runtime.GOMAXPROCS(0))
	}
	errs := make([]error, parts)
	var wg sync.WaitGroup
	for p := range parts {
		from, to := len(names)*p/parts, len(names)*(p+1)/parts
		work := func() { errs[p] = f.describePart(ctx, dir, prefix, names[from:to], entries[from:to]) }
		if p == parts-1 {
			work()
			break
		}
		wg.Go(work)
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *FS) describePart(ctx context.Context, dir int, prefix string, names []string, entries []Entry) error {
	for i, name := range names {
		if i%256 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		var st unix.Stat_t
		err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return err
		}
		ov, err := f.overlayIn(dir, name, &st)
		switch {
		case err == unix.ENOENT:
			continue
		case err == errOverlay:
			entries[i] = Entry{Kind: Other}
		case err != nil:
			return err
		default:
			entries[i] = entry(&st, ov)
		}
		entries[i].Path = prefix + escape(name)
	}
	return nil
}
