package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/microsandbox-go/microsandbox/bench/machine"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// rowResult is what was measured for one row, by round.
type rowResult struct {
	row
	Samples []sample `json:"samples"`
}

// kernelResult is all rows with one guest kernel.
type kernelResult struct {
	Name    string      `json:"name"`
	Release string      `json:"release"`
	Rows    []rowResult `json:"rows"`
}

// report is everything measured in one run.
type report struct {
	machine.Info
	Accel   string         `json:"accelerator"`
	QEMU    string         `json:"qemu"`
	Rounds  int            `json:"rounds"`
	Kernels []kernelResult `json:"kernels"`
}

func (r *rowResult) each(f func(sample) time.Duration) []time.Duration {
	out := make([]time.Duration, 0, len(r.Samples))
	for _, s := range r.Samples {
		out = append(out, f(s))
	}
	return out
}

func (k *kernelResult) find(name string) *rowResult {
	for i := range k.Rows {
		if k.Rows[i].Name == name {
			return &k.Rows[i]
		}
	}
	return nil
}

// comparison is a row against the one it is measured by: the ratio of the
// medians, of the best rounds, and the median of the ratios within a round.
type comparison struct{ Medians, Best, Paired float64 }

func (k *kernelResult) compare(r *rowResult) (c comparison, ok bool) {
	of := k.find(r.Of)
	if of == nil {
		return c, false
	}
	a, b := of.each(sample.total), r.each(sample.total)
	ratios := make([]float64, len(b))
	for i := range b {
		ratios[i] = float64(b[i]) / float64(a[i])
	}
	return comparison{
		Medians: float64(machine.Median(b)) / float64(machine.Median(a)),
		Best:    float64(slices.Min(b)) / float64(slices.Min(a)),
		Paired:  machine.Median(ratios),
	}, true
}

// verdict: a bound is missed when medians and best rounds both miss it.
func (r *rowResult) verdict(c comparison) string {
	switch {
	case r.Must == 0:
		return ""
	case c.Medians <= r.Must || c.Best <= r.Must:
		return "ok"
	}
	return "miss"
}

// print writes the markdown tables: how each row compares, then its phases.
func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s, accelerator %s, %d rounds.\n", r.Info, r.QEMU, r.Accel, r.Rounds)
	for i := range r.Kernels {
		r.Kernels[i].printRatios(w)
	}
	fmt.Fprint(w, "\n<!-- details -->\n")
	for i := range r.Kernels {
		r.Kernels[i].printPhases(w)
	}
}

func (k *kernelResult) printRatios(w io.Writer) {
	fmt.Fprintf(w, "\n| %s kernel, Linux %s | boot to first exec, ms | ratio (best, paired) | to | must | |\n|---|---|---|---|---|---|\n", k.Name, k.Release)
	for i := range k.Rows {
		r := &k.Rows[i]
		line := fmt.Sprintf("| %s | %s |", r.Name, spread(r.each(sample.total)))
		c, ok := k.compare(r)
		if !ok {
			fmt.Fprintln(w, line, "| | | |")
			continue
		}
		must := ""
		if r.Must > 0 {
			must = fmt.Sprintf("≤ %.4gx", r.Must)
		}
		fmt.Fprintf(w, "%s **%.2fx** (%.2f, %.2f) | %s | %s | %s |\n", line, c.Medians, c.Best, c.Paired, r.Of, must, r.verdict(c))
	}
}

func (k *kernelResult) printPhases(w io.Writer) {
	fmt.Fprintf(w, "\n| %s kernel, medians, ms | supervisor | volumes | file server | QEMU | guest | setup | listen | first exec | stop | before | PSS, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n", k.Name)
	for i := range k.Rows {
		fmt.Fprintln(w, k.Rows[i].phases())
	}
}

// phases is the row of the second table.
func (r *rowResult) phases() string {
	line := "| " + r.Name + " |"
	for _, f := range []func(sample) time.Duration{
		func(s sample) time.Duration { return s.Supervisor }, func(s sample) time.Duration { return s.Mounts },
		func(s sample) time.Duration { return s.Files }, func(s sample) time.Duration { return s.QEMU },
		func(s sample) time.Duration { return s.Guest }, func(s sample) time.Duration { return s.Setup },
		func(s sample) time.Duration { return s.Listen }, func(s sample) time.Duration { return s.Exec },
		func(s sample) time.Duration { return s.Stop }, func(s sample) time.Duration { return s.Prepare },
	} {
		if m := machine.Median(r.each(f)); m >= 50*time.Microsecond {
			line += fmt.Sprintf(" %.3g |", ms(m))
		} else {
			line += " |"
		}
	}
	var pss []int64
	for _, s := range r.Samples {
		pss = append(pss, s.Memory)
	}
	return line + fmt.Sprintf(" %.0f |", float64(machine.Median(pss))/(1<<20))
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

func spread(v []time.Duration) string {
	return fmt.Sprintf("%.0f (%.0f-%.0f)", ms(machine.Median(v)), ms(slices.Min(v)), ms(slices.Max(v)))
}

func newReport(ctx context.Context, o *options) (*report, error) {
	binary, _, err := qemu.Find()
	if err != nil {
		return nil, err
	}
	version, err := qemu.Version(binary)
	if err != nil {
		return nil, err
	}
	accel, err := qemu.Choose(ctx, vmm.Accel(o.accel), "")
	if err != nil {
		return nil, err
	}
	return &report{
		Info:  machine.Describe(fmt.Sprintf("go run ./bench/boot -rounds %d", o.rounds)),
		Accel: string(accel), QEMU: "QEMU " + version, Rounds: o.rounds,
	}, nil
}
