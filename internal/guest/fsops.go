package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

var errNotRegular = errors.New("not a regular file")

// maxListed bounds the entries of one listing: its answer must fit a frame.
const maxListed = 200_000

// maxResponse bounds the encoded names of one answer.
const maxResponse = agentproto.MaxFrame - 64<<10

// fsSession is one file operation.
type fsSession struct {
	a   *agent
	id  uint32
	out *agentproto.Stream
	op  agentproto.FSOp
	in  *fsInput // data of a Write
}

// startFS starts a file operation; it runs in a goroutine of its own because a
// file system may block for as long as it likes.
func (a *agent) startFS(id uint32, p []byte) {
	var req agentproto.FSRequest
	if err := agentproto.Unmarshal(p, &req); err != nil {
		a.answerFS(id, nil, err)
		return
	}
	if err := req.Op.Check(); err != nil {
		a.answerFS(id, nil, err)
		return
	}
	s := &fsSession{a: a, id: id, op: req.Op, in: newFSInput()}
	if !a.sessions.add(id, s) {
		a.refuse(id, "invalid_session", "id is in use", agentproto.MsgFSRequest)
		return
	}
	s.out = a.link.Open(id)
	go func() {
		data, err := s.do()
		a.sessions.drop(id, s)
		finish(s.out, agentproto.MsgFSResponse, fsResponse(data, err))
	}()
}

// answerFS answers a request that did not become a session.
func (a *agent) answerFS(id uint32, data *agentproto.FSData, err error) {
	_ = a.link.send(id, agentproto.FlagTerminal, agentproto.MsgFSResponse, fsResponse(data, err))
}

func fsResponse(data *agentproto.FSData, err error) agentproto.FSResponse {
	if err == nil {
		return agentproto.FSResponse{OK: true, Data: data}
	}
	r := agentproto.FSResponse{}
	text := err.Error()
	var errno unix.Errno
	if errors.As(err, &errno) {
		n := int32(errno)
		r.Errno = &n
	}
	r.Error = &text
	return r
}

func (s *fsSession) frame(typ string, p []byte, bodyLen int) {
	if typ != agentproto.MsgFSData {
		return
	}
	if data, err := agentproto.DecodeData(p); err == nil {
		s.in.push(data, bodyLen)
	}
}

func (s *fsSession) abandon() { s.in.abort() }

// absolute makes a path of a request absolute: relative ones start at the root.
func absolute(path string) string {
	if !filepath.IsAbs(path) {
		return "/" + path
	}
	return path
}

// do performs the operation.
func (s *fsSession) do() (*agentproto.FSData, error) {
	switch op := &s.op; {
	case op.RealPath != nil:
		p, err := filepath.EvalSymlinks(absolute(op.RealPath.Path))
		return &agentproto.FSData{Path: &p}, err
	case op.Stat != nil:
		return statPath(absolute(op.Stat.Path), op.Stat.FollowSymlink)
	case op.SetStat != nil:
		return nil, setStat(absolute(op.SetStat.Path), op.SetStat.FollowSymlink, op.SetStat.Attrs)
	case op.List != nil:
		return list(absolute(op.List.Path))
	case op.ReadLink != nil:
		p, err := os.Readlink(absolute(op.ReadLink.Path))
		return &agentproto.FSData{Path: &p}, err
	case op.Symlink != nil:
		return nil, os.Symlink(op.Symlink.Target, absolute(op.Symlink.LinkPath))
	case op.Mkdir != nil:
		return nil, mkdir(absolute(op.Mkdir.Path), op.Mkdir.Mode)
	case op.Remove != nil:
		return nil, unlink(absolute(op.Remove.Path))
	case op.RemoveDir != nil:
		return nil, removeDir(absolute(op.RemoveDir.Path), op.RemoveDir.Recursive)
	case op.Copy != nil:
		return nil, copyFile(absolute(op.Copy.Src), absolute(op.Copy.Dst))
	case op.Rename != nil:
		return nil, os.Rename(absolute(op.Rename.Src), absolute(op.Rename.Dst))
	}
	return s.doHandle()
}

// doHandle performs the operations that make or use a handle.
func (s *fsSession) doHandle() (*agentproto.FSData, error) {
	all := s.a.sessions
	switch op := &s.op; {
	case op.OpenFile != nil:
		path := absolute(op.OpenFile.Path)
		f, err := openFile(path, op.OpenFile.Options)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return s.keep(&handle{owner: s.id, path: path, f: f})
	case op.OpenDir != nil:
		path := absolute(op.OpenDir.Path)
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		return s.keep(&handle{owner: s.id, path: path, f: f, dir: true})
	case op.CloseHandle != nil:
		return nil, all.closeHandle(op.CloseHandle.Handle)
	case op.Read != nil:
		h, err := all.handle(op.Read.Handle)
		if err != nil {
			return nil, err
		}
		return nil, s.read(h, op.Read)
	case op.Write != nil:
		h, err := all.handle(op.Write.Handle)
		if err != nil {
			return nil, err
		}
		return nil, s.write(h, op.Write)
	case op.ReadDir != nil:
		h, err := all.handle(op.ReadDir.Handle)
		if err != nil {
			return nil, err
		}
		return h.readDir(op.ReadDir.Limit)
	case op.FStat != nil:
		h, err := all.handle(op.FStat.Handle)
		if err != nil {
			return nil, err
		}
		fi, err := h.f.Stat()
		if err != nil {
			return nil, err
		}
		return statData(h.path, fi), nil
	case op.FSetStat != nil:
		h, err := all.handle(op.FSetStat.Handle)
		if err != nil {
			return nil, err
		}
		// By the descriptor: the name may be another file's by now.
		return nil, setStat(fmt.Sprintf("/proc/self/fd/%d", int(h.f.Fd())), true, op.FSetStat.Attrs)
	}
	return nil, agentproto.ErrFSOp
}

func (s *fsSession) keep(h *handle) (*agentproto.FSData, error) {
	n, err := s.a.sessions.addHandle(h)
	if err != nil {
		h.f.Close()
		return nil, err
	}
	return &agentproto.FSData{Handle: &n}, nil
}

func statPath(path string, follow bool) (*agentproto.FSData, error) {
	stat := os.Lstat
	if follow {
		stat = os.Stat
	}
	fi, err := stat(path)
	if err != nil {
		return nil, err
	}
	return statData(path, fi), nil
}

func statData(path string, fi os.FileInfo) *agentproto.FSData {
	e := entryOf(path, fi)
	return &agentproto.FSData{Stat: &e}
}

// entryOf describes a file for the wire.
func entryOf(path string, fi os.FileInfo) agentproto.FSEntry {
	e := agentproto.FSEntry{Path: path, Kind: agentproto.KindOther, Size: uint64(max(fi.Size(), 0))}
	switch m := fi.Mode(); {
	case m.IsRegular():
		e.Kind = agentproto.KindFile
	case m.IsDir():
		e.Kind = agentproto.KindDir
	case m&os.ModeSymlink != 0:
		e.Kind = agentproto.KindSymlink
	}
	if st, ok := statOf(fi); ok {
		e.Mode, e.UID, e.GID = st.Mode&0o7777, st.Uid, st.Gid
		atime, mtime := st.Atim.Sec, st.Mtim.Sec
		e.Atime, e.Mtime, e.Modified = &atime, &mtime, &mtime
	}
	return e
}

// list returns the entries of a directory with their attributes. Names that
// vanish meanwhile are left out.
func list(path string) (*agentproto.FSData, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	h := &handle{path: path, f: dir, dir: true}
	defer dir.Close()
	limit := uint32(maxListed)
	d, err := h.readDir(&limit)
	if err == nil && len(*d.List) == maxListed {
		return nil, fmt.Errorf("%s has more than %d entries: %w", path, maxListed, unix.EOVERFLOW)
	}
	return d, err
}

// readDir returns the next entries, at most limit (nil: as many as fit a frame).
func (h *handle) readDir(limit *uint32) (*agentproto.FSData, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.dir {
		return nil, unix.ENOTDIR
	}
	want := maxListed
	if limit != nil {
		want = min(int(*limit), maxListed)
	}
	entries, size := []agentproto.FSEntry{}, 0
	for len(entries) < want {
		batch, err := h.f.Readdirnames(min(want-len(entries), 512))
		for _, name := range batch {
			path := filepath.Join(h.path, name)
			fi, err := os.Lstat(path)
			if err != nil {
				continue
			}
			entries = append(entries, entryOf(path, fi))
			if size += len(path) + 110; size > maxResponse {
				return nil, fmt.Errorf("%s is too large for one listing: %w", h.path, unix.EOVERFLOW)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	return &agentproto.FSData{List: &entries}, nil
}

// mkdir makes a directory; without a mode also its parents, and an existing
// directory is fine then.
func mkdir(path string, mode *uint32) error {
	if mode == nil {
		return os.MkdirAll(path, 0o755)
	}
	if err := unix.Mkdir(path, *mode&0o7777); err != nil {
		return &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	return unix.Chmod(path, *mode&0o7777)
}

func unlink(path string) error {
	if err := unix.Unlink(path); err != nil {
		return &os.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

func removeDir(path string, recursive bool) error {
	if fi, err := os.Lstat(path); err != nil {
		return err
	} else if !fi.IsDir() {
		return &os.PathError{Op: "rmdir", Path: path, Err: unix.ENOTDIR}
	}
	if filepath.Clean(path) == "/" {
		return &os.PathError{Op: "rmdir", Path: path, Err: unix.EBUSY}
	}
	if recursive {
		return os.RemoveAll(path)
	}
	if err := unix.Rmdir(path); err != nil {
		return &os.PathError{Op: "rmdir", Path: path, Err: err}
	}
	return nil
}

// copyFile copies a regular file's bytes and mode. A copy onto itself, also
// through a link, is refused: it would empty the file.
func copyFile(src, dst string) error {
	in, err := openFile(src, agentproto.FSOpenOptions{Read: true})
	if err != nil {
		return fmt.Errorf("copy %s: %w", src, err)
	}
	defer in.Close()
	from, err := in.Stat()
	if err != nil {
		return err
	}
	if to, err := os.Stat(dst); err == nil && os.SameFile(from, to) {
		return fmt.Errorf("copy %s: source and destination are the same file: %w", src, unix.EINVAL)
	}
	mode := uint32(from.Mode().Perm())
	out, err := openFile(dst, agentproto.FSOpenOptions{Write: true, Create: true, Truncate: true, Mode: &mode})
	if err != nil {
		return fmt.Errorf("copy to %s: %w", dst, err)
	}
	if _, err = io.Copy(out, in); err == nil {
		err = out.Chmod(from.Mode().Perm())
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	return err
}

// setStat changes attributes in an order that lets all of them stick: the owner
// first, because changing it clears setuid, times last.
func setStat(path string, follow bool, a agentproto.FSAttrs) error {
	if a.UID != nil || a.GID != nil {
		uid, gid := -1, -1
		if a.UID != nil {
			uid = int(*a.UID)
		}
		if a.GID != nil {
			gid = int(*a.GID)
		}
		chown := os.Lchown
		if follow {
			chown = os.Chown
		}
		if err := chown(path, uid, gid); err != nil {
			return err
		}
	}
	if fi, err := os.Lstat(path); err == nil && !follow && fi.Mode()&os.ModeSymlink != 0 {
		if a.Mode != nil || a.Size != nil {
			return &os.PathError{Op: "setstat", Path: path, Err: unix.EOPNOTSUPP}
		}
	}
	if a.Size != nil {
		if err := os.Truncate(path, int64(*a.Size)); err != nil {
			return err
		}
	}
	if a.Mode != nil {
		if err := unix.Chmod(path, *a.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: path, Err: err}
		}
	}
	return setTimes(path, follow, a.Atime, a.Mtime)
}

func setTimes(path string, follow bool, atime, mtime *int64) error {
	if atime == nil && mtime == nil {
		return nil
	}
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	for i, t := range []*int64{atime, mtime} {
		if t != nil {
			ts[i] = unix.NsecToTimespec(time.Unix(*t, 0).UnixNano())
		}
	}
	flags := 0
	if !follow {
		flags = unix.AT_SYMLINK_NOFOLLOW
	}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, flags); err != nil {
		return &os.PathError{Op: "utimes", Path: path, Err: err}
	}
	return nil
}
