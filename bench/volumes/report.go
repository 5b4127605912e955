package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/bench/machine"
)

// row is one thing measured on all sides.
type row struct {
	Name     string    `json:"name"`
	Unit     string    `json:"unit"`     // ms or µs a call, MiB/s, or MiB kept
	Must     float64   `json:"must"`     // ratio ours to peer; 0: none
	Moonshot float64   `json:"moonshot"` // the same
	Peer     []float64 `json:"peer"`
	Ours     []float64 `json:"ours"`
	Floor    []float64 `json:"floor,omitempty"`

	op  string
	n   int // calls in a batch
	mib int // moved by a call
}

// value turns the time of a batch into the row's unit.
func (r *row) value(took time.Duration) float64 {
	each := took.Seconds() / float64(max(r.n, 1))
	switch r.Unit {
	case "ms":
		return each * 1e3
	case "µs":
		return each * 1e6
	}
	return float64(r.mib) / each
}

func (r *row) isRate() bool { return r.mib > 0 }

func (r *row) best(v []float64) float64 {
	if r.isRate() {
		return slices.Max(v)
	}
	return slices.Min(v)
}

func (r *row) ratios() (med, best float64) {
	return machine.Median(r.Ours) / machine.Median(r.Peer), r.best(r.Ours) / r.best(r.Peer)
}

// meets tells whether the medians or the best rounds keep a bound: a row misses
// only if both do.
func (r *row) meets(bound float64) bool {
	med, best := r.ratios()
	if r.isRate() {
		return med >= bound || best >= bound
	}
	return med <= bound || best <= bound
}

func (r *row) bound(b float64) string {
	switch {
	case b == 0:
		return "none"
	case r.isRate():
		return fmt.Sprintf("≥ %.3gx", b)
	}
	return fmt.Sprintf("≤ %.3gx", b)
}

func (r *row) speed(v []float64) string {
	if len(v) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.3g (%.3g-%.3g)", machine.Median(v), slices.Min(v), slices.Max(v))
}

func (r *row) line() string {
	med, best := r.ratios()
	moon := r.bound(r.Moonshot)
	switch {
	case r.Moonshot != 0 && r.meets(r.Moonshot):
		moon += " reached"
	case r.Moonshot != 0:
		moon += " missed"
	}
	verdict := "ok"
	switch {
	case r.Must == 0:
		verdict = ""
	case !r.meets(r.Must):
		verdict = "miss"
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s | **%.3g** (%.3g) | %s | %s | %s |",
		r.Name, r.Unit, r.speed(r.Peer), r.speed(r.Ours), r.speed(r.Floor), med, best, moon, r.bound(r.Must), verdict)
}

// report is everything measured in one run.
type report struct {
	machine.Info
	Node    string `json:"node"`
	Peer    string `json:"peer"`
	Rounds  int    `json:"rounds"`
	Batches int    `json:"batches"`
	Rows    []row  `json:"rows"`
}

func newReport(o *options) *report {
	node, _ := exec.Command("node", "--version").Output()
	return &report{
		Info: machine.Describe("go run ./bench/volumes"), Node: strings.TrimSpace(string(node)), Peer: peerPackage,
		Rounds: o.rounds, Batches: o.batches,
	}
}

func (r *report) add(x row) {
	r.Rows = append(r.Rows, x)
	fmt.Fprintln(os.Stderr, x.line())
}

// print writes the markdown table.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%v, Node %s, peer %s\n<!-- details -->\n", r.Info, r.Node, r.Peer)
	fmt.Fprintf(w, "Medians of up to %d alternating rounds (commands, ms from start to exit) or %d alternating batches (calls), spread in brackets. ", r.Rounds, r.Batches)
	fmt.Fprint(w, "Ratio: ours to the peer, of medians and of best rounds; a row is missed when both miss. ")
	fmt.Fprint(w, "Floor: mkfs.ext4, /bin/true, or plain os calls: nothing of them is contained; what they write is synced and then renamed, as a careful program does it. The peer syncs nothing; ours syncs where it says durable or safe.\n\n")
	fmt.Fprintln(w, "| row | unit | peer | ours | floor | ratio (best/best) | moonshot | must | |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|")
	for i := range r.Rows {
		fmt.Fprintln(w, r.Rows[i].line())
	}
}
