package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/microsandbox-go/microsandbox"
)

// volumeCommands are the commands of `msb volume`.
var volumeCommands = []lazyCmd{
	{"create", newVolumeCreateCmd},
	{"ls list", func() *cobra.Command { return newVolumeListCmd("ls", "list") }},
	{"inspect", newVolumeInspectCmd},
	{"rm remove", newVolumeRemoveCmd},
	{"rename mv", newVolumeRenameCmd},
	{"label", newVolumeLabelCmd},
	{"adopt", newVolumeAdoptCmd},
	{"prune", newVolumePruneCmd},
	{"resize", newVolumeResizeCmd},
	{"usage", newVolumeUsageCmd},
	{"set-quota", newVolumeSetQuotaCmd},
	{"repair", newVolumeRepairCmd},
	{"fs", newVolumeFsCmd},
}

// newVolumeCmd returns `msb volume` with the command that argv names, or all.
func newVolumeCmd(argv ...string) *cobra.Command {
	cmd := newGroup("volume", "Create, list, inspect, change and remove volumes, and work on their files", "", "vol")
	cmd.PersistentPreRun = func(*cobra.Command, []string) { useReaper() }
	needed := neededOf(volumeCommands, argv)
	for _, l := range volumeCommands {
		if needed == "" || needed == l.words {
			cmd.AddCommand(onlyOnce(l.make()))
		}
	}
	return cmd
}

// newVolumesCmd returns the short form of `msb volume ls`.
func newVolumesCmd() *cobra.Command {
	cmd := newVolumeListCmd("volumes", "vols")
	cmd.Hidden = true
	return onlyOnce(cmd)
}

// completeVolumes completes the first arguments with names of volumes: one of
// them, or any number when many is set.
func completeVolumes(many bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 && !many {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		handles, err := microsandbox.ListVolumes(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var names []cobra.Completion
		for _, h := range handles {
			if strings.HasPrefix(h.Name(), prefix) && !contains(args, h.Name()) {
				names = append(names, h.Name())
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	}
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

// labelsFlag is a repeatable --label KEY[=VALUE]. A label has one value.
type labelsFlag map[string]string

func (l *labelsFlag) String() string { return "" }
func (l *labelsFlag) Type() string   { return "KEY[=VALUE]" }

func (l *labelsFlag) Set(s string) error {
	key, value, _ := strings.Cut(s, "=")
	if key == "" {
		return usagef("label %q has no key", s)
	}
	if *l == nil {
		*l = labelsFlag{}
	}
	if other, ok := (*l)[key]; ok && other != value {
		return usagef("label %q cannot be both %q and %q", key, other, value)
	}
	(*l)[key] = value
	return nil
}

// labelFilter is a repeatable --label KEY[=VALUE] that selects what has all of
// these labels; without =VALUE, with any value.
type labelFilter struct {
	labels labelsFlag
	keys   []string
}

func (l *labelFilter) String() string { return "" }
func (l *labelFilter) Type() string   { return "KEY[=VALUE]" }

func (l *labelFilter) Set(s string) error {
	if strings.Contains(s, "=") || s == "" {
		return l.labels.Set(s)
	}
	l.keys = append(l.keys, s)
	return nil
}

// isSet reports whether anything is to be filtered.
func (l *labelFilter) isSet() bool { return len(l.labels)+len(l.keys) > 0 }

// onceFlag refuses a second value of a flag that takes one: of two filters, one
// would be lost without a word.
type onceFlag struct {
	pflag.Value
	given *string
}

func (o *onceFlag) Set(s string) error {
	if o.given != nil && *o.given != s {
		return fmt.Errorf("given twice, as %q and as %q", *o.given, s)
	}
	o.given = &s
	return o.Value.Set(s)
}

// onlyOnce makes every flag of a command, and of those below it, that is not a
// list refuse a second value.
func onlyOnce(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		switch f.Value.(type) {
		case *labelsFlag, *labelFilter, pflag.SliceValue:
		default:
			if f.Value.Type() != "bool" {
				f.Value = &onceFlag{Value: f.Value}
			}
		}
	})
	for _, c := range cmd.Commands() {
		onlyOnce(c)
	}
	return cmd
}

// mibFlag is a size in MiB; see parseMiB.
type mibFlag uint32

func (m *mibFlag) String() string { return "" }
func (m *mibFlag) Type() string   { return "SIZE" }

func (m *mibFlag) Set(s string) error {
	mib, err := parseMiB(s)
	*m = mibFlag(mib)
	return err
}
