package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/microsandbox-go/microsandbox/internal/version"
)

// newRootCmd returns the tree of commands. Nothing is read or opened here: it
// is built anew for every start.
func newRootCmd() *cobra.Command {
	root := newGroup("msb", "Persistent volumes for microVM sandboxes", "")
	root.Version = version.Version
	root.SetVersionTemplate("msb {{.Version}}\n")
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.Flags().Bool("version", false, "show the version")
	root.SetUsageTemplate(usageTemplate(root.UsageTemplate()))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newVersionCmd(),
		newVolumeCmd(),
		newVolumesCmd(),
		newVirtiofsCmd(),
		newImageCmd(),
		newRunCmd(), newCreateCmd(), newStartCmd(), newExecCmd(), newLsCmd(), newInspectCmd(),
		newLogsCmd(), newStopCmd(), newKillCmd(), newRmCmd(),
		newKernelCmd(), newDoctorCmd(),
	)
	root.AddCommand(newImageShortcuts()...)
	return root
}

// newGroup returns a command that only has subcommands. Called without one it
// shows its help on stderr and fails as wrong usage does.
func newGroup(use, short, long string, aliases ...string) *cobra.Command {
	return &cobra.Command{
		Use:                   use + " COMMAND",
		Short:                 short,
		Long:                  long,
		Aliases:               aliases,
		DisableFlagsInUseLine: true,
		Args:                  unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(cmd.ErrOrStderr())
			if err := cmd.Help(); err != nil {
				return err
			}
			return exitError{exitUsage}
		},
	}
}

func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	msg := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		msg += "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return usageError{errors.New(msg)}
}

// usageTemplate is cobra's, with "COMMAND" said once.
func usageTemplate(t string) string {
	t = strings.Replace(t, "{{if .HasAvailableSubCommands}}\n  {{.CommandPath}} [command]{{end}}", "", 1)
	return strings.Replace(t, "{{.CommandPath}} [command] --help", "{{.CommandPath}} COMMAND --help", 1)
}

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no argument, got %q", cmd.CommandPath(), args[0])
	}
	return nil
}

// args makes the failure of an argument check a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%s: %w; usage: %s", cmd.CommandPath(), err, cmd.UseLine())}
		}
		return nil
	}
}
