package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newVolumeRenameCmd() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:     "rename NAME NEW",
		Aliases: []string{"mv"},
		Short:   "Give a volume another name",
		Long: `Give a volume another name and print it. Its id, contents and labels stay.

A volume that a sandbox has attached is not renamed.`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := nameGiven(args[1]); err != nil {
				return err
			}
			h, err := microsandbox.RenameVolume(cmd.Context(), args[0], args[1])
			if err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), h.Name())
			return err
		},
	}
	quietFlag(cmd, &quiet, "do not print the name")
	return cmd
}

func newVolumeAdoptCmd() *cobra.Command {
	var kind kindFlag
	var quota mibFlag
	var labels labelsFlag
	var quiet bool
	cmd := &cobra.Command{
		Use:   "adopt NAME",
		Short: "Make a volume of a directory that lies at its place",
		Long: `Make a volume of the directory NAME in the home's volumes directory, as it is.

A directory that holds disk.raw and nothing else becomes a disk volume. If NAME is
a volume whose directory was replaced, by one restored from a backup for instance,
it takes the directory that is there now. msb volume repair lists what can be
adopted.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeStrangers,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := quotaGiven(cmd, quota); err != nil {
				return err
			}
			h, err := microsandbox.AdoptVolume(cmd.Context(), args[0], microsandbox.VolumeAdoptOptions{
				Kind: microsandbox.VolumeKind(kind), QuotaMiB: uint32(quota), Labels: labels,
			})
			if err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), h.Name())
			return err
		},
	}
	f := cmd.Flags()
	f.Var(&kind, "kind", "dir or disk (default what it looks like)")
	f.Var(&quota, "quota", "limit of a directory volume (default none)")
	f.Var(&labels, "label", "label, may be repeated")
	quietFlag(cmd, &quiet, "do not print the name")
	completeKind(cmd)
	return cmd
}

// completeStrangers completes names of directories that can be adopted.
func completeStrangers(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	found, err := microsandbox.CheckVolumes(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []cobra.Completion
	for _, f := range found {
		if (f.Kind == "stranger" && strings.Contains(f.Detail, "msb volume adopt") || f.Kind == "foreign-data") && strings.HasPrefix(f.Name, prefix) {
			names = append(names, f.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func completeKind(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions([]string{"dir", "disk"}, cobra.ShellCompDirectiveNoFileComp))
}

func newVolumeLabelCmd() *cobra.Command {
	var remove []string
	var format outputFormat
	var quiet bool
	cmd := &cobra.Command{
		Use:   "label NAME [KEY[=VALUE]...]",
		Short: "Set, remove and show labels of a volume",
		Long: `Set labels of a volume, remove those named by --remove, and print the labels it has
then. Labels that are not named stay; attached volumes can be labelled too.

A label with the key protect, whatever its value, keeps a volume from being pruned.`,
		Example: `  msb volume label cache team=ml protect
  msb volume label cache --remove protect`,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			var set labelsFlag
			for _, a := range args[1:] {
				if err := set.Set(a); err != nil {
					return err
				}
			}
			h, err := microsandbox.GetVolume(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(set)+len(remove) > 0 {
				if h, err = h.UpdateLabels(cmd.Context(), set, remove...); err != nil {
					return err
				}
			}
			return printLabels(cmd, h, format, quiet)
		},
	}
	cmd.Flags().StringArrayVar(&remove, "remove", nil, "key of a label to remove, may be repeated")
	formatFlag(cmd, &format)
	quietFlag(cmd, &quiet, "do not print the labels")
	return cmd
}

func printLabels(cmd *cobra.Command, h *microsandbox.VolumeHandle, format outputFormat, quiet bool) error {
	out := cmd.OutOrStdout()
	switch {
	case quiet:
		return nil
	case format == formatJSON:
		return printJSON(out, h.Labels())
	}
	for _, l := range h.LabelPairs() {
		if _, err := fmt.Fprintln(out, printable(l.Key+"="+l.Value)); err != nil {
			return err
		}
	}
	return nil
}

func newVolumeResizeCmd() *cobra.Command {
	var size mibFlag
	cmd := &cobra.Command{
		Use:   "resize NAME --size SIZE",
		Short: "Make a disk volume larger",
		Long: `Make a disk volume larger and print the size it has then. It cannot shrink, and no
sandbox may have it attached.

The file system in it grows when a sandbox next mounts the volume for writing.`,
		Example:           "  msb volume resize data --size 100G",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeVolumes(false),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("size") {
				return usagef("the new size is missing; usage: %s", cmd.UseLine())
			}
			h, err := microsandbox.ResizeVolume(cmd.Context(), args[0], uint32(size))
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), volumeSize(h))
			return err
		},
	}
	cmd.Flags().Var(&size, "size", "new size of the volume")
	return cmd
}
