package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// volumeDetails is a volume in `msb volume inspect --format json`.
type volumeDetails struct {
	volumeJSON
	Backend  string       `json:"backend"`
	DiskPath *string      `json:"disk_path"`
	Holders  []holderJSON `json:"holders"`
	ID       string       `json:"id"`
	Path     string       `json:"path"`
}

// holderJSON is who has a volume attached; sandbox is null for a program of its
// own.
type holderJSON struct {
	Cache    *string `json:"cache"` // "always" if it has the volume alone for that
	PID      int     `json:"pid"`
	Readonly bool    `json:"readonly"`
	Sandbox  *string `json:"sandbox"`
	Since    *string `json:"since"`
}

func newVolumeInspectCmd() *cobra.Command {
	var format outputFormat
	cmd := &cobra.Command{
		Use:               "inspect NAME",
		Short:             "Show everything about a volume",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := microsandbox.GetVolume(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var holders []microsandbox.VolumeHolder
			if h.BackendKind() == microsandbox.BackendLocal {
				if holders, err = h.Holders(cmd.Context()); err != nil {
					return err
				}
			}
			if err := measured(cmd.Context(), h); err != nil {
				return err
			}
			warnOfMissingImage(cmd.ErrOrStderr(), h)
			if format == formatJSON {
				return printJSON(cmd.OutOrStdout(), inspectVolume(h, holders))
			}
			return printVolume(cmd.OutOrStdout(), h, holders)
		},
	}
	formatFlag(cmd, &format)
	return cmd
}

// measured returns when it is known what the volume holds, which may take a walk,
// or ctx ends; the walk is left behind then.
func measured(ctx context.Context, h *microsandbox.VolumeHandle) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.UsedBytes()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// warnOfMissingImage says so when a disk volume has lost its image: the record
// alone looks healthy.
func warnOfMissingImage(w io.Writer, h *microsandbox.VolumeHandle) {
	path := h.DiskPath()
	if h.BackendKind() != microsandbox.BackendLocal || path == nil {
		return
	}
	if _, err := os.Lstat(*path); errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(w, "msb: volume %q is damaged: its image %s is missing\n", h.Name(), printable(*path))
	}
}

func inspectVolume(h *microsandbox.VolumeHandle, holders []microsandbox.VolumeHolder) volumeDetails {
	d := volumeDetails{volumeJSON: describeVolume(h), Backend: string(h.BackendKind()), DiskPath: h.DiskPath(), Path: h.Path()}
	used := h.UsedBytes()
	d.UsedBytes = &used
	d.Holders = make([]holderJSON, len(holders))
	for i, o := range holders {
		d.Holders[i] = holderJSON{Cache: textOrNull(string(o.Cache)), PID: o.PID, Readonly: o.Readonly, Sandbox: textOrNull(o.Sandbox), Since: jsonTime(o.Since)}
	}
	if l := h.Local(); l != nil {
		d.ID = l.ID
	} else if c := h.Cloud(); c != nil {
		d.ID = c.ID
	}
	return d
}

// printVolume writes one field a line, the name of the field 16 columns wide.
func printVolume(w io.Writer, h *microsandbox.VolumeHandle, holders []microsandbox.VolumeHolder) error {
	fields := [][2]string{{"Name", h.Name()}, {"Kind", string(h.Kind())}}
	if h.Kind() == microsandbox.VolumeKindDisk {
		fields = append(fields, [][2]string{
			{"Format", orDash(h.DiskFormat())}, {"Filesystem", orDash(h.DiskFstype())},
			{"Capacity", volumeSize(h)}, {"Path", orDash(h.DiskPath())},
		}...)
	} else {
		quota := volumeSize(h)
		if quota == "-" {
			quota = "unlimited"
		}
		fields = append(fields, [2]string{"Quota", quota}, [2]string{"Path", h.Path()})
	}
	fields = append(fields, [][2]string{
		{"Used", formatBytes(h.UsedBytes())}, {"Backend", string(h.BackendKind())},
		{"Created", formatTime(h.CreatedAt())}, {"Labels", labelText(h.LabelPairs())},
		{"Attached", holderText(holders)},
	}...)
	for _, f := range fields {
		if _, err := fmt.Fprintf(w, "%-16s%s\n", f[0], printable(f[1])); err != nil {
			return err
		}
	}
	return nil
}

// holderText says who has the volume, one after the other.
func holderText(holders []microsandbox.VolumeHolder) string {
	parts := make([]string, len(holders))
	for i, o := range holders {
		who, how := fmt.Sprintf("sandbox %q", o.Sandbox), "read-write"
		if o.Sandbox == "" {
			who = "a program"
		}
		if o.Readonly {
			how = "read-only"
		}
		if o.Cache != "" {
			how += ", cache=" + string(o.Cache)
		}
		parts[i] = fmt.Sprintf("%s (%s, process %d, since %s)", who, how, o.PID, formatTime(o.Since))
	}
	return dash(strings.Join(parts, ", "))
}

func orDash(s *string) string {
	if s == nil {
		return "-"
	}
	return *s
}

func labelText(labels []microsandbox.Label) string {
	if len(labels) == 0 {
		return "-"
	}
	parts := make([]string, len(labels))
	for i, l := range labels {
		parts[i] = l.Key + "=" + l.Value
	}
	return strings.Join(parts, ", ")
}
