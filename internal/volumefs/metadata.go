package volumefs

import (
	"strings"

	"golang.org/x/sys/unix"
)

// metadata is the source of a new file's mode, owner and attributes: an O_PATH
// descriptor of a regular file.
type metadata struct{ fd int }

const setIDs = unix.S_ISUID | unix.S_ISGID

// copyMetadata gives dst the mode, owner, access list and user attributes of a
// file. New content must not inherit what was granted to the old: setuid and
// setgid are dropped, on the host and in the overlay, and so are all security
// attributes.
func (f *FS) copyMetadata(from *metadata, dst int) error {
	var st, now unix.Stat_t
	if err := unix.Fstat(from.fd, &st); err != nil {
		return err
	}
	if err := unix.Fstat(dst, &now); err != nil {
		return err
	}
	if st.Uid != now.Uid || st.Gid != now.Gid {
		// Only root may give files away; for anybody else the new file is theirs.
		if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil && err != unix.EPERM {
			return err
		}
	}
	if err := f.copyXattrs(from.fd, dst); err != nil {
		return err
	}
	return unix.Fchmod(dst, st.Mode&0o7777&^setIDs)
}

const accessACL = "system.posix_acl_access"

func (f *FS) copyXattrs(pathFd, dst int) error {
	src, err := f.reopen(pathFd, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	names, err := listXattrs(src)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, "user.") && name != accessACL {
			continue
		}
		value, err := getXattr(src, name)
		if err == unix.ENODATA {
			continue
		}
		if err == nil && name == overlayXattr {
			value, err = withoutSetIDs(value)
		}
		if err == nil {
			err = unix.Fsetxattr(dst, name, value, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func withoutSetIDs(value []byte) ([]byte, error) {
	ov, err := decodeOverlay(value)
	ov.mode &^= setIDs
	return ov.encode(), err
}

// listXattrs returns the names of an open file's attributes; none where the
// file system has none.
func listXattrs(fd int) ([]string, error) {
	buf := make([]byte, 256)
	for {
		n, err := unix.Flistxattr(fd, buf)
		switch {
		case err == unix.ERANGE && len(buf) < 1<<20:
			buf = make([]byte, len(buf)*8)
			continue
		case err == unix.EOPNOTSUPP, err == nil && n == 0:
			return nil, nil
		case err != nil:
			return nil, err
		}
		return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00"), nil
	}
}

func getXattr(fd int, name string) ([]byte, error) {
	buf := make([]byte, 256)
	for {
		n, err := unix.Fgetxattr(fd, name, buf)
		if err == unix.ERANGE && len(buf) < 1<<20 {
			buf = make([]byte, len(buf)*8)
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}
