package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

// output is standard output. It remembers its first error: a command that could
// not say what it has done has failed.
type output struct {
	*os.File
	failed error
}

func (o *output) Write(b []byte) (int, error) {
	n, err := o.File.Write(b)
	return n, o.note(err)
}

func (o *output) WriteString(s string) (int, error) {
	n, err := o.File.WriteString(s)
	return n, o.note(err)
}

// ReadFrom lets the kernel copy.
func (o *output) ReadFrom(r io.Reader) (int64, error) {
	n, err := o.File.ReadFrom(r)
	return n, o.note(err)
}

func (o *output) note(err error) error {
	if err != nil && o.failed == nil {
		o.failed = fmt.Errorf("standard output: %w", err)
	}
	return err
}

// outputFormat is the value of --format: "table" or "json".
type outputFormat string

const (
	formatTable outputFormat = "table"
	formatJSON  outputFormat = "json"
)

func (f *outputFormat) String() string { return string(*f) }
func (f *outputFormat) Type() string   { return "table|json" }

func (f *outputFormat) Set(s string) error {
	switch outputFormat(s) {
	case formatTable, formatJSON:
		*f = outputFormat(s)
		return nil
	}
	return fmt.Errorf("unknown format %q: table or json", s)
}

// formatFlag adds --format to cmd.
func formatFlag(cmd *cobra.Command, f *outputFormat) {
	*f = formatTable
	cmd.Flags().Var(f, "format", "how to print the result")
	_ = cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(
		[]string{string(formatTable), string(formatJSON)}, cobra.ShellCompDirectiveNoFileComp))
}

// quietFlag adds -q, --quiet to cmd.
func quietFlag(cmd *cobra.Command, quiet *bool, usage string) {
	cmd.Flags().BoolVarP(quiet, "quiet", "q", false, usage)
}

// printJSON writes v as indented JSON with a newline at the end. Text is not
// escaped for HTML.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// table prints aligned columns, all at once by flush. Every row has as many
// cells as the header.
type table struct {
	w      io.Writer
	cells  []string
	widths []int // of the columns, in runes
}

func newTable(w io.Writer, header ...string) *table {
	t := &table{w: w, widths: make([]int, len(header))}
	t.row(header...)
	return t
}

// row adds a line. Cells are made printable: a name is chosen by somebody
// else, and a terminal obeys what it is sent.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		c = printable(c)
		t.cells = append(t.cells, c)
		t.widths[i] = max(t.widths[i], utf8.RuneCountInString(c))
	}
}

// flush writes the table. The last column is not padded.
func (t *table) flush() error {
	const gap = 3 // spaces between columns
	w := bufio.NewWriterSize(t.w, outputBuffer)
	last := len(t.widths) - 1
	for i, c := range t.cells {
		_, _ = w.WriteString(c) // errors stick until Flush
		if i%len(t.widths) == last {
			_ = w.WriteByte('\n')
			continue
		}
		for range t.widths[i%len(t.widths)] + gap - utf8.RuneCountInString(c) {
			_ = w.WriteByte(' ')
		}
	}
	return w.Flush()
}

// outputBuffer is how many bytes of a long list are written at once.
const outputBuffer = 64 << 10

// printLines writes each line with a newline at its end.
func printLines(w io.Writer, lines iter.Seq[string]) error {
	b := bufio.NewWriterSize(w, outputBuffer)
	for line := range lines {
		_, _ = b.WriteString(line) // errors stick until Flush
		_ = b.WriteByte('\n')
	}
	return b.Flush()
}

// printable replaces what a terminal would obey or hide (control characters,
// changes of direction, bytes that are not UTF-8) by its Go escape.
func printable(s string) string {
	if isPlain(s) || utf8.ValidString(s) && strings.IndexFunc(s, isHidden) < 0 {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		_, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case isHidden(r):
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// isPlain reports whether s is printable ASCII, as nearly all text is.
func isPlain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func isHidden(r rune) bool { return !unicode.IsPrint(r) }

// formatBytes prints a size with a binary unit: 64MiB, 1.5GiB.
func formatBytes(n uint64) string { return units.BytesSize(float64(n)) }

// formatMiB prints a count of mebibytes, exactly, so that parseMiB reads the same.
func formatMiB(mib uint32) string {
	text := formatBytes(uint64(mib) << 20)
	if same, err := parseMiB(text); err != nil || same != mib {
		return fmt.Sprintf("%dMiB", mib)
	}
	return text
}

// formatLimit prints a limit of bytes as formatMiB does, if it is one of mebibytes.
func formatLimit(n uint64) string {
	if n%(1<<20) != 0 || n>>20 > math.MaxUint32 {
		return formatBytes(n)
	}
	return formatMiB(uint32(n >> 20))
}

// formatTime prints a time for people, in the local zone; "-" when unknown.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

// jsonTime is a time in JSON: UTC with nanoseconds, null when unknown.
func jsonTime(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := t.UTC().Format("2006-01-02T15:04:05.000000000Z07:00")
	return &s
}
