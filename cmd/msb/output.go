package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

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

// table prints aligned columns; the header is written by newTable.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, header ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)}
	t.row(header...)
	return t
}

// row adds a line. Cells are made printable: a name is chosen by somebody
// else, and a terminal obeys what it is sent.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = printable(c)
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() error { return t.w.Flush() }

// printable replaces what a terminal would obey or hide (control characters,
// changes of direction, bytes that are not UTF-8) by its Go escape.
func printable(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, isHidden) < 0 {
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

func isHidden(r rune) bool { return !unicode.IsPrint(r) }

// formatBytes prints a size with a binary unit: 64MiB, 1.5GiB.
func formatBytes(n uint64) string { return units.BytesSize(float64(n)) }

// formatMiB prints a count of mebibytes.
func formatMiB(mib uint32) string { return formatBytes(uint64(mib) << 20) }

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
