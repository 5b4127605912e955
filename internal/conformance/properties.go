package conformance

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A property of the shared directory has the value n after round n.
type property struct {
	Staleness
	// overlaid is kept by guests in a stat overlay, which the host's own files
	// do not show.
	overlaid bool
	set      func(n int) error
	// get returns n if that is the value, else some older one.
	get   func(n int) (int, error)
	after func(n int) // what the next round relies on
}

// shared is one party's side of the properties.
type shared struct {
	dir  string
	data *os.File // these stay open
	open *os.File
	log  *os.File
}

// properties opens what stays open; done closes it.
func (p *Party) properties() (props []*property, done func(), err error) {
	s := &shared{dir: p.Dir}
	open := func(name string, flags int) *os.File {
		f, openErr := os.OpenFile(s.path(name), flags, 0)
		err = errors.Join(err, openErr)
		return f
	}
	s.data, s.open, s.log = open("data", os.O_RDWR), open("open", os.O_RDWR), open("appended", os.O_RDWR|os.O_APPEND)
	done = func() {
		for _, f := range []*os.File{s.data, s.open, s.log} {
			f.Close() // of a nil file is an error, not a panic
		}
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	// A lock does not make anybody look again; all parties hold these.
	for _, f := range []*os.File{s.data, s.open, s.log} {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
			done()
			return nil, nil, fmt.Errorf("flock of %s: %w", f.Name(), err)
		}
	}
	return s.list(), done, nil
}

func (s *shared) list() []*property {
	name := func(what string) Staleness { return Staleness{Property: what} }
	return []*property{
		{Staleness: name("data of an open file"), set: s.setData, get: s.getData},
		{Staleness: name("size of a path"), set: s.setSize, get: s.getSize},
		{Staleness: name("size of an open file"), set: s.setOpen, get: s.getOpen},
		{Staleness: name("truncation"), set: s.setShort, get: s.getShort},
		{Staleness: name("appended data"), set: s.setLog, get: s.getLog},
		{Staleness: name("mode"), overlaid: true, set: s.setMode, get: s.getMode},
		{Staleness: name("mtime"), set: s.setTime, get: s.getTime},
		{Staleness: name("new name"), set: s.setMade, get: s.getMade},
		{Staleness: name("listing"), set: s.setList, get: s.getList},
		{Staleness: name("removed name"), set: s.setGone, get: s.getGone, after: func(n int) { _, _ = s.getGone(n + 1) }},
		{Staleness: name("renamed"), set: s.setMoved, get: s.getMoved},
		{Staleness: name("replaced file"), set: s.setReplaced, get: s.getReplaced},
		{Staleness: name("replaced link"), overlaid: true, set: s.setLink, get: s.getLink},
	}
}

func (s *shared) path(name string) string { return filepath.Join(s.dir, name) }

func (s *shared) numbered(name string, n int) string { return s.path(fmt.Sprintf("%s.%d", name, n)) }

func (s *shared) setData(n int) error {
	_, err := s.data.WriteAt([]byte(number(n)), 0)
	return err
}

func (s *shared) getData(int) (int, error) { return numberAt(s.data, 0) }

func numberAt(f *os.File, off int64) (int, error) {
	b := make([]byte, len(number(0)))
	if _, err := f.ReadAt(b, off); err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

func (s *shared) setSize(n int) error { return os.Truncate(s.path("size"), int64(n)) }

func (s *shared) getSize(int) (int, error) {
	fi, err := os.Stat(s.path("size"))
	if err != nil {
		return 0, err
	}
	return int(fi.Size()), nil
}

// setOpen makes the file longer by writing.
func (s *shared) setOpen(n int) error {
	_, err := s.open.WriteAt([]byte{'x'}, int64(n)-1)
	return err
}

func (s *shared) getOpen(int) (int, error) {
	fi, err := s.open.Stat()
	if err != nil {
		return 0, err
	}
	return int(fi.Size()), nil
}

func (s *shared) setShort(n int) error { return os.Truncate(s.path("short"), 1<<16-int64(n)) }

// getShort reads to the end.
func (s *shared) getShort(int) (int, error) {
	f, err := os.Open(s.path("short"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return 1<<16 - len(b), err
}

func (s *shared) setLog(n int) error {
	_, err := s.log.Write([]byte(number(n)))
	return err
}

func (s *shared) getLog(n int) (int, error) {
	got, err := numberAt(s.log, int64(n*len(number(0))))
	if errors.Is(err, io.EOF) {
		return n - 1, nil
	}
	return got, err
}

func modeOf(n int) os.FileMode { return 0o600 | os.FileMode(n) } // below MaxRounds: rwx of others and group

func (s *shared) setMode(n int) error { return os.Chmod(s.path("mode"), modeOf(n)) }

func (s *shared) getMode(n int) (int, error) {
	fi, err := os.Stat(s.path("mode"))
	if err != nil || fi.Mode() != modeOf(n) {
		return n - 1, err
	}
	return n, nil
}

func (s *shared) setTime(n int) error {
	t := time.Unix(int64(n), 7)
	return os.Chtimes(s.path("mtime"), t, t)
}

func (s *shared) getTime(int) (int, error) {
	fi, err := os.Stat(s.path("mtime"))
	if err != nil {
		return 0, err
	}
	return int(fi.ModTime().Unix()), nil
}

func (s *shared) setMade(n int) error { return os.Mkdir(s.numbered("made", n), 0o700) }

func (s *shared) getMade(n int) (int, error) { return present(s.numbered("made", n), n, n-1) }

// present returns one of two values by whether there is such a name.
func present(path string, yes, no int) (int, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return no, nil
	}
	return yes, err
}

func (s *shared) setList(n int) error {
	return os.WriteFile(s.path(fmt.Sprintf("list/%d", n)), nil, 0o600)
}

func (s *shared) getList(int) (int, error) {
	entries, err := os.ReadDir(s.path("list"))
	return len(entries), err
}

func (s *shared) setGone(n int) error { return os.Remove(s.numbered("gone", n)) }

func (s *shared) getGone(n int) (int, error) { return present(s.numbered("gone", n), n-1, n) }

func (s *shared) setMoved(n int) error {
	return os.Rename(s.numbered("move", n-1), s.numbered("move", n))
}

func (s *shared) getMoved(n int) (int, error) {
	old, err := present(s.numbered("move", n-1), n-1, n)
	if err != nil || old != n {
		return old, err
	}
	return present(s.numbered("move", n), n, n-1)
}

func (s *shared) setReplaced(n int) error {
	tmp := s.path("replaced.tmp")
	if err := os.WriteFile(tmp, []byte(number(n)), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, s.path("replaced"))
}

func (s *shared) getReplaced(int) (int, error) {
	b, err := os.ReadFile(s.path("replaced"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

func (s *shared) setLink(n int) error {
	tmp := s.path("link.tmp")
	if err := os.Symlink(strconv.Itoa(n), tmp); err != nil {
		return err
	}
	return os.Rename(tmp, s.path("link"))
}

func (s *shared) getLink(int) (int, error) {
	to, err := os.Readlink(s.path("link"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(to))
}
