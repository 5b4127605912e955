package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// volumeJSON is a volume in `msb volume ls --format json`; null is "none". Used
// bytes are null in a list without --usage, and where they are not known without
// looking into the volume: of one that nobody has written to since volumes are
// counted, and of a disk volume without its image.
type volumeJSON struct {
	CapacityBytes *uint64           `json:"capacity_bytes"`
	CreatedAt     *string           `json:"created_at"`
	DiskFormat    *string           `json:"disk_format"`
	DiskFstype    *string           `json:"disk_fstype"`
	Kind          string            `json:"kind"`
	Labels        map[string]string `json:"labels"`
	Name          string            `json:"name"`
	QuotaMiB      *uint32           `json:"quota_mib"`
	UsedBytes     *uint64           `json:"used_bytes"`
}

func describeVolume(h *microsandbox.VolumeHandle) volumeJSON {
	return volumeJSON{
		CapacityBytes: h.CapacityBytes(), CreatedAt: jsonTime(h.CreatedAt()), DiskFormat: h.DiskFormat(),
		DiskFstype: h.DiskFstype(), Kind: string(h.Kind()), Labels: h.Labels(), Name: h.Name(),
		QuotaMiB: h.QuotaMiB(),
	}
}

// knownUse is what a volume holds, nil where only a walk would tell.
func knownUse(h *microsandbox.VolumeHandle) *uint64 {
	if n, ok := h.KnownUsedBytes(); ok {
		return &n
	}
	return nil
}

type volumeListOptions struct {
	labels labelFilter
	format outputFormat
	quiet  bool
	usage  bool
}

func newVolumeListCmd(use string, aliases ...string) *cobra.Command {
	var o volumeListOptions
	cmd := &cobra.Command{
		Use:     use,
		Aliases: aliases,
		Short:   "List volumes, newest first",
		Args:    noArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return runVolumeList(cmd, o) },
	}
	cmd.Flags().Var(&o.labels, "label", "only volumes with this label, without =VALUE with any value of it; repeated, with all of them")
	formatFlag(cmd, &o.format)
	cmd.Flags().BoolVar(&o.usage, "usage", false, "show what each volume holds, too")
	quietFlag(cmd, &o.quiet, "print names only")
	return cmd
}

func runVolumeList(cmd *cobra.Command, o volumeListOptions) error {
	defer debug.SetGCPercent(debug.SetGCPercent(listGCPercent))
	handles, err := microsandbox.ListVolumesWith(cmd.Context(), microsandbox.WithVolumeListLabels(o.labels.labels), microsandbox.WithVolumeListLabelKeys(o.labels.keys...))
	if err != nil && len(handles) == 0 {
		return err
	}
	return errors.Join(printVolumeList(cmd, o, handles), err)
}

func printVolumeList(cmd *cobra.Command, o volumeListOptions, handles []*microsandbox.VolumeHandle) error {
	out := cmd.OutOrStdout()
	switch {
	case o.format == formatJSON:
		return printVolumes(out, handles, o.usage)
	case o.quiet:
		return printLines(out, func(yield func(string) bool) {
			for _, h := range handles {
				if !yield(h.Name()) {
					return
				}
			}
		})
	case len(handles) == 0:
		fmt.Fprintln(cmd.ErrOrStderr(), "No volumes found.")
		return nil
	}
	columns := []string{"NAME", "KIND", "SIZE", "CREATED"}
	if o.usage {
		columns = append(columns, "USED")
	}
	t := newTable(out, columns...)
	for _, h := range handles {
		row := []string{h.Name(), string(h.Kind()), volumeSize(h), formatTime(h.CreatedAt())}
		if o.usage {
			row = append(row, formatUse(knownUse(h)))
		}
		t.row(row...)
	}
	return t.flush()
}

func formatUse(n *uint64) string {
	if n == nil {
		return "-"
	}
	return formatBytes(*n)
}

// listGCPercent lets the heap of a list grow to tens of MiB before the first
// collection: a process that ends at once need not tidy up for each 4 MiB.
const listGCPercent = 1600

// printVolumes writes what printJSON writes of the volumes' descriptions, four
// times as fast: a list may be long.
func printVolumes(w io.Writer, handles []*microsandbox.VolumeHandle, usage bool) error {
	if len(handles) == 0 {
		return printJSON(w, []volumeJSON{})
	}
	const each = 320 // bytes, about
	b := append(make([]byte, 0, each*len(handles)), '[')
	for i, h := range handles {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, "\n  "...)
		v := describeVolume(h)
		if usage {
			v.UsedBytes = knownUse(h)
		}
		b = v.appendJSON(b)
	}
	_, err := w.Write(append(b, "\n]\n"...))
	return err
}

// appendJSON appends the volume as printJSON writes it inside of an array.
func (v *volumeJSON) appendJSON(b []byte) []byte {
	number := func(b []byte, n *uint64) []byte {
		if n == nil {
			return append(b, "null"...)
		}
		return strconv.AppendUint(b, *n, 10)
	}
	b = number(append(b, "{\n    \"capacity_bytes\": "...), v.CapacityBytes)
	b = appendText(append(b, ",\n    \"created_at\": "...), v.CreatedAt)
	b = appendText(append(b, ",\n    \"disk_format\": "...), v.DiskFormat)
	b = appendText(append(b, ",\n    \"disk_fstype\": "...), v.DiskFstype)
	b = appendText(append(b, ",\n    \"kind\": "...), &v.Kind)
	b = appendLabels(append(b, ",\n    \"labels\": "...), v.Labels)
	b = appendText(append(b, ",\n    \"name\": "...), &v.Name)
	b = append(b, ",\n    \"quota_mib\": "...)
	if v.QuotaMiB == nil {
		b = append(b, "null"...)
	} else {
		b = strconv.AppendUint(b, uint64(*v.QuotaMiB), 10)
	}
	b = number(append(b, ",\n    \"used_bytes\": "...), v.UsedBytes)
	return append(b, "\n  }"...)
}

func appendLabels(b []byte, labels map[string]string) []byte {
	if len(labels) == 0 {
		return append(b, "{}"...)
	}
	b = append(b, '{')
	for i, k := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b = append(b, ',')
		}
		value := labels[k]
		b = appendText(append(b, "\n      "...), &k)
		b = appendText(append(b, ": "...), &value)
	}
	return append(b, "\n    }"...)
}

// appendText appends a JSON string, null for nil.
func appendText(b []byte, s *string) []byte {
	if s == nil {
		return append(b, "null"...)
	}
	if isPlain(*s) && strings.IndexByte(*s, '"') < 0 && strings.IndexByte(*s, '\\') < 0 {
		return append(append(append(b, '"'), *s...), '"')
	}
	var quoted bytes.Buffer
	_ = printJSON(&quoted, *s) // a string always can be encoded
	return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
}

// volumeSize is the limit that a volume has, "-" for none.
func volumeSize(h *microsandbox.VolumeHandle) string {
	switch {
	case h.CapacityBytes() != nil:
		return formatLimit(*h.CapacityBytes())
	case h.QuotaMiB() != nil:
		return formatMiB(*h.QuotaMiB())
	}
	return "-"
}
