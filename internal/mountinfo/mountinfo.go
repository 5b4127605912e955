// Package mountinfo reads which file systems a process sees mounted where, from
// /proc/self/mountinfo (proc_pid_mountinfo(5)).
package mountinfo

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Mount is a line of mountinfo.
type Mount struct {
	Point   string // path of the mount point, seen from the process's root
	Options string // of the mount, separated by commas: ro, nosuid, nodev, noexec and others
	Type    string // of the file system
}

// Self lists the mounts of this process, first mounted first.
func Self() ([]Mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return Parse(string(b))
}

// Parse reads the text of a mountinfo file.
func Parse(text string) ([]Mount, error) {
	var out []Mount
	for line := range strings.Lines(text) {
		before, after, ok := strings.Cut(line, " - ")
		field := strings.Fields(before)
		if !ok || len(field) < 6 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		kind, _, _ := strings.Cut(strings.TrimSpace(after), " ")
		out = append(out, Mount{Point: unescape(field[4]), Options: field[5], Type: kind})
	}
	return out, nil
}

// In reports whether a mount is at a path, which must be absolute and without
// links, or below it.
func (m Mount) In(path string) bool {
	return m.Point == path || strings.HasPrefix(m.Point, strings.TrimSuffix(path, "/")+"/")
}

// unescape undoes the octal escapes of blanks and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
