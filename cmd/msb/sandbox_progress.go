package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/microsandbox-go/microsandbox"
)

// launchProgress shows the steps of a launch on stderr: one line that is written
// over on a terminal, nothing elsewhere.
type launchProgress struct {
	w        io.Writer
	quiet    bool
	terminal bool
	shown    time.Time
	last     string
	dirty    bool
}

func newLaunchProgress(w io.Writer, quiet bool) *launchProgress {
	f, ok := w.(*os.File)
	return &launchProgress{w: w, quiet: quiet, terminal: ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb", shown: time.Now()}
}

func (p *launchProgress) report(s microsandbox.LaunchProgress) {
	if p.quiet || !p.terminal {
		return
	}
	line := s.Step + ": " + s.Message
	step := line
	if s.Total > 0 {
		line += fmt.Sprintf(" %s of %s", formatBytes(uint64(s.Done)), formatBytes(uint64(s.Total)))
	}
	if step == p.last && time.Since(p.shown) < 100*time.Millisecond {
		return
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", printable(line))
	p.dirty = true
	p.last, p.shown = step, time.Now()
}

// finish clears the line.
func (p *launchProgress) finish() {
	if p.dirty {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.dirty = false
	}
}
