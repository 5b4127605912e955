package volumefs

import (
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxLinks is the kernel's own limit on links followed in one path.
	maxLinks = 40
	// maxTarget is PATH_MAX: no link is longer.
	maxTarget = 4096
	// maxComponents bounds the descriptors that one walk holds.
	maxComponents = 4096
)

// walk resolves a path one component at a time. It holds every directory on
// the way open, so that ".." in a link means the directory that the walk came
// from and nothing that was renamed in between.
type walk struct {
	f     *FS
	dirs  []int    // open directories above the current one; the last is the current one
	todo  []string // components still to go, the next one last
	links int
}

// walk is the way without openat2; it alone follows stand-ins and knows how
// to go on where directories are missing.
func (f *FS) walk(rel string, l last) (*spot, error) {
	w := &walk{f: f}
	defer w.close()
	if err := w.push(f.root, "."); err != nil {
		return nil, err
	}
	if err := w.plan(rel); err != nil {
		return nil, err
	}
	for len(w.todo) > 0 {
		s, err := w.step(l)
		if s != nil || err != nil {
			return s, err
		}
	}
	s := &spot{dir: w.pop(), fd: -1}
	if err := s.openSelf(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// step takes one component. A spot is returned when it was the last one.
func (w *walk) step(l last) (*spot, error) {
	name := w.todo[len(w.todo)-1]
	w.todo = w.todo[:len(w.todo)-1]
	switch name {
	case "", ".":
		return nil, nil
	case "..":
		return nil, w.up(1)
	}
	s := &spot{dir: w.top(), name: name, fd: -1}
	err := w.f.openName(s)
	if err == unix.ENOENT {
		return w.miss(name, l)
	}
	isLast := len(w.todo) == 0
	if err == nil && (!isLast || l.follows()) {
		var target string
		if target, err = w.f.linkTarget(s); err == nil && target != "" {
			_ = unix.Close(s.fd)
			return nil, w.followLink(target)
		}
	}
	switch {
	case err != nil:
	case isLast:
		s.dir = w.pop()
		return s, nil
	case !s.isDir():
		err = unix.ENOTDIR
	default:
		w.dirs = append(w.dirs, s.fd)
		return nil, nil
	}
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
	return nil, err
}

// linkTarget returns where a symlink or stand-in leads, "" for anything else.
func (f *FS) linkTarget(s *spot) (string, error) {
	switch s.st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return readlink(s.fd)
	case unix.S_IFREG:
		var err error
		if s.ov, err = f.overlayOf(s.fd, &s.st); err != nil || !s.ov.isLink() {
			return "", err
		}
		return f.standinTarget(s.fd)
	}
	return "", nil
}

func readlink(fd int) (string, error) {
	b := make([]byte, maxTarget)
	n, err := unix.Readlinkat(fd, "", b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// standinTarget reads the content of a stand-in link.
func (f *FS) standinTarget(pathFd int) (string, error) {
	fd, err := f.reopen(pathFd, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b := make([]byte, maxTarget)
	n, err := pread(fd, b, 0)
	if err != nil {
		return "", err
	}
	target := string(b[:n])
	if target == "" || n == maxTarget || strings.IndexByte(target, 0) >= 0 {
		return "", &refusal{text: "corrupt stand-in link", errno: unix.EIO}
	}
	return target, nil
}

// pread fills b from off as far as the file goes.
func pread(fd int, b []byte, off int64) (int, error) {
	n := 0
	for n < len(b) {
		m, err := unix.Pread(fd, b[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return n, err
		}
		n += m
	}
	return n, nil
}

// followLink puts a link's target in front of what is still to go. An absolute
// one names something in the host's or in the guest's root directory, not in
// the volume.
func (w *walk) followLink(target string) error {
	if w.links++; w.links > maxLinks {
		return unix.ELOOP
	}
	if target[0] == '/' {
		return errEscape
	}
	if strings.HasSuffix(target, "/") {
		target += "." // what comes before it has to be a directory
	}
	return w.plan(target)
}

// plan puts the components of a path in front of what is still to go.
func (w *walk) plan(path string) error {
	parts := strings.Split(path, "/")
	if len(w.todo)+len(parts) > maxComponents {
		return unix.ENAMETOOLONG
	}
	for i := len(parts) - 1; i >= 0; i-- {
		w.todo = append(w.todo, parts[i])
	}
	return nil
}

// miss is reached when name does not exist: from here on there is nothing to
// look up, and what is still to go is text. It is taken back before anything
// is made of it, so that a link to "missing/../../x" makes nothing and does not
// get out.
func (w *walk) miss(name string, l last) (*spot, error) {
	if !l.mayMiss() {
		return nil, unix.ENOENT
	}
	ups, names := 0, []string{name}
	for i := len(w.todo) - 1; i >= 0; i-- {
		switch c := w.todo[i]; {
		case c == "" || c == ".":
		case c != "..":
			names = append(names, c)
		case len(names) > 0:
			names = names[:len(names)-1]
		default:
			ups++
		}
	}
	w.todo = w.todo[:0]
	if err := w.up(ups); err != nil {
		return nil, err
	}
	if ups > 0 || len(names) == 0 { // the text leads back to what exists
		return nil, w.plan(strings.Join(names, "/"))
	}
	n := len(names) - 1
	return &spot{dir: w.pop(), missing: names[:n], name: names[n], fd: -1}, nil
}

func (w *walk) top() int { return w.dirs[len(w.dirs)-1] }

// push opens a name in dir and makes it the current directory.
func (w *walk) push(dir int, name string) error {
	fd, err := w.f.openIn(dir, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	w.dirs = append(w.dirs, fd)
	return nil
}

// pop hands the current directory to the caller.
func (w *walk) pop() int {
	fd := w.top()
	w.dirs = w.dirs[:len(w.dirs)-1]
	return fd
}

// up goes n directories back, never above the root.
func (w *walk) up(n int) error {
	for range n {
		if len(w.dirs) == 1 {
			return errEscape
		}
		_ = unix.Close(w.pop())
	}
	return nil
}

func (w *walk) close() {
	for _, fd := range w.dirs {
		_ = unix.Close(fd)
	}
}
