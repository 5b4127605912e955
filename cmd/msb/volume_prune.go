package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

type volumePruneOptions struct {
	labels    labelFilter
	kind      kindFlag
	olderThan time.Duration
	all       bool
	dryRun    bool
	format    outputFormat
	quiet     bool
}

// prunedJSON is a volume in `msb volume prune --format json`. Status is
// "removed", "would-remove", "protected", "in-use" or "failed".
type prunedJSON struct {
	Name   string  `json:"name"`
	ID     string  `json:"id"`
	Status string  `json:"status"`
	Error  *string `json:"error"`
}

func newVolumePruneCmd() *cobra.Command {
	var o volumePruneOptions
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove the volumes that filters select",
		Long: `Remove the volumes for which all given filters hold, with their contents, and print
their names. --all removes without a filter.

A volume that is attached stays, and so does one with a label whose key is protect;
a message says so. A volume of a sandbox that is stopped is not attached.`,
		Example: `  msb volume prune --label env=test --older-than 24h --dry-run
  msb volume prune --kind disk --older-than 720h`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runVolumePrune(cmd, o) },
	}
	f := cmd.Flags()
	f.Var(&o.labels, "label", "only volumes with this label, without =VALUE with any value of it; repeated, with all of them")
	f.Var(&o.kind, "kind", "only volumes of this kind")
	f.DurationVar(&o.olderThan, "older-than", 0, "only volumes created at least this long ago, like 90m or 24h")
	f.BoolVar(&o.all, "all", false, "without any filter: all volumes")
	f.BoolVar(&o.dryRun, "dry-run", false, "print what would be removed, remove nothing")
	formatFlag(cmd, &o.format)
	quietFlag(cmd, &o.quiet, "do not print names")
	completeKind(cmd)
	return cmd
}

func runVolumePrune(cmd *cobra.Command, o volumePruneOptions) error {
	filtered := o.labels.isSet() || o.kind != "" || o.olderThan != 0
	switch {
	case o.olderThan < 0:
		return usagef("--older-than %s is in the future", o.olderThan)
	case !filtered && !o.all:
		return usagef("no filter is given; --all prunes all volumes that are neither attached nor protected")
	}
	list, err := microsandbox.PruneVolumes(cmd.Context(), microsandbox.VolumePruneOptions{
		Labels: o.labels.labels, LabelKeys: o.labels.keys, Kind: microsandbox.VolumeKind(o.kind), OlderThan: o.olderThan, DryRun: o.dryRun,
	})
	if o.format == formatJSON {
		if err2 := printJSON(cmd.OutOrStdout(), prunedList(list, o.dryRun)); err == nil {
			err = err2
		}
	} else {
		printPruned(cmd, list, o.quiet)
	}
	for _, p := range list {
		if err == nil && p.Kept == "" && p.Err != nil {
			return errSaid
		}
	}
	return err
}

func prunedList(list []microsandbox.PrunedVolume, dryRun bool) []prunedJSON {
	out := make([]prunedJSON, len(list))
	for i, p := range list {
		out[i] = prunedJSON{Name: p.Name, ID: p.ID, Status: "removed"}
		switch {
		case p.Kept == "in use":
			out[i].Status = "in-use"
		case p.Kept != "":
			out[i].Status = p.Kept
		case p.Err != nil:
			out[i].Status = "failed"
		case dryRun:
			out[i].Status = "would-remove"
		}
		if p.Err != nil {
			text := p.Err.Error()
			out[i].Error = &text
		}
	}
	return out
}

// printPruned prints names on stdout and what stays on stderr.
func printPruned(cmd *cobra.Command, list []microsandbox.PrunedVolume, quiet bool) {
	out := cmd.OutOrStdout()
	if quiet {
		out = io.Discard
	}
	for _, p := range list {
		switch {
		case p.Kept != "" && p.Err != nil:
			fmt.Fprintln(cmd.ErrOrStderr(), "msb: kept:", p.Err)
		case p.Kept != "":
			fmt.Fprintf(cmd.ErrOrStderr(), "msb: kept: volume %q is %s\n", p.Name, p.Kept)
		case p.Err != nil:
			report(cmd.Context(), cmd.ErrOrStderr(), p.Err)
		default:
			fmt.Fprintln(out, p.Name)
		}
	}
}
