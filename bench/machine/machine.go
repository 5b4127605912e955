// Package machine describes where and from which sources something was
// measured. Every table of a benchmark carries it.
package machine

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Info is the machine and the commit of one run.
type Info struct {
	Command string    `json:"command"`
	Commit  string    `json:"commit"` // "+" at its end: the tree had changes
	CPU     string    `json:"cpu"`
	CPUs    int       `json:"cpus"`
	Kernel  string    `json:"kernel"`
	Go      string    `json:"go"`
	Load    string    `json:"load"` // load average of the last minute at the start
	When    time.Time `json:"when"`
}

// Describe returns what is known at the start of a run of command.
func Describe(command string) Info {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return Info{
		Command: command, Commit: commit(), CPU: cpuModel(), CPUs: runtime.NumCPU(),
		Kernel: unix.ByteSliceToString(u.Release[:]), Go: runtime.Version(), Load: load(),
		When: time.Now().UTC().Truncate(time.Second),
	}
}

// String is one line of text.
func (i Info) String() string {
	return fmt.Sprintf("`%s`, commit %s, %d x %s, Linux %s, %s, load at start %s, %s",
		i.Command, i.Commit, i.CPUs, i.CPU, i.Kernel, i.Go, i.Load, i.When.Format("2006-01-02 15:04 MST"))
}

func commit() string {
	id, _ := exec.Command("git", "rev-parse", "--short", "HEAD").Output()
	changed, _ := exec.Command("git", "status", "--porcelain", "--untracked-files=no", "--", "*.go", "*.c", "go.mod").Output()
	s := strings.TrimSpace(string(id))
	if len(changed) > 0 {
		s += "+"
	}
	return s
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return runtime.GOARCH
}

func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(b), " ")
	return first
}

// Median is the middle value of v, which may not be empty.
func Median[T cmp.Ordered](v []T) T { return slices.Sorted(slices.Values(v))[len(v)/2] }

// WriteJSON writes all that was measured to a file.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
