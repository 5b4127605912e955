package main

import (
	"encoding/json"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/microsandbox-go/microsandbox/bench/machine"
)

// chart says what the picture of a section is about.
type chart struct {
	title string
	what  string // one sentence, which is also read to those who do not see it
}

var volumesChart = &chart{
	title: "Volumes: our time as a share of the peer's",
	what:  "Shorter is faster; the line at 1 is the peer. The mark in a row is the bound that it has to keep.",
}

// charted is a row of a section's JSON as far as it is drawn.
type charted struct {
	Name string    `json:"name"`
	Unit string    `json:"unit"`
	Must float64   `json:"must"`
	Peer []float64 `json:"peer"`
	Ours []float64 `json:"ours"`
}

// share is our time by the peer's, and the greatest that is allowed, 0 for any.
func (r charted) share() (got, must float64) {
	got, must = machine.Median(r.Ours)/machine.Median(r.Peer), r.Must
	if strings.HasSuffix(r.Unit, "/s") {
		got = 1 / got
		if must > 0 {
			must = 1 / must
		}
	}
	return got, must
}

// draw writes docs/NAME.svg and returns the markdown that shows it.
func (s section) draw() (markdown string, err error) {
	b, err := os.ReadFile(filepath.Join(saved, s.name+".json"))
	if err != nil {
		return "", err
	}
	var run struct{ Rows []charted }
	if err := json.Unmarshal(b, &run); err != nil {
		return "", err
	}
	path := "docs/" + s.name + ".svg"
	text := fmt.Sprintf("![%s. %s](%s)\n\nAll figures, with spread and reasons: [%s](%s).\n", s.chart.title, s.chart.what, path, performance, performance)
	return text, os.WriteFile(path, []byte(s.chart.svg(run.Rows)), 0o644)
}

// Measures of the picture, in pixels.
const (
	chartLeft  = 330 // names end here
	chartBars  = 420 // width of the scale
	chartRight = 70  // room for a value
	chartTop   = 64
	chartStep  = 20 // from row to row
	chartLow   = 0.01
	chartHigh  = 3.0
)

// x is where a share is on the logarithmic scale.
func x(share float64) float64 {
	share = math.Min(math.Max(share, chartLow), chartHigh)
	return chartLeft + chartBars*math.Log(share/chartLow)/math.Log(chartHigh/chartLow)
}

const chartStyle = `<style>
text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-size:15px;font-weight:600}.s,.v{fill:#59636e}
.bg{fill:#fff}.ok{fill:#1a7f37}.miss{fill:#bc4c00}.grid{stroke:#d1d9e0}.peer,.must{stroke:#1f2328}.peer{stroke-width:1.5}.must{stroke-width:2}
@media (prefers-color-scheme: dark){text{fill:#f0f6fc}.s,.v{fill:#9198a1}.bg{fill:#0d1117}.ok{fill:#2ea043}.miss{fill:#f0883e}.grid{stroke:#3d444d}.peer,.must{stroke:#f0f6fc}}
</style>
`

// svg draws one bar for each row. Colour is never the only sign: a bar that
// misses its bound reaches beyond the mark.
func (c *chart) svg(rows []charted) string {
	width, bottom := chartLeft+chartBars+chartRight, chartTop+chartStep*len(rows)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-labelledby="t d">`+"\n", width, bottom+28)
	fmt.Fprintf(&b, "<title id=\"t\">%s</title>\n<desc id=\"d\">%s</desc>\n", html.EscapeString(c.title), html.EscapeString(c.describe(rows)))
	b.WriteString(chartStyle)
	fmt.Fprintf(&b, "<rect class=\"bg\" width=\"%d\" height=\"%d\"/>\n", width, bottom+28)
	fmt.Fprintf(&b, "<text class=\"t\" x=\"12\" y=\"24\">%s</text>\n<text class=\"s\" x=\"12\" y=\"44\">%s</text>\n", html.EscapeString(c.title), html.EscapeString(c.what))
	for _, share := range []float64{0.01, 0.03, 0.1, 0.3, 1, 3} {
		class := "grid"
		if share == 1 {
			class = "peer"
		}
		fmt.Fprintf(&b, "<line class=\"%s\" x1=\"%.1f\" y1=\"%d\" x2=\"%.1[2]f\" y2=\"%[4]d\"/>", class, x(share), chartTop-8, bottom)
		fmt.Fprintf(&b, "<text class=\"s\" text-anchor=\"middle\" x=\"%.1f\" y=\"%d\">%gx</text>\n", x(share), bottom+18, share)
	}
	for i, r := range rows {
		b.WriteString(r.bar(chartTop + chartStep*i))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// describe is the picture in words.
func (c *chart) describe(rows []charted) string {
	var b strings.Builder
	b.WriteString(c.what)
	for _, r := range rows {
		got, _ := r.share()
		fmt.Fprintf(&b, " %s: %s.", r.Name, times(got))
	}
	return b.String()
}

func (r charted) bar(y int) string {
	got, must := r.share()
	class := "ok"
	if must > 0 && got > must {
		class = "miss"
	}
	at := x(got)
	s := fmt.Sprintf("<text text-anchor=\"end\" x=\"%d\" y=\"%d\">%s</text>", chartLeft-8, y+11, html.EscapeString(r.Name)) +
		fmt.Sprintf("<rect class=\"%s\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"12\"/>", class, chartLeft, y+1, math.Max(at-chartLeft, 1))
	if must > 0 {
		s += fmt.Sprintf("<line class=\"must\" x1=\"%.1f\" y1=\"%d\" x2=\"%.1[1]f\" y2=\"%[3]d\"/>", x(must), y-1, y+15)
		if must > got {
			at = math.Max(at, x(must))
		}
	}
	return s + fmt.Sprintf("<text class=\"v\" x=\"%.1f\" y=\"%d\">%s</text>\n", at+6, y+11, times(got))
}

// times is a ratio with as many digits as matter.
func times(v float64) string {
	switch {
	case v < 0.01:
		return fmt.Sprintf("%.3fx", v)
	case v < 10:
		return fmt.Sprintf("%.2fx", v)
	}
	return fmt.Sprintf("%.0fx", v)
}
