package image

import (
	"strconv"
	"strings"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// maxUserFile bounds how much of the image's passwd and group files is kept.
const maxUserFile = 1 << 20

// ResolveUser turns "", "name", "uid", "name:group" or "uid:gid" into numbers by
// the image's own /etc/passwd and /etc/group. The empty text is root. A number
// needs no entry; without a group it has the group of its entry, else 0.
func (i *Image) ResolveUser(spec string) (uid, gid uint32, err error) {
	user, group, hasGroup := strings.Cut(spec, ":")
	var passwd, groups string
	if i.meta != nil {
		passwd, groups = i.meta.Passwd, i.meta.Group
	}
	if user != "" {
		if uid, gid, err = i.lookupUser(passwd, user); err != nil {
			return 0, 0, err
		}
	}
	if !hasGroup || group == "" {
		return uid, gid, nil
	}
	if gid, err = i.lookupGroup(groups, group); err != nil {
		return 0, 0, err
	}
	return uid, gid, nil
}

func (i *Image) lookupUser(passwd, user string) (uid, gid uint32, err error) {
	id, isNumber := parseID(user)
	for line := range strings.Lines(passwd) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) < 4 {
			continue
		}
		u, ok1 := parseID(f[2])
		g, ok2 := parseID(f[3])
		if ok1 && ok2 && (f[0] == user || isNumber && u == id) {
			return u, g, nil
		}
	}
	if isNumber {
		return id, 0, nil
	}
	return 0, 0, errdefs.New(errdefs.InvalidConfig, "image %s has no user %q", i.Reference, user).
		WithHint("use a user of the image's /etc/passwd, or a number")
}

func (i *Image) lookupGroup(groups, group string) (uint32, error) {
	id, isNumber := parseID(group)
	for line := range strings.Lines(groups) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) < 3 || f[0] != group {
			continue
		}
		if g, ok := parseID(f[2]); ok {
			return g, nil
		}
	}
	if isNumber {
		return id, nil
	}
	return 0, errdefs.New(errdefs.InvalidConfig, "image %s has no group %q", i.Reference, group).
		WithHint("use a group of the image's /etc/group, or a number")
}

// parseID reads a user or group id; 4294967295 means "no id" to the kernel.
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}
