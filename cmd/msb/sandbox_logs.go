package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newLogsCmd() *cobra.Command {
	var tail uint64
	var since, until, source string
	var follow, timestamps, asJSON bool
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Print what programs in a sandbox have printed",
		Long: `Print what programs in a sandbox have printed: standard output to standard output,
standard error to standard error. "system" is what the guest kernel and msb itself
have said; it tells why a sandbox did not boot.`,
		Example: "  msb logs api --tail 20 --timestamps\n  msb logs api --source system --since 5m",
		Args:    args(cobra.ExactArgs(1)), ValidArgsFunction: completeSandboxes(false),
		RunE: func(cmd *cobra.Command, names []string) error {
			if follow {
				return &microsandbox.Error{Kind: microsandbox.ErrUnsupportedOperation, Message: "following a log (--follow) is not supported yet"}
			}
			o, err := logOptions(tail, since, until, source)
			if err != nil {
				return err
			}
			h, err := microsandbox.GetSandbox(cmd.Context(), names[0])
			if err != nil {
				return err
			}
			entries, err := h.Logs(cmd.Context(), o)
			if err != nil {
				return err
			}
			return printLogs(cmd.OutOrStdout(), cmd.ErrOrStderr(), entries, timestamps, asJSON)
		},
	}
	f := cmd.Flags()
	f.Uint64Var(&tail, "tail", 0, "only the last `NUMBER` entries")
	f.StringVar(&since, "since", "", "only from this `TIME` on: RFC 3339, or 5m, 2h, 1d ago")
	f.StringVar(&until, "until", "", "only before this `TIME`: RFC 3339, or 5m, 2h, 1d ago")
	f.StringVar(&source, "source", "", "`SOURCES`, separated by commas: stdout, stderr, output, system or all (default: all but system)")
	f.BoolVarP(&follow, "follow", "f", false, "wait for more (not supported yet)")
	f.BoolVar(&timestamps, "timestamps", false, "begin each line with its time")
	f.BoolVar(&asJSON, "json", false, "print one JSON object per entry: t, s, d, id, e")
	return cmd
}

func logOptions(tail uint64, since, until, source string) (microsandbox.LogOptions, error) {
	o := microsandbox.LogOptions{Tail: tail}
	var err error
	if o.Since, err = parseWhen(since); err != nil {
		return o, usagef("--since: %w", err)
	}
	if o.Until, err = parseWhen(until); err != nil {
		return o, usagef("--until: %w", err)
	}
	for _, s := range strings.Split(source, ",") {
		switch l := microsandbox.LogSource(s); l {
		case "":
		case "all":
			o.Sources = append(o.Sources, microsandbox.LogSourceStdout, microsandbox.LogSourceStderr, microsandbox.LogSourceOutput, microsandbox.LogSourceSystem)
		case microsandbox.LogSourceStdout, microsandbox.LogSourceStderr, microsandbox.LogSourceOutput, microsandbox.LogSourceSystem:
			o.Sources = append(o.Sources, l)
		default:
			return o, usagef("--source %q is not stdout, stderr, output, system or all", s)
		}
	}
	return o, nil
}

// parseWhen reads a time, or how long ago it was.
func parseWhen(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return time.Now().Add(-time.Duration(n) * 24 * time.Hour), nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return time.Time{}, fmt.Errorf("%q is neither an RFC 3339 time nor a duration", s)
	}
	return time.Now().Add(-d), nil
}

// printLogs writes output to where it went in the guest.
func printLogs(out, errOut io.Writer, entries []microsandbox.LogEntry, timestamps, asJSON bool) error {
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	for _, e := range entries {
		if asJSON {
			if err := enc.Encode(logLine(e)); err != nil {
				return err
			}
			continue
		}
		w := out
		if e.Source == microsandbox.LogSourceStderr {
			w = errOut
		}
		if timestamps {
			fmt.Fprintf(w, "%s ", e.Timestamp.UTC().Format(time.RFC3339Nano))
		}
		if _, err := w.Write(e.Data); err != nil {
			return err
		}
		if timestamps && !strings.HasSuffix(string(e.Data), "\n") {
			fmt.Fprintln(w)
		}
	}
	return nil
}

func logLine(e microsandbox.LogEntry) map[string]any {
	m := map[string]any{"t": e.Timestamp.UTC().Format(time.RFC3339Nano), "s": e.Source, "d": string(e.Data)}
	if e.SessionID != nil {
		m["id"] = *e.SessionID
	}
	if !utf8.Valid(e.Data) {
		m["d"], m["e"] = base64.StdEncoding.EncodeToString(e.Data), "b64"
	}
	return m
}
