package records

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// Volumes are read as one text in which the database has joined all columns of
// all rows: per row and column the driver is several times slower than this
// (10 000 volumes: 9 ms against 43 ms). No column can hold a separator: names
// and ids are plain, and JSON escapes control characters.
const (
	unitSep   = "\x1f"
	recordSep = "\x1e"
)

// parseVolumes returns what it could read, and the error of damagedRows.
func parseVolumes(text string) ([]*Volume, error) {
	n := strings.Count(text, recordSep) + 1
	out, store := make([]*Volume, 0, n), make([]Volume, n)
	var damaged DamagedRows
	for i := range store {
		var row string
		row, text, _ = strings.Cut(text, recordSep)
		if err := parseVolume(row, &store[i]); err != nil {
			damaged = append(damaged, DamagedRow{ID: store[i].ID, Name: store[i].Name, Err: err})
			continue
		}
		out = append(out, &store[i])
	}
	return out, damaged.orNil()
}

// DamagedRow is the record of a volume that somebody has edited so that it makes
// no sense. ID and Name are as it has them.
type DamagedRow struct {
	ID, Name string
	Err      error
}

// DamagedRows is the cause of an error about them; the other rows are right.
type DamagedRows []DamagedRow

func (d DamagedRows) Error() string {
	lines := make([]string, len(d))
	for i, r := range d {
		lines[i] = fmt.Sprintf("the record of volume %q is damaged: %v", r.Name, r.Err)
	}
	return strings.Join(lines, "\n")
}

func (d DamagedRows) orNil() error {
	if len(d) == 0 {
		return nil
	}
	return (&errdefs.Error{Kind: errdefs.Filesystem, Cause: d}).WithHint("msb volume repair restores it from the copy beside the volume")
}

// parseVolume reads one row in the order of volumeColumns.
func parseVolume(row string, v *Volume) (err error) {
	f := fields{rest: row}
	v.ID, v.Name, v.Kind = f.text(), f.text(), f.text()
	v.QuotaMiB, v.CapacityBytes = uint32(f.int("quota_mib")), f.int("capacity_bytes")
	v.DiskFormat, v.DiskFstype = f.text(), f.text()
	labels := f.text()
	v.CreatedAt = time.Unix(0, f.int("created_ns")).UTC()
	v.Identity = f.identity()
	v.MovingFrom = f.text()
	if f.err != nil {
		return f.err
	}
	if v.Labels, err = decodeLabels(labels); err != nil {
		err = fmt.Errorf("labels: %w", err)
	}
	return err
}

// parseTombstones reads rows in the order of tombstoneText.
func parseTombstones(text string) ([]Tombstone, error) {
	var out []Tombstone
	for row := range strings.SplitSeq(text, recordSep) {
		f := fields{rest: row}
		t := Tombstone{ID: f.text(), Name: f.text()}
		t.Identity = f.identity()
		t.RemovedAt = time.Unix(0, f.int("removed_ns")).UTC()
		if f.err != nil {
			return nil, fmt.Errorf("tombstone %q: %w", row, f.err)
		}
		out = append(out, t)
	}
	slices.SortStableFunc(out, func(a, b Tombstone) int { return a.RemovedAt.Compare(b.RemovedAt) })
	return out, nil
}

// fields cuts a row; the first error sticks.
type fields struct {
	rest string
	err  error
}

func (f *fields) text() (s string) {
	s, f.rest, _ = strings.Cut(f.rest, unitSep)
	return s
}

func (f *fields) int(column string) int64 {
	n, err := strconv.ParseInt(f.text(), 10, 64)
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("%s: %w", column, err)
	}
	return n
}

func (f *fields) identity() Identity {
	return Identity{Dev: uint64(f.int("dev")), Ino: uint64(f.int("ino")), BirthNS: f.int("birth_ns")}
}

// encodeLabels writes labels as a JSON object with sorted keys, none as "".
func encodeLabels(labels map[string]string) (string, error) {
	if len(labels) == 0 {
		return "", nil
	}
	b, err := json.Marshal(labels)
	return string(b), err
}

func decodeLabels(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	if m := plainLabels(text); m != nil {
		return m, nil
	}
	var m map[string]string
	err := json.Unmarshal([]byte(text), &m)
	return m, err
}

// plainLabels reads {"k":"v",...} without escapes, which is what encodeLabels
// nearly always writes; nil means that the JSON decoder must look.
func plainLabels(text string) map[string]string {
	if strings.IndexByte(text, '\\') >= 0 || !strings.HasPrefix(text, `{"`) || !strings.HasSuffix(text, `"}`) {
		return nil
	}
	pairs := strings.Split(text[2:len(text)-2], `","`)
	m := make(map[string]string, len(pairs))
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, `":"`)
		if !ok || strings.IndexByte(k, '"') >= 0 || strings.IndexByte(v, '"') >= 0 {
			return nil
		}
		m[k] = v
	}
	return m
}
