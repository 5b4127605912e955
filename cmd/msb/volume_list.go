package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// volumeJSON is a volume in `msb volume ls --format json`; null is "none". A list
// does not say how much is used: that takes a walk of every volume.
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

type volumeListOptions struct {
	labels labelsFlag
	format outputFormat
	quiet  bool
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
	cmd.Flags().Var(&o.labels, "label", "only volumes with this label, may be repeated")
	formatFlag(cmd, &o.format)
	quietFlag(cmd, &o.quiet, "print names only")
	return cmd
}

func runVolumeList(cmd *cobra.Command, o volumeListOptions) error {
	handles, err := microsandbox.ListVolumesWith(cmd.Context(), microsandbox.WithVolumeListLabels(o.labels))
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	switch {
	case o.format == formatJSON:
		list := make([]volumeJSON, len(handles))
		for i, h := range handles {
			list[i] = describeVolume(h)
		}
		return printJSON(out, list)
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
	t := newTable(out, "NAME", "KIND", "SIZE", "CREATED")
	for _, h := range handles {
		t.row(h.Name(), string(h.Kind()), volumeSize(h), formatTime(h.CreatedAt()))
	}
	return t.flush()
}

// volumeSize is the limit that a volume has, "-" for none.
func volumeSize(h *microsandbox.VolumeHandle) string {
	switch {
	case h.CapacityBytes() != nil:
		return formatBytes(*h.CapacityBytes())
	case h.QuotaMiB() != nil:
		return formatMiB(*h.QuotaMiB())
	}
	return "-"
}
