package guest

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// Kinds of agentproto.ExecFailed.
const (
	kindNotFound   = "not_found"
	kindPermission = "permission_denied"
	kindNotExec    = "not_executable"
	kindBadCwd     = "bad_cwd"
	kindBadArgs    = "bad_args"
	kindRlimit     = "resource_limit"
	kindUser       = "user_setup_failed"
	kindMemory     = "out_of_memory"
	kindPty        = "pty_setup_failed"
	kindOther      = "other"
)

// execError says why a program did not start.
type execError struct {
	kind string
	msg  string
	err  error // often an errno
}

func (e *execError) Error() string { return e.msg }
func (e *execError) Unwrap() error { return e.err }

// failed converts to the wire form.
func (e *execError) failed() agentproto.ExecFailed {
	f := agentproto.ExecFailed{Kind: e.kind, Message: e.msg}
	var errno unix.Errno
	if errors.As(e.err, &errno) {
		n, name := int32(errno), unix.ErrnoName(errno)
		f.Errno, f.ErrnoName = &n, &name
	}
	return f
}

// errnoKind classifies what execve(2) and its preparations say.
func errnoKind(err error) string {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return kindOther
	}
	switch errno {
	case unix.ENOENT, unix.ENOTDIR:
		return kindNotFound
	case unix.EACCES, unix.EPERM:
		return kindPermission
	case unix.ENOEXEC, unix.ELIBBAD:
		return kindNotExec
	case unix.E2BIG, unix.EINVAL, unix.ELOOP, unix.ENAMETOOLONG:
		return kindBadArgs
	case unix.ENOMEM, unix.EAGAIN:
		return kindMemory
	}
	return kindOther
}

// defaultPath is what programs get when nobody sets PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// program is a fully resolved exec request.
type program struct {
	file    string
	argv    []string
	env     []string
	dir     string
	acc     account
	rlimits []agentproto.Rlimit
}

// resolve turns a request into what execve needs.
func (a *agent) resolve(x *agentproto.Exec) (*program, error) {
	user := a.user
	if x.User != nil {
		user = *x.User
	}
	acc, err := lookupUser(user)
	if err != nil {
		return nil, &execError{kindUser, err.Error(), err}
	}
	p := &program{
		argv:    append([]string{x.Cmd}, x.Args...),
		env:     mergeEnv(a.env, x.Env, acc, x.TTY),
		dir:     a.workdir,
		acc:     acc,
		rlimits: x.Rlimits,
	}
	if x.Cwd != nil {
		p.dir = *x.Cwd
	}
	if p.dir == "" {
		p.dir = "/"
	}
	if err := checkStrings(p); err != nil {
		return nil, err
	}
	if fi, err := os.Stat(p.dir); err != nil {
		return nil, &execError{kindBadCwd, fmt.Sprintf("working directory %s: %v", p.dir, errnoText(err)), err}
	} else if !fi.IsDir() {
		return nil, &execError{kindBadCwd, fmt.Sprintf("working directory %s is not a directory", p.dir), unix.ENOTDIR}
	}
	if p.file, err = lookPath(x.Cmd, p.dir, getenv(p.env, "PATH")); err != nil {
		return nil, err
	}
	return p, nil
}

// checkStrings refuses what execve would silently cut.
func checkStrings(p *program) error {
	if p.argv[0] == "" {
		return &execError{kindNotFound, "empty command", unix.ENOENT}
	}
	for _, list := range [][]string{p.argv, p.env, {p.dir}} {
		for _, s := range list {
			if strings.Contains(s, "\x00") {
				return &execError{kindBadArgs, "command, arguments, environment or directory contain a NUL byte", unix.EINVAL}
			}
		}
	}
	return nil
}

// lookPath finds a command like execvp(3): a name with a slash is relative to
// dir, others are searched in PATH. A file that may not be executed is reported
// only if no later directory has one that may.
func lookPath(cmd, dir, pathVar string) (string, error) {
	if strings.Contains(cmd, "/") {
		file := cmd
		if !path.IsAbs(file) {
			file = path.Join(dir, file)
		}
		if err := executable(file); err != nil {
			return "", &execError{errnoKind(err), fmt.Sprintf("%s: %v", cmd, errnoText(err)), err}
		}
		return file, nil
	}
	var denied error
	for _, d := range strings.Split(pathVar, ":") {
		if !path.IsAbs(d) {
			d = path.Join(dir, d) // empty means the working directory
		}
		file := path.Join(d, cmd)
		switch err := executable(file); {
		case err == nil:
			return file, nil
		case errnoKind(err) == kindPermission:
			denied = &execError{kindPermission, fmt.Sprintf("%s: %v", file, errnoText(err)), err}
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", &execError{kindNotFound, fmt.Sprintf("%s: not found in PATH (%s)", cmd, pathVar), unix.ENOENT}
}

// executable reports why a file cannot be a program, nil if it might be.
func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

// errnoText drops the operation and path that os errors repeat.
func errnoText(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// mergeEnv lays environments over each other: image and sandbox, request. PATH,
// HOME and TERM have defaults.
func mergeEnv(base, over []string, acc account, tty bool) []string {
	var env []string
	index := map[string]int{}
	set := func(kv string) {
		k, _, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return
		}
		if i, ok := index[k]; ok {
			env[i] = kv
			return
		}
		index[k] = len(env)
		env = append(env, kv)
	}
	home := acc.home
	if home == "" {
		home = "/"
	}
	set("PATH=" + defaultPath)
	set("HOME=" + home)
	if tty {
		set("TERM=xterm")
	}
	for _, kv := range base {
		if strings.HasPrefix(kv, "HOME=") && acc.name != "" && acc.uid != 0 {
			continue // the image's HOME is that of its own default user
		}
		set(kv)
	}
	for _, kv := range over {
		set(kv)
	}
	return env
}

func getenv(env []string, key string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v
		}
	}
	return ""
}
