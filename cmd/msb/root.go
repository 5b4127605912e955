package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/microsandbox-go/microsandbox/internal/version"
)

// newRootCmd returns the tree of commands, or of it what a command line needs:
// the branch that its first words name. Making all commands with their flags
// takes a tenth of a start. Nothing is read or opened here: the tree is built
// anew for every start.
func newRootCmd(argv ...string) *cobra.Command {
	root := newGroup("msb", "Persistent volumes for microVM sandboxes", "")
	root.SilenceErrors = true
	root.SilenceUsage = true
	showVersion := root.Flags().Bool("version", false, "show the version")
	help := root.RunE
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if *showVersion {
			_, err := io.WriteString(cmd.OutOrStdout(), "msb "+version.Version+"\n")
			return err
		}
		return help(cmd, args)
	}
	root.SetUsageTemplate(usageTemplate(root.UsageTemplate()))
	root.SetFlagErrorFunc(flagError)
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(newHelpCmd())
	rest := argv[min(1, len(argv)):]
	if len(argv) == 1 && argv[0] == "--version" {
		return root
	}
	groups := []struct {
		title    string
		commands []lazyCmd
	}{
		{"Sandboxes", []lazyCmd{
			{"run", newRunCmd}, {"create", newCreateCmd}, {"start", newStartCmd}, {"exec", newExecCmd}, {"ls list ps", newLsCmd},
			{"inspect", newInspectCmd}, {"logs", newLogsCmd}, {"stop", newStopCmd}, {"kill", newKillCmd}, {"rm remove", newRmCmd},
		}},
		{"Volumes", []lazyCmd{
			{"volume vol", func() *cobra.Command { return newVolumeCmd(rest...) }}, {"volumes vols", newVolumesCmd}, {"virtiofs", newVirtiofsCmd},
		}},
		{"Images", append([]lazyCmd{{"image", newImageCmd}}, imageShortcuts...)},
		{machineGroup, []lazyCmd{
			{"kernel", newKernelCmd}, {"doctor", newDoctorCmd}, {"version", newVersionCmd}, {"completion", newCompletionCmd},
		}},
	}
	var all []lazyCmd
	for _, g := range groups {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title + ":"})
		all = append(all, g.commands...)
	}
	needed := neededOf(all, argv)
	for _, g := range groups {
		for _, l := range g.commands {
			if needed == "" || needed == l.words {
				c := l.make()
				c.GroupID = g.title
				root.AddCommand(c)
			}
		}
	}
	root.SetHelpCommandGroupID(machineGroup)
	return root
}

const machineGroup = "This machine"

// lazyCmd is a command that is made when it is needed: its name and aliases,
// and what makes it.
type lazyCmd struct {
	words string
	make  func() *cobra.Command
}

// neededOf returns the words of the one command that a command line names; ""
// when it names none of them: then it takes all to say what there is.
func neededOf(all []lazyCmd, argv []string) string {
	if len(argv) == 0 {
		return ""
	}
	for _, l := range all {
		for word := range strings.FieldsSeq(l.words) {
			if word == argv[0] {
				return l.words
			}
		}
	}
	return ""
}

// otherTools are flags that other tools of this kind have: what to do here.
var otherTools = map[string]string{
	"exec i":           "leave -i out: input is always passed on",
	"exec interactive": "leave --interactive out: input is always passed on",
	"run i":            "leave -i out: input is always passed on",
	"run interactive":  "leave --interactive out: input is always passed on",
	"run rm":           "leave --rm out: a sandbox without --name is removed when its program has ended",
	"run mount":        "-v SOURCE:GUEST mounts; see msb run --help",
}

// flagError is a wrong flag in our words.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var invalid *pflag.InvalidValueError
	var number *strconv.NumError
	switch {
	case errors.As(err, &unknown) && otherTools[cmd.Name()+" "+unknown.GetSpecifiedName()] != "" && cmd.Flags().NArg() == 0:
		return hinted{usageError{err}, otherTools[cmd.Name()+" "+unknown.GetSpecifiedName()]}
	case errors.As(err, &unknown) && (cmd.Name() == "run" || cmd.Name() == "exec") && cmd.Flags().NArg() > 0:
		return hinted{usageError{err}, fmt.Sprintf("a program and its flags go after --, as in %s %s -- ls -l; see also %[1]s --help", cmd.CommandPath(), cmd.Flags().Arg(0))}
	case errors.As(err, &invalid) && errors.As(err, &number):
		return usagef("--%s: %q: %w", invalid.GetFlag().Name, invalid.GetValue(), number.Err)
	case errors.As(err, &invalid):
		return usagef("--%s: %w", invalid.GetFlag().Name, invalid.Unwrap())
	}
	return usageError{err}
}

// newHelpCmd returns "msb help", which refuses topics that do not exist.
func newHelpCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show the help of a command",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			at, _, err := cmd.Root().Find(args)
			if err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			var names []string
			for _, c := range at.Commands() {
				if c.IsAvailableCommand() {
					names = append(names, cobra.CompletionWithDesc(c.Name(), c.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			topic, rest, err := cmd.Root().Find(args)
			if err != nil {
				return usageError{err}
			}
			if len(rest) > 0 {
				return unknownCommand(topic, rest)
			}
			topic.InitDefaultHelpFlag()
			return topic.Help()
		},
	}
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

// countText says how many arguments were given where another number is right.
func countText(n int) string {
	switch n {
	case 0:
		return "an argument is missing"
	case 1:
		return "1 argument is the wrong number"
	}
	return fmt.Sprintf("%d arguments are the wrong number", n)
}

// args makes the failure of an argument check a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return hinted{usagef("%s: %s", cmd.CommandPath(), countText(len(args))), fmt.Sprintf("usage: %s; see %s --help", cmd.UseLine(), cmd.CommandPath())}
		}
		return nil
	}
}
