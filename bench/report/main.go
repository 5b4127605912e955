// Command report runs the benchmarks and writes their tables into README.md and
// docs/performance.md, between the markers <!-- bench:NAME:begin --> and
// <!-- bench:NAME:end -->. Nothing else writes there.
//
//	go run ./bench/report            measure and write (make bench)
//	go run ./bench/report -saved     write the tables of the last run again
//
// What a benchmark prints above a line <!-- details --> goes to both documents,
// the rest to docs/performance.md only. Rows that miss a bound get their reasons
// from reasons.go. A benchmark with a chart has that in README instead of its
// table; it is drawn into docs/NAME.svg.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// section is one benchmark and its place in the documents.
type section struct {
	name  string
	args  []string // of the program, which is bench/NAME
	chart *chart   // that README shows instead of the table, nil: the table
}

// sections are the benchmarks in the order they run. One that is not in the
// tree is left out.
var sections = []section{
	{"virtiofs", []string{"-rounds", "7"}, nil},
	{"boot", []string{"-rounds", "10"}, nil},
	{"volumes", nil, volumesChart},
}

const (
	readme      = "README.md"
	performance = "docs/performance.md"
	saved       = "build/bench" // output of the last run
	details     = "<!-- details -->\n"
	patience    = 15 * time.Minute // for one benchmark
)

func main() {
	only := flag.String("only", ".", "only benchmarks whose name matches this `regexp`")
	again := flag.Bool("saved", false, "measure nothing: write what the last run has printed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *only, *again); err != nil {
		fmt.Fprintln(os.Stderr, "bench/report:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only string, again bool) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(saved, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, s := range sections {
		if _, err := os.Stat(filepath.Join("bench", s.name)); err != nil || !match.MatchString(s.name) {
			continue
		}
		text, err := s.output(ctx, again)
		if again && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = s.publish(text)
		}
		if err != nil { // the others are still worth having
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
		}
	}
	return errors.Join(errs...)
}

// output measures, or takes what the last run has printed.
func (s section) output(ctx context.Context, again bool) (string, error) {
	path := filepath.Join(saved, s.name+".md")
	if again {
		b, err := os.ReadFile(path)
		return string(b), err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	args := append([]string{"run", "./bench/" + s.name}, s.args...)
	cmd := exec.CommandContext(ctx, "go", append(args, "-out", filepath.Join(saved, s.name+".json"))...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it has guests to end
	cmd.WaitDelay = 20 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", err
	}
	return out.String(), os.WriteFile(path, out.Bytes(), 0o644)
}

// publish writes the tables into both documents.
func (s section) publish(text string) error {
	short, rest, found := strings.Cut(text, details)
	short = strings.TrimRight(short, "\n") + "\n"
	if found {
		rest = "\n" + strings.TrimLeft(rest, "\n")
	}
	why := s.missed(text)
	if err := replace(performance, s.name, short+rest+why); err != nil {
		return err
	}
	if s.chart != nil {
		picture, err := s.draw()
		if err != nil {
			return err
		}
		short, why = picture+"\n"+short, ""
	}
	err := replace(readme, s.name, short+why)
	if errors.Is(err, errNoMarkers) {
		return nil // not every table is of interest there
	}
	return err
}

// missed lists the rows that miss a bound with their reasons.
func (s section) missed(text string) string {
	var out strings.Builder
	var seen []string
	for _, part := range []struct{ title, mark string }{
		{"Missed, and why:", "| miss |"},
		{"Moonshots missed, and why:", " missed |"},
	} {
		list := s.rowsWith(text, part.mark, &seen)
		if len(list) > 0 {
			fmt.Fprintf(&out, "\n%s\n\n%s\n", part.title, strings.Join(list, "\n"))
		}
	}
	return out.String()
}

// rowsWith lists the rows of tables that hold mark and were not seen before,
// each with its reason.
func (s section) rowsWith(text, mark string, seen *[]string) (list []string) {
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) < 4 || !strings.Contains(line, mark) {
			continue
		}
		name := strings.TrimSpace(cells[1])
		if slices.Contains(*seen, name) {
			continue
		}
		*seen = append(*seen, name)
		reason := reasons[s.name][name]
		if reason == "" {
			reason = "not looked into yet."
			fmt.Fprintf(os.Stderr, "bench/report: %s: %q is missed and reasons.go has no reason\n", s.name, name)
		}
		list = append(list, fmt.Sprintf("- %s: %s", name, reason))
	}
	return list
}

var errNoMarkers = errors.New("no markers")

// replace puts text between the markers of a document.
func replace(path, name, text string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	begin, end := "<!-- bench:"+name+":begin -->\n", "<!-- bench:"+name+":end -->"
	before, rest, ok := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s: %w for %q", path, errNoMarkers, name)
	}
	out := before + begin + strings.TrimRight(text, "\n") + "\n" + end + after
	if out == string(b) {
		return nil
	}
	return os.WriteFile(path, []byte(out), 0o644)
}
