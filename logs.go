package microsandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/home"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
	"github.com/microsandbox-go/microsandbox/internal/supervisor"
)

// LogSource says where a log entry came from.
type LogSource string

// Log sources.
const (
	LogSourceStdout LogSource = "stdout"
	LogSourceStderr LogSource = "stderr"
	LogSourceOutput LogSource = "output" // stdout of a program with a terminal
	LogSourceSystem LogSource = "system" // the sandbox's own events
)

// LogOptions select log entries; the zero value selects all.
type LogOptions struct {
	Tail    uint64      // only the last entries; 0: all
	Since   time.Time   // not before
	Until   time.Time   // before
	Sources []LogSource // nil: stdout, stderr, output
}

// LogEntry is a piece of output of one program.
type LogEntry struct {
	Source    LogSource
	SessionID *uint64 // the program; nil for system entries
	Timestamp time.Time
	Data      []byte
	Cursor    string
}

// Text returns the data as text.
func (e LogEntry) Text() string { return string(e.Data) }

// Logs returns what programs in the sandbox have printed, oldest first. The log
// keeps at least the last 16 MiB. Program output is untrusted bytes.
func (s *Sandbox) Logs(ctx context.Context, opts LogOptions) ([]LogEntry, error) {
	return readLogs(ctx, s.st, s.Name(), opts)
}

// Logs returns what programs in the sandbox have printed, as [Sandbox.Logs].
func (h *SandboxHandle) Logs(ctx context.Context, opts LogOptions) ([]LogEntry, error) {
	return readLogs(ctx, h.st, h.Name(), opts)
}

func readLogs(ctx context.Context, st *sandbox.Store, name string, o LogOptions) ([]LogEntry, error) {
	var out []LogEntry
	for _, file := range []string{supervisor.OutputLog + ".1", supervisor.OutputLog} {
		f, err := home.OpenFile(filepath.Join(st.LogDir(name), file), unix.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, toPublic(errdefs.Wrap(errdefs.IO, err, "log of sandbox %q", name))
		}
		out, err = o.read(ctx, f, out)
		f.Close()
		if err != nil {
			return nil, toPublic(err)
		}
	}
	return out, nil
}

// read appends the entries of one file. A line that is cut short, as a crash may
// leave it, is skipped.
func (o *LogOptions) read(ctx context.Context, f *os.File, out []LogEntry) ([]LogEntry, error) {
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var l supervisor.LogLine
		if json.Unmarshal(lines.Bytes(), &l) != nil {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, l.Time)
		if err != nil || !o.wants(LogSource(l.Source), t) {
			continue
		}
		e := LogEntry{Source: LogSource(l.Source), Timestamp: t, Data: l.Text(), Cursor: l.Time}
		if e.Source != LogSourceSystem {
			id := uint64(l.ID)
			e.SessionID = &id
		}
		out = append(out, e)
		if o.Tail > 0 && uint64(len(out)) > o.Tail {
			out = out[1:]
		}
	}
	return out, lines.Err()
}

func (o *LogOptions) wants(s LogSource, t time.Time) bool {
	if !o.Since.IsZero() && t.Before(o.Since) || !o.Until.IsZero() && !t.Before(o.Until) {
		return false
	}
	if o.Sources == nil {
		return s != LogSourceSystem
	}
	return slices.Contains(o.Sources, s)
}
