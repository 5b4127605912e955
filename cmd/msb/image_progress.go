package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/microsandbox-go/microsandbox"
)

// imageProgress shows a pull or a load on stderr: one line that is written over
// on a terminal; elsewhere a line for each phase.
type imageProgress struct {
	w        io.Writer
	what     string
	quiet    bool
	terminal bool
	phase    string
	layers   map[string]layerBytes // of this phase, by digest
	shown    time.Time
	dirty    bool // the line on the terminal is not empty
}

type layerBytes struct{ current, total int64 }

func newImageProgress(w io.Writer, what string, quiet bool) *imageProgress {
	f, ok := w.(*os.File)
	onTerminal := ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
	return &imageProgress{w: w, what: what, quiet: quiet, terminal: onTerminal}
}

// report takes one report. All layers of a phase are added up: several are on
// their way at a time.
func (p *imageProgress) report(r microsandbox.ImageProgress) {
	if p.quiet || r.Phase == "done" {
		return
	}
	fresh := r.Phase != p.phase
	if fresh {
		p.phase, p.layers = r.Phase, map[string]layerBytes{}
	}
	if r.Total > 0 {
		p.layers[r.Digest] = layerBytes{r.Current, r.Total}
	}
	if !p.terminal {
		if fresh {
			fmt.Fprintf(p.w, "%s: %s\n", printable(p.what), r.Phase)
		}
		return
	}
	if !fresh && time.Since(p.shown) < 100*time.Millisecond {
		return
	}
	p.shown, p.dirty = time.Now(), true
	fmt.Fprintf(p.w, "\r\x1b[K%s: %s%s", printable(p.what), r.Phase, p.sum(r.Layers))
}

// sum says how far the phase is.
func (p *imageProgress) sum(layers int) string {
	var all layerBytes
	for _, b := range p.layers {
		all.current += b.current
		all.total += b.total
	}
	switch {
	case all.total == 0:
		return ""
	case layers > len(p.layers): // the sizes of the others are not known yet
		return fmt.Sprintf(" layer %d of %d, %s", len(p.layers), layers, formatBytes(uint64(all.current)))
	}
	return fmt.Sprintf(" %s of %s", formatBytes(uint64(all.current)), formatBytes(uint64(all.total)))
}

// finish clears the line.
func (p *imageProgress) finish() {
	if p.dirty {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.dirty = false
	}
}
