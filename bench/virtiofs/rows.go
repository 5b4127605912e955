package main

import (
	"fmt"
	"slices"

	"github.com/microsandbox-go/microsandbox/bench/machine"
	"github.com/microsandbox-go/microsandbox/internal/fusewire"
)

// row is one comparison. Rate and CPU are bounds on the ratio ours/C; zero
// means that there is none.
type row struct {
	Name  string  `json:"name"`
	Depth int     `json:"depth"`
	Bytes int     `json:"bytes,omitempty"` // per operation: shown as GB/s
	Rate  float64 `json:"must_rate,omitempty"`
	CPU   float64 `json:"must_cpu,omitempty"`
	load  func(s *server, depth int) (program, error)
}

// allRows returns the rows in the order of the table.
func allRows() []row {
	const k, m = 1 << 10, 1 << 20
	return []row{
		{Name: "getattr d1", Depth: 1, CPU: 0.7, load: getattr},
		{Name: "getattr d64", Depth: 64, Rate: 2.0, CPU: 0.4, load: getattr},
		{Name: "lookup known d64", Depth: 64, Rate: 2.2, CPU: 0.45, load: lookupKnown},
		{Name: "lookup new + forget d8", Depth: 8, Rate: 1.0, load: lookupNew},
		{Name: "read 4K d64", Depth: 64, Rate: 1.3, CPU: 0.75, load: transfer(fusewire.OpRead, 4*k, true)},
		{Name: "write 4K d64", Depth: 64, Rate: 1.25, CPU: 0.75, load: transfer(fusewire.OpWrite, 4*k, true)},
		{Name: "seq read 128K d1", Depth: 1, Bytes: 128 * k, Rate: 0.9, load: transfer(fusewire.OpRead, 128*k, false)},
		{Name: "seq read 1M d1", Depth: 1, Bytes: m, Rate: 0.9, load: transfer(fusewire.OpRead, m, false)},
		{Name: "seq read 1M d4", Depth: 4, Bytes: m, Rate: 0.9, load: transfer(fusewire.OpRead, m, false)},
		{Name: "seq write 128K d1", Depth: 1, Bytes: 128 * k, Rate: 0.9, load: transfer(fusewire.OpWrite, 128*k, false)},
		{Name: "seq write 1M d1", Depth: 1, Bytes: m, Rate: 0.9, load: transfer(fusewire.OpWrite, m, false)},
		{Name: "seq write 1M d4, one file", Depth: 4, Bytes: m, Rate: 0.95, load: transfer(fusewire.OpWrite, m, false)},
		{Name: "create+unlink d8", Depth: 8, Rate: 1.0, load: createUnlink},
		{Name: "open+release d8", Depth: 8, Rate: 1.15, load: openRelease},
		{Name: "readdirplus 10k known, 4K replies", Depth: 1, Rate: 1.5, load: list(true, false, 4*k)},
		{Name: "readdirplus 10k known, 128K replies", Depth: 1, Rate: 1.5, load: list(true, false, 128*k)},
		{Name: "readdirplus 10k new + forget, 4K replies", Depth: 1, load: list(true, true, 4*k)},
		{Name: "readdir 10k, 4K replies", Depth: 1, Rate: 0.85, load: list(false, false, 4*k)},
	}
}

// result is what was measured for one row, by round.
type result struct {
	row
	C    []sample `json:"c"`
	Ours []sample `json:"ours"`
	Virt []sample `json:"ours_strict"`
}

func rates(v []sample) []float64 {
	var out []float64
	for _, s := range v {
		out = append(out, s.rate())
	}
	return out
}

func cpus(v []sample) []float64 {
	var out []float64
	for _, s := range v {
		out = append(out, s.cpuPerOp())
	}
	return out
}

// ratios returns ours/C: of the medians and of the best rounds.
func ratios(c, ours []float64, best func([]float64) float64) (med, bestRatio float64) {
	return machine.Median(ours) / machine.Median(c), best(ours) / best(c)
}

func (r result) rateRatio() (med, best float64) {
	return ratios(rates(r.C), rates(r.Ours), slices.Max[[]float64])
}
func (r result) cpuRatio() (med, best float64) {
	return ratios(cpus(r.C), cpus(r.Ours), slices.Min[[]float64])
}

// ok: a bound is missed when both the median and the best round miss it.
func (r result) ok() bool {
	rm, rb := r.rateRatio()
	cm, cb := r.cpuRatio()
	return (r.Rate == 0 || rm >= r.Rate || rb >= r.Rate) && (r.CPU == 0 || cm <= r.CPU || cb <= r.CPU)
}

func (r result) must() string {
	switch {
	case r.Rate > 0 && r.CPU > 0:
		return fmt.Sprintf("≥ %.4gx, CPU ≤ %.4gx", r.Rate, r.CPU)
	case r.CPU > 0:
		return fmt.Sprintf("CPU ≤ %.4gx", r.CPU)
	case r.Rate == 0:
		return "none"
	}
	return fmt.Sprintf("≥ %.4gx", r.Rate)
}

// speed formats a median with its spread.
func (r result) speed(v []sample) string {
	x := rates(v)
	format := func(f float64) string {
		switch {
		case r.Bytes > 0:
			return fmt.Sprintf("%.2f", f*float64(r.Bytes)/1e9)
		case f >= 1e6:
			return fmt.Sprintf("%.2fM", f/1e6)
		case f >= 1e4:
			return fmt.Sprintf("%.0fk", f/1e3)
		}
		return fmt.Sprintf("%.0f", f)
	}
	unit := ""
	if r.Bytes > 0 {
		unit = " GB/s"
	}
	return fmt.Sprintf("%s%s (%s-%s)", format(machine.Median(x)), unit, format(slices.Min(x)), format(slices.Max(x)))
}

func (r result) verdict() string {
	if r.must() == "none" {
		return ""
	}
	return okMiss(r.ok())
}

func okMiss(ok bool) string {
	if ok {
		return "ok"
	}
	return "miss"
}

// line is the row of the table.
func (r result) line() string {
	rm, rb := r.rateRatio()
	cm, _ := r.cpuRatio()
	sm, _ := ratios(rates(r.C), rates(r.Virt), slices.Max[[]float64])
	return fmt.Sprintf("| %s | %s | %s | **%.2f** (%.2f) | %.2f | %.2f / %.2f = %.2f | %s / %s | %s | %s |",
		r.Name, r.speed(r.C), r.speed(r.Ours), rm, rb, sm,
		machine.Median(cpus(r.C)), machine.Median(cpus(r.Ours)), cm,
		p50s(r.C), p50s(r.Ours), r.must(), r.verdict())
}

func p50s(v []sample) string {
	var us []float64
	for _, s := range v {
		us = append(us, float64(s.P50.Nanoseconds())/1e3)
	}
	return fmt.Sprintf("%.3g", machine.Median(us))
}
