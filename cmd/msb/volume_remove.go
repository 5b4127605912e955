package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox"
)

func newVolumeRemoveCmd() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:     "rm NAME...",
		Aliases: []string{"remove"},
		Short:   "Remove volumes and their contents",
		Long: `Remove volumes and their contents, and print the names of those removed.

A volume that a sandbox has attached is not removed. After a failure the command
goes on with the next volume and fails in the end.`,
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeVolumes(true),
		RunE: func(cmd *cobra.Command, names []string) error {
			return eachName(cmd, names, quiet, func(name string) error {
				return microsandbox.RemoveVolume(cmd.Context(), name)
			})
		},
	}
	quietFlag(cmd, &quiet, "do not print names")
	return cmd
}

// eachName does something to every name, printing those done and the errors as
// they come, and fails in the end if any failed.
func eachName(cmd *cobra.Command, names []string, quiet bool, do func(name string) error) error {
	failed := false
	for _, name := range names {
		if err := cmd.Context().Err(); err != nil {
			return err
		}
		if err := do(name); err != nil {
			report(cmd.Context(), cmd.ErrOrStderr(), err)
			failed = true
		} else if !quiet {
			fmt.Fprintln(cmd.OutOrStdout(), name)
		}
	}
	if failed {
		return errSaid
	}
	return nil
}
