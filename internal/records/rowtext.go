package records

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Volumes are read as one text in which the database has joined all columns of
// all rows: per row and column the driver is several times slower than this
// (10 000 volumes: 9 ms against 43 ms). No column can hold a separator: names
// and ids are plain, and JSON escapes control characters.
const (
	unitSep   = "\x1f"
	recordSep = "\x1e"
)

func parseVolumes(text string) ([]*Volume, error) {
	n := strings.Count(text, recordSep) + 1
	out, store := make([]*Volume, n), make([]Volume, n)
	for i := range out {
		var row string
		row, text, _ = strings.Cut(text, recordSep)
		out[i] = &store[i]
		if err := parseVolume(row, out[i]); err != nil {
			return nil, fmt.Errorf("volume record %q: %w", row, err)
		}
	}
	return out, nil
}

// parseVolume reads one row in the order of volumeColumns.
func parseVolume(row string, v *Volume) (err error) {
	f := fields{rest: row}
	v.ID, v.Name, v.Kind = f.text(), f.text(), f.text()
	v.QuotaMiB, v.CapacityBytes = uint32(f.int()), f.int()
	v.DiskFormat, v.DiskFstype = f.text(), f.text()
	labels := f.text()
	v.CreatedAt = time.Unix(0, f.int()).UTC()
	v.Identity = Identity{Dev: uint64(f.int()), Ino: uint64(f.int()), BirthNS: f.int()}
	v.MovingFrom = f.text()
	if f.err != nil {
		return f.err
	}
	v.Labels, err = decodeLabels(labels)
	return err
}

// parseTombstones reads rows in the order of tombstoneText.
func parseTombstones(text string) ([]Tombstone, error) {
	var out []Tombstone
	for row := range strings.SplitSeq(text, recordSep) {
		f := fields{rest: row}
		t := Tombstone{ID: f.text(), Name: f.text()}
		t.Identity = Identity{Dev: uint64(f.int()), Ino: uint64(f.int()), BirthNS: f.int()}
		t.RemovedAt = time.Unix(0, f.int()).UTC()
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

func (f *fields) int() int64 {
	n, err := strconv.ParseInt(f.text(), 10, 64)
	if err != nil && f.err == nil {
		f.err = err
	}
	return n
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
