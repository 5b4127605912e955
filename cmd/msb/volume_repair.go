package main

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

// findingJSON is something odd in `msb volume repair --format json`. Action is
// null for what was left alone; kinds are those of microsandbox.VolumeFinding.
type findingJSON struct {
	Kind   string  `json:"kind"`
	Name   *string `json:"name"`
	ID     *string `json:"id"`
	Path   string  `json:"path"`
	Action *string `json:"action"`
	Detail *string `json:"detail"`
}

func newVolumeRepairCmd() *cobra.Command {
	var format outputFormat
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "Finish what killed programs left, and say what was found",
		Long: `Finish or undo what programs left that were killed or lost their power, and say what
was found and done. Every command that changes volumes does the same by and by, so
this is never needed.

What needs a decision is listed and left alone: a directory that belongs to no
volume (stranger), a volume whose directory is missing (missing-data) or was
replaced (foreign-data), a disk volume whose image is missing, cut off or no file
(bad-image), a damaged record of which there is no copy (bad-record), bookkeeping
without a record (orphan-state). The exit code is 1 if something could not be mended
that is not for a person to decide.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			look := microsandbox.RepairVolumes
			if dryRun {
				look = microsandbox.CheckVolumes
			}
			found, err := look(cmd.Context())
			if err != nil && len(found) == 0 {
				return err
			}
			return errors.Join(err, printFindings(cmd, found, format))
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only look, change nothing")
	formatFlag(cmd, &format)
	return cmd
}

func printFindings(cmd *cobra.Command, found []microsandbox.VolumeFinding, format outputFormat) error {
	if format == formatJSON {
		list := make([]findingJSON, len(found))
		for i, f := range found {
			list[i] = findingJSON{f.Kind, textOrNull(f.Name), textOrNull(f.ID), f.Path, textOrNull(f.Action), textOrNull(f.Detail)}
		}
		return printJSON(cmd.OutOrStdout(), list)
	}
	if len(found) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "Nothing found.")
		return nil
	}
	t := newTable(cmd.OutOrStdout(), "FOUND", "NAME", "DONE", "PATH")
	for _, f := range found {
		t.row(f.Kind, dash(f.Name), dash(f.Action), f.Path)
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, f := range found {
		if f.Detail != "" {
			fmt.Fprintf(cmd.ErrOrStderr(), "msb: hint: %s: %s\n", printable(cmp.Or(f.Name, f.Path)), printable(f.Detail))
		}
	}
	return nil
}

func textOrNull(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
