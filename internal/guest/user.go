package guest

import (
	"fmt"
	"strconv"
	"strings"
)

// account is the identity a program runs under.
type account struct {
	uid, gid uint32
	groups   []uint32
	home     string
	name     string
}

// lookupUser resolves "", name, uid, name:group or uid:gid with the sandbox's
// own /etc/passwd and /etc/group, as container runtimes do. An unknown number is
// a valid user; an unknown name is not. "" is root.
func lookupUser(spec string) (account, error) {
	passwd, _ := readSmall("/etc/passwd")
	group, _ := readSmall("/etc/group")
	return resolveUser(spec, string(passwd), string(group))
}

func resolveUser(spec, passwd, group string) (account, error) {
	user, grp, hasGroup := strings.Cut(spec, ":")
	if user == "" {
		user = "0"
	}
	acc, known := findPasswd(user, passwd)
	if !known {
		id, err := parseID(user)
		if err != nil {
			return account{}, fmt.Errorf("no user %q in the sandbox's /etc/passwd", user)
		}
		acc = account{uid: id, home: "/"}
	}
	if hasGroup && grp != "" {
		gid, err := findGroup(grp, group)
		if err != nil {
			return account{}, err
		}
		acc.gid = gid
		acc.groups = nil
		return acc, nil
	}
	if acc.name != "" {
		acc.groups = groupsOf(acc.name, group)
	}
	return acc, nil
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 1<<32-1 { // (uid_t)-1 means "leave alone" to setuid's kin
		return 0, fmt.Errorf("%q is not an id", s)
	}
	return uint32(n), nil
}

// findPasswd finds a user by name or number.
func findPasswd(user, passwd string) (account, bool) {
	for _, line := range strings.Split(passwd, "\n") {
		f := strings.Split(line, ":")
		if len(f) < 7 || f[0] != user && f[2] != user {
			continue
		}
		uid, err1 := parseID(f[2])
		gid, err2 := parseID(f[3])
		if err1 != nil || err2 != nil {
			continue
		}
		return account{uid: uid, gid: gid, home: f[5], name: f[0]}, true
	}
	return account{}, false
}

// findGroup finds a group by name or number.
func findGroup(name, group string) (uint32, error) {
	for _, line := range strings.Split(group, "\n") {
		f := strings.Split(line, ":")
		if len(f) >= 3 && f[0] == name {
			if gid, err := parseID(f[2]); err == nil {
				return gid, nil
			}
		}
	}
	gid, err := parseID(name)
	if err != nil {
		return 0, fmt.Errorf("no group %q in the sandbox's /etc/group", name)
	}
	return gid, nil
}

// groupsOf lists the supplementary groups of a user.
func groupsOf(name, group string) []uint32 {
	var out []uint32
	for _, line := range strings.Split(group, "\n") {
		f := strings.Split(line, ":")
		if len(f) < 4 {
			continue
		}
		for _, member := range strings.Split(f[3], ",") {
			if gid, err := parseID(f[2]); err == nil && member == name {
				out = append(out, gid)
			}
		}
	}
	return out
}
