package main

import (
	"fmt"
	"io"

	"github.com/microsandbox-go/microsandbox/bench/machine"
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
	machine.Info
	Rounds  int      `json:"rounds"`
	Each    string   `json:"each"`
	Rows    []result `json:"rows"`
	Figures []figure `json:"figures"`
}

func newReport(o *options) *report {
	return &report{
		Info:   machine.Describe(fmt.Sprintf("go run ./bench/virtiofs -rounds %d -each %v", o.rounds, o.each)),
		Rounds: o.rounds, Each: o.each.String(),
	}
}

func (r *report) add(res result) { r.Rows = append(r.Rows, res) }

// print writes the markdown table.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%v, native front end (no guest, no KVM)\n\n", r.Info)
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
