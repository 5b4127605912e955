package volstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// strangerAt is the error of creating a volume where something lies that is not
// ours.
func strangerAt(name, path string) error {
	what := "exists but belongs to no volume"
	if word := otherThanDir(path); word != "" {
		what = "is " + word + " and belongs to no volume"
	}
	return errdefs.New(errdefs.VolumeAlreadyExists, "volume %q: %s %s", name, path, what).WithHint("%s", strangerHint(name, path))
}

// notDirectory is the error of adopting something that is no directory.
func notDirectory(name, path, what string) error {
	return errdefs.New(errdefs.Filesystem, "volume %q: %s is %s, not a directory", name, path, what).WithHint("%s", strangerHint(name, path))
}

// strangerHint is the way out where something lies at a volume's place that
// belongs to none: only a directory whose name a volume may have can be adopted.
func strangerHint(name, path string) string {
	switch {
	case otherThanDir(path) != "":
		return fmt.Sprintf("move it away, only a directory can be adopted: mv %s ELSEWHERE", shellWord(path))
	case ValidateName(name) != nil:
		return fmt.Sprintf("no volume can have this name: move it away, or give it another name and adopt that: mv %s ELSEWHERE", shellWord(path))
	}
	return "take it over with: msb volume adopt " + name
}

// otherThanDir says what lies at a path in words; "" for a directory and for
// nothing.
func otherThanDir(path string) string {
	fi, err := os.Lstat(path)
	if err != nil {
		return ""
	}
	switch fi.Mode().Type() {
	case fs.ModeDir:
		return ""
	case 0:
		return "a file"
	case fs.ModeSymlink:
		return "a symbolic link"
	case fs.ModeNamedPipe:
		return "a pipe (FIFO)"
	case fs.ModeSocket:
		return "a socket"
	}
	return "a device"
}

// missingHint is the way out where the directory of a volume is missing.
func missingHint(path string) string {
	const hint = "put the directory back and adopt it, or remove the volume"
	if word := otherThanDir(path); word != "" {
		return "there is " + word + ": move it away; " + hint
	}
	return hint
}

// orphanHint is the way out of bookkeeping whose volume has no record: what the
// record was lost with, a damaged msb.db for instance, does not bring it back.
func orphanHint(path string) string {
	if exists(filepath.Join(path, dataName)) {
		return fmt.Sprintf("its volume has no record, but its files are here: move them to the place of a volume and adopt that: mv %s ELSEWHERE", shellWord(path+"/"+dataName))
	}
	return fmt.Sprintf("its volume has no record; here are limits and counts only, no files, and an adopted volume gets its own: rm -r %s", shellWord(path))
}

// shellWord is s as a shell reads it, on one line that can be printed.
func shellWord(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+,:@%="
	if strings.Trim(s, plain) == "" {
		return s
	}
	var b strings.Builder
	start := "'"
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\x%02x`, c)
			start = "$'"
		case c == '\'', c == '\\':
			b.WriteString(`\` + string(c))
			start = "$'"
		default:
			b.WriteByte(c)
		}
	}
	return start + b.String() + "'"
}

// hintAtName adds the way out to the refusal of a name at which something lies.
func (s *Store) hintAtName(name string, err error) error {
	var e *errdefs.Error
	if name == "" || strings.HasPrefix(name, ".") || strings.ContainsAny(name, "/\x00") || !errors.As(err, &e) || !exists(s.home.Volume(name)) {
		return err
	}
	return e.WithHint("%s", strangerHint(name, s.home.Volume(name)))
}

// stopHint says how to end who has a volume.
func stopHint(holders []Holder) string {
	const hint = "stop what uses it first"
	var names []string
	for _, h := range holders {
		if h.Sandbox == "" {
			return hint
		}
		if !slices.Contains(names, h.Sandbox) {
			names = append(names, h.Sandbox)
		}
	}
	if names == nil {
		return hint
	}
	return hint + ": msb stop " + strings.Join(names, " ")
}

// noAccess is the error of an operation that lacks a permission.
func (s *Store) noAccess(what string, err error) *errdefs.Error {
	may := func(mode uint32) bool {
		return unix.Faccessat(unix.AT_FDCWD, string(s.home), mode|unix.X_OK, unix.AT_EACCESS) == nil
	}
	e := errdefs.Wrap(errdefs.IO, err, "%s", what)
	switch {
	case !may(unix.R_OK):
		e.Msg += fmt.Sprintf(": the home %s is not readable", s.home)
		return e.WithHint("set MSB_HOME to a directory of yours")
	case errors.Is(err, unix.EROFS), !may(unix.W_OK):
		e.Msg += fmt.Sprintf(": the home %s is not writable", s.home)
		return e.WithHint("set MSB_HOME to a directory that you may write to")
	}
	return e.WithHint("give yourself access to it: it is another user's, or its mode forbids it")
}
