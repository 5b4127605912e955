package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// figure is something measured that is not a comparison of rates.
type figure struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	Must  string `json:"must"`
	OK    bool   `json:"ok"`
}

// report is everything measured in one run.
type report struct {
	Command string    `json:"command"`
	Commit  string    `json:"commit"`
	Kernel  string    `json:"kernel"`
	CPU     string    `json:"cpu"`
	CPUs    int       `json:"cpus"`
	Go      string    `json:"go"`
	Rounds  int       `json:"rounds"`
	Each    string    `json:"each"`
	When    time.Time `json:"when"`
	Rows    []result  `json:"rows"`
	Figures []figure  `json:"figures"`
}

func newReport(o *options) *report {
	var u unix.Utsname
	_ = unix.Uname(&u)
	commit, _ := exec.Command("git", "rev-parse", "--short", "HEAD").Output()
	return &report{
		Command: fmt.Sprintf("go run ./bench/virtiofs -rounds %d -each %v", o.rounds, o.each),
		Commit:  strings.TrimSpace(string(commit)), Kernel: unix.ByteSliceToString(u.Release[:]),
		CPU: cpuModel(), CPUs: runtime.NumCPU(), Go: runtime.Version(),
		Rounds: o.rounds, Each: o.each.String(), When: time.Now().UTC().Truncate(time.Second),
	}
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

func (r *report) add(res result) { r.Rows = append(r.Rows, res) }

// print writes the markdown table.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "`%s`, commit %s, %d x %s, Linux %s, %s, native front end (no guest, no KVM)\n\n",
		r.Command, r.Commit, r.CPUs, r.CPU, r.Kernel, r.Go)
	fmt.Fprintln(w, "Medians of", r.Rounds, "alternating rounds of", r.Each+", spread in brackets. Ratio: ours to C, of medians and of best rounds.")
	fmt.Fprint(w, "\"Strict\" is the same ratio for the server with stat virtualization. A row is missed when median and best round both miss.\n\n")
	fmt.Fprintln(w, "| row | C virtiofsd, op/s | ours, op/s | ratio (best/best) | strict | CPU µs/op C / ours | p50 µs C / ours | must | |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|")
	for _, res := range r.Rows {
		fmt.Fprintln(w, res.line())
	}
	if len(r.Figures) == 0 {
		return
	}
	fmt.Fprint(w, "\n| our server alone | value | must | |\n|---|---|---|---|\n")
	for _, f := range r.Figures {
		fmt.Fprintf(w, "| %s | %s | %s | %s |\n", f.Name, f.Value, f.Must, okMiss(f.OK))
	}
}

func (r *report) write(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
